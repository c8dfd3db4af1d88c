# SPDX-License-Identifier: Apache-2.0
"""Camera images with projected 3-D boxes."""

from collections.abc import Sequence
from typing import Any, Final

import cv2
import numpy as np
from numpy.typing import NDArray

from ftkd_core.boxes import BOX_EDGES, box_corners
from ftkd_core.classes import CAMERA_CHANNELS
from ftkd_core.geometry import invert_rigid, transform_points
from ftkd_core.lens import Lens, project_pixels
from ftkd_core.types import CameraRound, CameraView, ObjectList
from ftkd_core.visualization.style import (
    BACKGROUND,
    FONT,
    TEXT_COLOR,
    TRUTH_COLOR,
    Color,
    Image,
    class_color,
    draw_centered_text,
    draw_label,
    draw_line,
    draw_outlined_text,
)

SURROUND_LAYOUT: Final[tuple[tuple[str, ...], ...]] = (
    ("CAM_FRONT_LEFT", "CAM_FRONT", "CAM_FRONT_RIGHT"),
    ("CAM_BACK_LEFT", "CAM_BACK", "CAM_BACK_RIGHT"),
)
_NEAR_PLANE_M: Final = 0.2
_LABEL_MIN_EXTENT_PX: Final = 14
_CURVE_STEPS: Final = 12


