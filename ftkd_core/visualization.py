# SPDX-License-Identifier: Apache-2.0
"""Pictures of detections: a bird's-eye view and the six camera images with projected boxes.

Predictions are solid and coloured by class, ground truth is thin and white (dashed from above). All images
are RGB uint8. Frames: ego is base_link at the reference stamp; from above, forward points up and left points
left.
"""

from typing import Any, Final

import cv2
import numpy as np
from numpy.typing import NDArray

from ftkd_core.boxes import BOX_EDGES, box_corners
from ftkd_core.classes import CAMERA_CHANNELS, CLASS_NAMES
from ftkd_core.geometry import invert_rigid, transform_points
from ftkd_core.types import CameraRound, CameraView, ObjectList

Image = NDArray[np.uint8]
Color = tuple[int, int, int]

CLASS_COLORS: Final[dict[str, Color]] = {
    "car": (255, 168, 38),
    "truck": (255, 99, 71),
    "construction_vehicle": (214, 158, 110),
    "bus": (255, 77, 148),
    "trailer": (190, 120, 255),
    "barrier": (150, 175, 200),
    "motorcycle": (90, 220, 120),
    "bicycle": (40, 215, 200),
    "pedestrian": (80, 170, 255),
    "traffic_cone": (245, 230, 80),
}
"""RGB of each class; RViz and the web page use the same."""

SURROUND_LAYOUT: Final[tuple[tuple[str, ...], ...]] = (
    ("CAM_FRONT_LEFT", "CAM_FRONT", "CAM_FRONT_RIGHT"),
    ("CAM_BACK_LEFT", "CAM_BACK", "CAM_BACK_RIGHT"),
)
_TRUTH_COLOR: Final[Color] = (240, 240, 240)
_BACKGROUND: Final[Color] = (22, 26, 32)
_GRID_COLOR: Final[Color] = (58, 66, 78)
_TEXT_COLOR: Final[Color] = (205, 212, 222)
_NEAR_PLANE_M: Final = 0.2
_FONT: Final = cv2.FONT_HERSHEY_SIMPLEX
_SUBPIXEL_BITS: Final = 4
_LABEL_MIN_EXTENT_PX: Final = 14


def class_color(label: int) -> Color:
    """RGB of the class with this index into CLASS_NAMES."""
    return CLASS_COLORS[CLASS_NAMES[label]]


def draw_boxes(
    image: Image,
    objects: ObjectList,
    intrinsics: NDArray[Any],
    camera_from_ego: NDArray[Any],
    *,
    color: Color | None = None,
    thickness: int = 2,
    show_scores: bool = True,
) -> Image:
    """A copy of `image` (H, W, 3) with 3-D boxes projected into it; edges are cut at the near plane and the
    border.

    intrinsics (3, 3) in pixels of `image`; camera_from_ego (4, 4). `color` None colours by class. The front
    face is drawn as a translucent pane, so that the heading shows.
    """
    drawn = np.ascontiguousarray(image).copy()
    corners_ego = box_corners(objects.boxes)
    labels: list[tuple[float, NDArray[Any], Color]] = []
    order = np.argsort(-np.linalg.norm(objects.boxes[:, :2], axis=1))  # far first: near boxes cover far ones
    for index in order:
        corners_camera = transform_points(np.asarray(camera_from_ego), corners_ego[index])
        if corners_camera[:, 2].max() < _NEAR_PLANE_M:
            continue
        edges = _project_edges(corners_camera, intrinsics, drawn.shape[1], drawn.shape[0])
        if not edges:
            continue
        box_color = class_color(int(objects.labels[index])) if color is None else color
        points = np.array(edges).reshape(-1, 2)
        extent = np.ptp(points, axis=0).max()
        if color is None:
            _tint_front_face(drawn, corners_camera[:4], intrinsics, box_color)
        for start, end in edges:
            _line(drawn, start, end, box_color, thickness if extent > 40 else 1)
        if extent >= _LABEL_MIN_EXTENT_PX:
            labels.append((float(objects.scores[index]), points, box_color))
    if show_scores and color is None:
        _draw_scores(drawn, labels)
    return drawn


