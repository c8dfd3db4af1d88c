# SPDX-License-Identifier: Apache-2.0
"""Bird's-eye view of detections and ground truth."""

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from ftkd_core.boxes import box_corners
from ftkd_core.classes import CLASS_NAMES
from ftkd_core.types import ObjectList
from ftkd_core.visualization.style import (
    BACKGROUND,
    FONT,
    GRID_COLOR,
    SUBPIXEL_BITS,
    TEXT_COLOR,
    TRUTH_COLOR,
    Color,
    Image,
    class_color,
    draw_line,
    to_subpixels,
)


def draw_bird_eye(
    detections: ObjectList,
    ground_truth: ObjectList | None = None,
    *,
    range_m: float = 55.0,
    size: int = 800,
    min_score: float = 0.25,
) -> Image:
    """Draw the scene from above, (size, size, 3): ego in the centre facing up, rings every 10 m, boxes, and
    the distance travelled in 1 s.

    Detections below `min_score` are left out. A line from the centre of each box through its front shows the
    heading.
    """
    image = np.full((size, size, 3), BACKGROUND, dtype=np.uint8)
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


def _draw_grid(image: Image, range_m: float, scale: float) -> None:
    size = image.shape[0]
    center = size / 2
    for axis_end in ((center, 0.0), (0.0, center)):
        other = (size - axis_end[0], size - axis_end[1])
        draw_line(image, np.array(axis_end), np.array(other), (38, 44, 53), 1)
    for radius in range(10, int(range_m) + 1, 10):
        shifted = round(center * 2**SUBPIXEL_BITS)
        length = round(radius * scale * 2**SUBPIXEL_BITS)
        cv2.circle(image, (shifted, shifted), length, GRID_COLOR, 1, cv2.LINE_AA, SUBPIXEL_BITS)
        diagonal = radius * scale * np.sqrt(0.5)
        position = (int(center + diagonal) + 3, int(center - diagonal) - 3)
        cv2.putText(image, f"{radius} m", position, FONT, 0.38, (120, 130, 145), 1, cv2.LINE_AA)


def _draw_ego(image: Image, range_m: float, scale: float) -> None:
    """Draw the vehicle as an arrowhead; base_link is the centre of the rear axle of a car of 4.1 x 1.8 m."""
    outline = np.array([[3.2, 0.0], [2.3, 0.9], [-0.9, 0.9], [-0.9, -0.9], [2.3, -0.9]])
    pixels = _to_pixels(outline, range_m, scale)
    cv2.fillPoly(image, [to_subpixels(pixels)], (95, 105, 120), cv2.LINE_AA, SUBPIXEL_BITS)
    cv2.polylines(image, [to_subpixels(pixels)], True, (235, 238, 242), 1, cv2.LINE_AA, SUBPIXEL_BITS)


def _footprint(box: NDArray[Any]) -> NDArray[Any]:
    """Return the ground corners (4, 2): front right, front left, rear left, rear right."""
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
    cv2.fillPoly(overlay, [to_subpixels(corners - low)], color, cv2.LINE_AA, SUBPIXEL_BITS)
    opacity = 0.15 + 0.5 * score
    cv2.addWeighted(overlay, opacity, patch, 1 - opacity, 0, dst=patch)
    cv2.polylines(image, [to_subpixels(corners)], True, color, 2, cv2.LINE_AA, SUBPIXEL_BITS)
    center, heading = box[:2], np.array([np.cos(box[6]), np.sin(box[6])])
    tick = _to_pixels(np.stack([center, center + heading * (box[3] / 2 + 0.8)]), range_m, scale)
    draw_line(image, tick[0], tick[1], color, 2)
    velocity = box[7:9]
    if np.all(np.isfinite(velocity)) and np.linalg.norm(velocity) > 0.5:
        arrow = _to_pixels(np.stack([center, center + velocity]), range_m, scale)
        draw_line(image, arrow[0], arrow[1], (255, 255, 255), 1)
        cv2.circle(image, tuple(int(v) for v in arrow[1]), 2, (255, 255, 255), -1, cv2.LINE_AA)


def _draw_footprint_dashed(image: Image, box: NDArray[Any], range_m: float, scale: float) -> None:
    corners = _to_pixels(_footprint(box), range_m, scale)
    for start, end in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        _dashed_line(image, start, end, TRUTH_COLOR)
    front = corners[:2].mean(axis=0)
    _dashed_line(image, corners.mean(axis=0), front, TRUTH_COLOR)


def _draw_legend(image: Image, labels: set[int], detections: int, truth: int | None) -> None:
    size = image.shape[0]
    counts = f"{detections} detected (solid)"
    if truth is not None:
        counts += f", {truth} true (dashed)"
    cv2.putText(image, counts, (10, 20), FONT, 0.45, TEXT_COLOR, 1, cv2.LINE_AA)
    x, y = 10, size - 10
    for label in sorted(labels):
        name = CLASS_NAMES[label].replace("_", " ")
        width = 15 + cv2.getTextSize(name, FONT, 0.42, 1)[0][0]
        if x > 10 and x + width > size - 10:
            x, y = 10, y - 18  # next row, above
        cv2.rectangle(image, (x, y - 10), (x + 10, y), class_color(label), -1)
        cv2.putText(image, name, (x + 15, y), FONT, 0.42, TEXT_COLOR, 1, cv2.LINE_AA)
        x += width + 16


def _to_pixels(points_ego: NDArray[Any], range_m: float, scale: float) -> NDArray[Any]:
    """Convert ground points (P, 2) in ego to pixels (P, 2): forward is up, left is left."""
    return np.stack([(range_m - points_ego[:, 1]) * scale, (range_m - points_ego[:, 0]) * scale], axis=-1)


def _dashed_line(image: Image, start: NDArray[Any], end: NDArray[Any], color: Color) -> None:
    """Draw dashes of about 4 px with equal gaps; both ends are dashes, so that corners close."""
    length = float(np.linalg.norm(end - start))
    pieces = max(1, 2 * round(length / 8) + 1) if length < 10_000 else 1
    for piece in range(0, pieces, 2):
        a, b = piece / pieces, (piece + 1) / pieces
        draw_line(image, start + a * (end - start), start + b * (end - start), color, 1)