def draw_surround(
    camera_round: CameraRound,
    detections: ObjectList,
    ground_truth: ObjectList | None = None,
    *,
    width: int = 1536,
    min_score: float = 0.25,
    channels: tuple[str, ...] = CAMERA_CHANNELS,
) -> Image:
    """Draw the cameras of a round in rows of three, `width` pixels wide, with boxes at the positions of the
    objects at exposure.

    Detections and ground truth are in ego at the reference stamp; detections below `min_score` are left out.
    Views are in the order of `channels`; a missing view is an empty tile. If the round has a camera outside
    the usual six, its cameras are shown in their order.
    """
    shapes = [view.image.shape for view in camera_round.views if view is not None]
    aspect = shapes[0][0] / shapes[0][1] if shapes else 9 / 16
    tile_width = max(width // 3, 16)
    tile_height = max(round(tile_width * aspect), 16)
    visible = detections.select(detections.scores >= min_score)
    views = dict(zip(channels, camera_round.views, strict=True))
    rows = []
    for row in _layout([name for name, view in views.items() if view is not None]):
        tiles = [
            _draw_tile(
                views.get(channel), channel, camera_round, visible, ground_truth, (tile_width, tile_height)
            )
            for channel in row
        ]
        rows.append(np.concatenate(tiles, axis=1))
    return np.concatenate(rows, axis=0)


def _layout(present: Sequence[str]) -> Sequence[Sequence[str]]:
    """Return the channels of each row of tiles, "" for an empty one."""
    if {name for row in SURROUND_LAYOUT for name in row}.issuperset(present):
        return SURROUND_LAYOUT
    filled = [*present, *[""] * (-len(present) % 3)]
    return [filled[first : first + 3] for first in range(0, len(filled), 3)]


def draw_boxes(
    image: Image,
    objects: ObjectList,
    intrinsics: NDArray[Any],
    camera_from_ego: NDArray[Any],
    *,
    color: Color | None = None,
    thickness: int = 2,
    show_scores: bool = True,
    lens: Lens | None = None,
) -> Image:
    """Return a copy of `image` (H, W, 3) with projected 3-D boxes; edges are clipped at the near plane and
    the border.

    intrinsics (3, 3) in pixels of `image`; camera_from_ego (4, 4); lens of a raw image.
    Without `color`, boxes are coloured by class and the front face is a translucent pane, which shows the
    heading.
    """
    drawn = np.ascontiguousarray(image).copy()
    corners_ego = box_corners(objects.boxes)
    labels: list[tuple[float, NDArray[Any], Color]] = []
    farthest_first = np.argsort(-np.linalg.norm(objects.boxes[:, :2], axis=1))  # near boxes cover far ones
    for index in farthest_first:
        corners_camera = transform_points(np.asarray(camera_from_ego), corners_ego[index])
        if lens is None:
            edges = _project_edges(corners_camera, intrinsics, drawn.shape[1], drawn.shape[0])
        else:
            edges = _curved_edges(corners_camera, intrinsics, lens, drawn.shape[1], drawn.shape[0])
        if not edges:
            continue
        box_color = class_color(int(objects.labels[index])) if color is None else color
        points = np.array(edges).reshape(-1, 2)
        extent = np.ptp(points, axis=0).max()
        if color is None:
            _tint_front_face(drawn, corners_camera[:4], intrinsics, box_color, lens)
        for start, end in edges:
            draw_line(drawn, start, end, box_color, thickness if extent > 40 else 1)
        if extent >= _LABEL_MIN_EXTENT_PX:
            labels.append((float(objects.scores[index]), points, box_color))
    if show_scores and color is None:
        _draw_scores(drawn, labels)
    return drawn


def camera_from_reference_ego(view: CameraView, camera_round: CameraRound) -> NDArray[np.float64]:
    """Return the transform (4, 4) from ego at the round's reference stamp to the camera at its exposure."""
    global_from_camera = view.global_from_ego @ view.ego_from_camera
    matrix: NDArray[np.float64] = invert_rigid(global_from_camera) @ camera_round.global_from_ego
    return matrix


def moved_to(objects: ObjectList, stamp_ns: int) -> ObjectList:
    """Move objects to another time with constant velocity, in the same frame; unknown (nan) velocity counts
    as zero."""
    boxes = objects.boxes.copy()
    boxes[:, :2] += np.nan_to_num(boxes[:, 7:9]) * ((stamp_ns - objects.stamp_ns) * 1e-9)
    return ObjectList(
        boxes=boxes, scores=objects.scores, labels=objects.labels, stamp_ns=stamp_ns, ids=objects.ids
    )


def _draw_tile(
    view: CameraView | None,
    channel: str,
    camera_round: CameraRound,
    detections: ObjectList,
    ground_truth: ObjectList | None,
    size: tuple[int, int],
) -> Image:
    width, height = size
    if view is None:
        tile = np.full((height, width, 3), BACKGROUND, dtype=np.uint8)
        draw_centered_text(tile, "no image", 0.02 * width / 10)
    else:
        source_height, source_width = view.image.shape[:2]
        interpolation = cv2.INTER_AREA if width < source_width else cv2.INTER_LINEAR
        tile = np.asarray(cv2.resize(view.image, size, interpolation=interpolation), dtype=np.uint8)
        intrinsics = np.diag([width / source_width, height / source_height, 1.0]) @ view.intrinsics
        camera_from_ego = camera_from_reference_ego(view, camera_round)
        if ground_truth is not None:
            truth = moved_to(ground_truth, view.stamp_ns)
            tile = draw_boxes(
                tile, truth, intrinsics, camera_from_ego, color=TRUTH_COLOR, thickness=1, lens=view.lens
            )
        seen = moved_to(detections, view.stamp_ns)
        thickness = 2 if width >= 400 else 1
        tile = draw_boxes(tile, seen, intrinsics, camera_from_ego, thickness=thickness, lens=view.lens)
    draw_label(
        tile,
        channel.removeprefix("CAM_").replace("_", " "),
        (8, 8),
        0.45 if width >= 400 else 0.35,
        TEXT_COLOR,
    )
    cv2.rectangle(tile, (0, 0), (width - 1, height - 1), BACKGROUND, 1)
    return tile


def _project_edges(
    corners_camera: NDArray[Any], intrinsics: NDArray[Any], width: int, height: int
) -> list[tuple[NDArray[Any], NDArray[Any]]]:
    """Return pixel segments of the parts of the 12 edges beyond the near plane and inside the image."""
    segments = []
    for first, second in BOX_EDGES:
        clipped = _clip_near(corners_camera[first], corners_camera[second])
        if clipped is None:
            continue
        start, end = (_project(point, intrinsics) for point in clipped)
        inside = _clip_to_image(start, end, width, height)
        if inside is not None:
            segments.append(inside)
    return segments


def _curved_edges(
    corners_camera: NDArray[Any], intrinsics: NDArray[Any], lens: Lens, width: int, height: int
) -> list[tuple[NDArray[Any], NDArray[Any]]]:
    """Return pixel segments of the 12 edges as a lens sees them: straight lines become curves."""
    segments = []
    shares = np.linspace(0.0, 1.0, _CURVE_STEPS + 1)[:, None]
    for first, second in BOX_EDGES:
        start, end = corners_camera[first], corners_camera[second]
        points = start + (end - start) * shares
        pixels, valid = project_pixels(points, intrinsics, lens)
        near = np.linalg.norm(points, axis=1) < _NEAR_PLANE_M
        for index in np.flatnonzero(valid[1:] & valid[:-1] & ~near[1:] & ~near[:-1]):
            inside = _clip_to_image(pixels[index], pixels[index + 1], width, height)
            if inside is not None:
                segments.append(inside)
    return segments


def _project(point_camera: NDArray[Any], intrinsics: NDArray[Any]) -> NDArray[Any]:
    homogeneous = intrinsics @ point_camera
    pixel: NDArray[Any] = homogeneous[:2] / homogeneous[2]
    return pixel


def _clip_near(start: NDArray[Any], end: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]] | None:
    """Clip a segment in the camera frame at the near plane; None if nothing is left."""
    if start[2] < _NEAR_PLANE_M and end[2] < _NEAR_PLANE_M:
        return None
    if start[2] >= _NEAR_PLANE_M and end[2] >= _NEAR_PLANE_M:
        return start, end
    crossing = start + (end - start) * ((_NEAR_PLANE_M - start[2]) / (end[2] - start[2]))
    return (start, crossing) if start[2] >= _NEAR_PLANE_M else (crossing, end)