def draw_surround(
    camera_round: CameraRound,
    detections: ObjectList,
    ground_truth: ObjectList | None = None,
    *,
    width: int = 1536,
    min_score: float = 0.25,
    channels: tuple[str, ...] = CAMERA_CHANNELS,
) -> Image:
    """The round's cameras in two rows of three, `width` pixels wide, with boxes drawn where the objects were
    at exposure.

    Detections and ground truth are in ego at the reference stamp; detections below `min_score` are left out.
    Views are in the order of `channels`; a missing one becomes an empty tile. Channels outside the usual six
    are not shown.
    """
    shapes = [view.image.shape for view in camera_round.views if view is not None]
    aspect = shapes[0][0] / shapes[0][1] if shapes else 9 / 16
    tile_width = max(width // 3, 16)
    tile_height = max(round(tile_width * aspect), 16)
    visible = detections.select(detections.scores >= min_score)
    views = dict(zip(channels, camera_round.views, strict=True))
    rows = []
    for row in SURROUND_LAYOUT:
        tiles = [
            _draw_tile(
                views.get(channel), channel, camera_round, visible, ground_truth, (tile_width, tile_height)
            )
            for channel in row
        ]
        rows.append(np.concatenate(tiles, axis=1))
    return np.concatenate(rows, axis=0)


def draw_bird_eye(
    detections: ObjectList,
    ground_truth: ObjectList | None = None,
    *,
    range_m: float = 55.0,
    size: int = 800,
    min_score: float = 0.25,
) -> Image:
    """The scene from above, (size, size, 3): ego in the middle looking up, rings every 10 m, boxes and 1 s of
    velocity.

    Detections below `min_score` are left out; a tick runs from each box's centre through its front.
    """
    image = np.full((size, size, 3), _BACKGROUND, dtype=np.uint8)
    scale = size / (2 * range_m)
    _draw_grid(image, range_m, scale)
    if ground_truth is not None:
        for box in ground_truth.boxes:
            _draw_footprint_dashed(image, box, range_m, scale)
    visible = detections.select(detections.scores >= min_score)
    for index in np.argsort(visible.scores):  # best last, on top
        color = class_color(int(visible.labels[index]))
        _draw_footprint(image, visible.boxes[index], range_m, scale, color, float(visible.scores[index]))
    _draw_ego(image, range_m, scale)
    labels = set(visible.labels.tolist())
    _draw_legend(image, labels, len(visible.boxes), None if ground_truth is None else len(ground_truth.boxes))
    return image


def camera_from_reference_ego(view: CameraView, camera_round: CameraRound) -> NDArray[np.float64]:
    """Transform (4, 4) from ego at the round's reference stamp to the camera at its own exposure."""
    global_from_camera = view.global_from_ego @ view.ego_from_camera
    matrix: NDArray[np.float64] = invert_rigid(global_from_camera) @ camera_round.global_from_ego
    return matrix


def moved_to(objects: ObjectList, stamp_ns: int) -> ObjectList:
    """The objects at another moment by constant velocity (same frame); unknown (nan) velocity counts as
    standing."""
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
        tile = np.full((height, width, 3), _BACKGROUND, dtype=np.uint8)
        _text_centered(tile, "no image", 0.02 * width / 10)
    else:
        source_height, source_width = view.image.shape[:2]
        interpolation = cv2.INTER_AREA if width < source_width else cv2.INTER_LINEAR
        tile = np.asarray(cv2.resize(view.image, size, interpolation=interpolation), dtype=np.uint8)
        intrinsics = np.diag([width / source_width, height / source_height, 1.0]) @ view.intrinsics
        camera_from_ego = camera_from_reference_ego(view, camera_round)
        if ground_truth is not None:
            truth = moved_to(ground_truth, view.stamp_ns)
            tile = draw_boxes(tile, truth, intrinsics, camera_from_ego, color=_TRUTH_COLOR, thickness=1)
        seen = moved_to(detections, view.stamp_ns)
        tile = draw_boxes(tile, seen, intrinsics, camera_from_ego, thickness=2 if width >= 400 else 1)
    _chip(
        tile,
        channel.removeprefix("CAM_").replace("_", " "),
        (8, 8),
        0.45 if width >= 400 else 0.35,
        _TEXT_COLOR,
    )
    cv2.rectangle(tile, (0, 0), (width - 1, height - 1), _BACKGROUND, 1)
    return tile


def _project_edges(
    corners_camera: NDArray[Any], intrinsics: NDArray[Any], width: int, height: int
) -> list[tuple[NDArray[Any], NDArray[Any]]]:
    """Pixel segments of the parts of the 12 edges that lie before the near plane and inside the image."""
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


def _project(point_camera: NDArray[Any], intrinsics: NDArray[Any]) -> NDArray[Any]:
    homogeneous = intrinsics @ point_camera
    pixel: NDArray[Any] = homogeneous[:2] / homogeneous[2]
    return pixel


def _clip_near(start: NDArray[Any], end: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]] | None:
    """The part of a camera-frame segment with z >= the near plane, or None."""
    if start[2] < _NEAR_PLANE_M and end[2] < _NEAR_PLANE_M:
        return None
    if start[2] >= _NEAR_PLANE_M and end[2] >= _NEAR_PLANE_M:
        return start, end
    crossing = start + (end - start) * ((_NEAR_PLANE_M - start[2]) / (end[2] - start[2]))
    return (start, crossing) if start[2] >= _NEAR_PLANE_M else (crossing, end)


def _clip_to_image(
    start: NDArray[Any], end: NDArray[Any], width: int, height: int
) -> tuple[NDArray[Any], NDArray[Any]] | None:
    """The part of a pixel segment inside the image (Liang-Barsky), or None. OpenCV's own clipping works on
    int32 only."""
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


def _tint_front_face(image: Image, face_camera: NDArray[Any], intrinsics: NDArray[Any], color: Color) -> None:
    if face_camera[:, 2].min() < _NEAR_PLANE_M:
        return
    height, width = image.shape[:2]
    face = np.array([_project(point, intrinsics) for point in face_camera])
    low = np.clip(np.floor(face.min(axis=0)), 0, [width, height]).astype(int)
    high = np.clip(np.ceil(face.max(axis=0)) + 1, 0, [width, height]).astype(int)
    if np.any(high <= low):
        return
    patch = image[low[1] : high[1], low[0] : high[0]]
    overlay = patch.copy()
    # A face seen from beside the camera can reach far outside; the polygon filler takes 32-bit coordinates.
    polygon = np.clip(face - low, -20_000, 20_000).round().astype(np.int32)
    cv2.fillConvexPoly(overlay, polygon, color, cv2.LINE_AA)
    cv2.addWeighted(overlay, 0.3, patch, 0.7, 0, dst=patch)


def _draw_scores(image: Image, labels: list[tuple[float, NDArray[Any], Color]]) -> None:
    """Scores above their boxes, best first; one that would cover another is left out."""
    scale = 0.36
    taken: list[tuple[int, int, int, int]] = []
    for score, points, color in sorted(labels, key=lambda label: -label[0]):
        text = f"{score:.2f}"
        (width, height), _ = cv2.getTextSize(text, _FONT, scale, 1)
        x = int(
            np.clip((points[:, 0].min() + points[:, 0].max() - width) / 2, 0, max(image.shape[1] - width, 0))
        )
        y = int(np.clip(points[:, 1].min() - 3, height + 2, max(image.shape[0] - 2, height + 2)))
        plate = (x - 1, y - height - 1, x + width + 1, y + 1)
        if any(plate[0] < t[2] and t[0] < plate[2] and plate[1] < t[3] and t[1] < plate[3] for t in taken):
            continue
        taken.append(plate)
        _outlined_text(image, text, (x, y), scale, color)