def _clip_to_image(
    start: NDArray[Any], end: NDArray[Any], width: int, height: int
) -> tuple[NDArray[Any], NDArray[Any]] | None:
    """Clip a pixel segment to the image (Liang-Barsky); None if nothing is left. OpenCV clips only int32
    coordinates."""
    delta = end - start
    entering, leaving = 0.0, 1.0
    for axis, limit in ((0, width - 1.0), (1, height - 1.0)):
        for step, room in ((-delta[axis], start[axis]), (delta[axis], limit - start[axis])):
            if step == 0:
                if room < 0:
                    return None
                continue
            fraction = room / step
            if step < 0:
                entering = max(entering, fraction)
            else:
                leaving = min(leaving, fraction)
    if entering > leaving:
        return None
    return start + entering * delta, start + leaving * delta


def _tint_front_face(
    image: Image, face_camera: NDArray[Any], intrinsics: NDArray[Any], color: Color, lens: Lens | None
) -> None:
    if face_camera[:, 2].min() < _NEAR_PLANE_M:
        return
    height, width = image.shape[:2]
    if lens is None:
        face = np.array([_project(point, intrinsics) for point in face_camera])
    else:
        face, valid = project_pixels(face_camera, intrinsics, lens)
        if not valid.all():
            return
    low = np.clip(np.floor(face.min(axis=0)), 0, [width, height]).astype(int)
    high = np.clip(np.ceil(face.max(axis=0)) + 1, 0, [width, height]).astype(int)
    if np.any(high <= low):
        return
    patch = image[low[1] : high[1], low[0] : high[0]]
    overlay = patch.copy()
    # A face next to the camera may extend far outside the image; cv2.fillConvexPoly takes 32-bit coordinates.
    polygon = np.clip(face - low, -20_000, 20_000).round().astype(np.int32)
    cv2.fillConvexPoly(overlay, polygon, color, cv2.LINE_AA)
    cv2.addWeighted(overlay, 0.3, patch, 0.7, 0, dst=patch)


def _draw_scores(image: Image, labels: list[tuple[float, NDArray[Any], Color]]) -> None:
    """Draw scores above their boxes, best first; a score that would cover another is left out."""
    scale = 0.36
    taken: list[tuple[int, int, int, int]] = []
    for score, points, color in sorted(labels, key=lambda label: -label[0]):
        text = f"{score:.2f}"
        (width, height), _ = cv2.getTextSize(text, FONT, scale, 1)
        x = int(
            np.clip((points[:, 0].min() + points[:, 0].max() - width) / 2, 0, max(image.shape[1] - width, 0))
        )
        y = int(np.clip(points[:, 1].min() - 3, height + 2, max(image.shape[0] - 2, height + 2)))
        plate = (x - 1, y - height - 1, x + width + 1, y + 1)
        if any(plate[0] < t[2] and t[0] < plate[2] and plate[1] < t[3] and t[1] < plate[3] for t in taken):
            continue
        taken.append(plate)
        draw_outlined_text(image, text, (x, y), scale, color)