def _draw_grid(image: Image, range_m: float, scale: float) -> None:
    size = image.shape[0]
    center = size / 2
    for axis_end in ((center, 0.0), (0.0, center)):
        other = (size - axis_end[0], size - axis_end[1])
        _line(image, np.array(axis_end), np.array(other), (38, 44, 53), 1)
    for radius in range(10, int(range_m) + 1, 10):
        shifted = round(center * 2**_SUBPIXEL_BITS)
        length = round(radius * scale * 2**_SUBPIXEL_BITS)
        cv2.circle(image, (shifted, shifted), length, _GRID_COLOR, 1, cv2.LINE_AA, _SUBPIXEL_BITS)
        diagonal = radius * scale * np.sqrt(0.5)
        position = (int(center + diagonal) + 3, int(center - diagonal) - 3)
        cv2.putText(image, f"{radius} m", position, _FONT, 0.38, (120, 130, 145), 1, cv2.LINE_AA)


def _draw_ego(image: Image, range_m: float, scale: float) -> None:
    """The vehicle as an arrow head: base_link is the middle of the rear axle of a car of 4.1 x 1.8 m."""
    outline = np.array([[3.2, 0.0], [2.3, 0.9], [-0.9, 0.9], [-0.9, -0.9], [2.3, -0.9]])
    pixels = _to_pixels(outline, range_m, scale)
    cv2.fillPoly(image, [_subpixel(pixels)], (95, 105, 120), cv2.LINE_AA, _SUBPIXEL_BITS)
    cv2.polylines(image, [_subpixel(pixels)], True, (235, 238, 242), 1, cv2.LINE_AA, _SUBPIXEL_BITS)


def _footprint(box: NDArray[Any]) -> NDArray[Any]:
    """Ground corners (4, 2): front right, front left, rear left, rear right."""
    footprint: NDArray[Any] = box_corners(box[None])[0][[0, 1, 5, 4], :2]
    return footprint


def _draw_footprint(
    image: Image, box: NDArray[Any], range_m: float, scale: float, color: Color, score: float
) -> None:
    corners = _to_pixels(_footprint(box), range_m, scale)
    low = np.clip(np.floor(corners.min(axis=0)), 0, image.shape[0]).astype(int)
    high = np.clip(np.ceil(corners.max(axis=0)) + 1, 0, image.shape[0]).astype(int)
    if np.any(high <= low):
        return
    patch = image[low[1] : high[1], low[0] : high[0]]
    overlay = patch.copy()
    cv2.fillPoly(overlay, [_subpixel(corners - low)], color, cv2.LINE_AA, _SUBPIXEL_BITS)
    opacity = 0.15 + 0.5 * score
    cv2.addWeighted(overlay, opacity, patch, 1 - opacity, 0, dst=patch)
    cv2.polylines(image, [_subpixel(corners)], True, color, 2, cv2.LINE_AA, _SUBPIXEL_BITS)
    center, heading = box[:2], np.array([np.cos(box[6]), np.sin(box[6])])
    tick = _to_pixels(np.stack([center, center + heading * (box[3] / 2 + 0.8)]), range_m, scale)
    _line(image, tick[0], tick[1], color, 2)
    velocity = box[7:9]
    if np.all(np.isfinite(velocity)) and np.linalg.norm(velocity) > 0.5:
        arrow = _to_pixels(np.stack([center, center + velocity]), range_m, scale)
        _line(image, arrow[0], arrow[1], (255, 255, 255), 1)
        cv2.circle(image, tuple(int(v) for v in arrow[1]), 2, (255, 255, 255), -1, cv2.LINE_AA)


def _draw_footprint_dashed(image: Image, box: NDArray[Any], range_m: float, scale: float) -> None:
    corners = _to_pixels(_footprint(box), range_m, scale)
    for start, end in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        _dashed_line(image, start, end, _TRUTH_COLOR)
    front = corners[:2].mean(axis=0)
    _dashed_line(image, corners.mean(axis=0), front, _TRUTH_COLOR)


def _draw_legend(image: Image, labels: set[int], detections: int, truth: int | None) -> None:
    size = image.shape[0]
    counts = f"{detections} detected (solid)"
    if truth is not None:
        counts += f", {truth} true (dashed)"
    cv2.putText(image, counts, (10, 20), _FONT, 0.45, _TEXT_COLOR, 1, cv2.LINE_AA)
    x, y = 10, size - 10
    for label in sorted(labels):
        name = CLASS_NAMES[label].replace("_", " ")
        width = 15 + cv2.getTextSize(name, _FONT, 0.42, 1)[0][0]
        if x > 10 and x + width > size - 10:
            x, y = 10, y - 18  # a further row, above
        cv2.rectangle(image, (x, y - 10), (x + 10, y), class_color(label), -1)
        cv2.putText(image, name, (x + 15, y), _FONT, 0.42, _TEXT_COLOR, 1, cv2.LINE_AA)
        x += width + 16


def _to_pixels(points_ego: NDArray[Any], range_m: float, scale: float) -> NDArray[Any]:
    """Ground points (P, 2) in ego to pixels (P, 2): forward is up, left is left."""
    return np.stack([(range_m - points_ego[:, 1]) * scale, (range_m - points_ego[:, 0]) * scale], axis=-1)


def _subpixel(points: NDArray[Any]) -> NDArray[np.int32]:
    return np.clip(points * 2**_SUBPIXEL_BITS, -1e8, 1e8).round().astype(np.int32)


def _line(image: Image, start: NDArray[Any], end: NDArray[Any], color: Color, thickness: int) -> None:
    first, second = (tuple(int(v) for v in _subpixel(point)) for point in (start, end))
    cv2.line(image, first, second, color, thickness, cv2.LINE_AA, _SUBPIXEL_BITS)


def _dashed_line(image: Image, start: NDArray[Any], end: NDArray[Any], color: Color) -> None:
    """Dashes of about 4 px with equal gaps, beginning and ending with a dash so that corners close."""
    length = float(np.linalg.norm(end - start))
    pieces = max(1, 2 * round(length / 8) + 1) if length < 10_000 else 1
    for piece in range(0, pieces, 2):
        a, b = piece / pieces, (piece + 1) / pieces
        _line(image, start + a * (end - start), start + b * (end - start), color, 1)


def _outlined_text(image: Image, text: str, position: tuple[int, int], scale: float, color: Color) -> None:
    cv2.putText(image, text, position, _FONT, scale, (0, 0, 0), 3, cv2.LINE_AA)
    cv2.putText(image, text, position, _FONT, scale, color, 1, cv2.LINE_AA)


def _chip(image: Image, text: str, corner: tuple[int, int], scale: float, color: Color) -> None:
    """Text on a dark plate whose upper left corner is given."""
    (width, height), _ = cv2.getTextSize(text, _FONT, scale, 1)
    x, y = corner
    cv2.rectangle(image, corner, (x + width + 10, y + height + 10), _BACKGROUND, -1)
    cv2.putText(image, text, (x + 5, y + height + 5), _FONT, scale, color, 1, cv2.LINE_AA)


def _text_centered(image: Image, text: str, scale: float) -> None:
    (width, height), _ = cv2.getTextSize(text, _FONT, scale, 1)
    position = ((image.shape[1] - width) // 2, (image.shape[0] + height) // 2)
    cv2.putText(image, text, position, _FONT, scale, _TEXT_COLOR, 1, cv2.LINE_AA)
