# SPDX-License-Identifier: Apache-2.0
"""Colours and fonts of all pictures, and drawing of lines and text."""

from typing import Any, Final

import cv2
import numpy as np
from numpy.typing import NDArray

from ftkd_core.classes import CLASS_NAMES

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
"""RGB colour of each class, also used in RViz and the web page."""
TRUTH_COLOR: Final[Color] = (240, 240, 240)
BACKGROUND: Final[Color] = (22, 26, 32)
GRID_COLOR: Final[Color] = (58, 66, 78)
TEXT_COLOR: Final[Color] = (205, 212, 222)
FONT: Final = cv2.FONT_HERSHEY_SIMPLEX
SUBPIXEL_BITS: Final = 4


def class_color(label: int) -> Color:
    """Return the RGB colour of the class with this index into CLASS_NAMES."""
    return CLASS_COLORS[CLASS_NAMES[label]]


def to_subpixels(points: NDArray[Any]) -> NDArray[np.int32]:
    """Convert pixels to OpenCV's fixed-point coordinates."""
    return np.clip(points * 2**SUBPIXEL_BITS, -1e8, 1e8).round().astype(np.int32)


def draw_line(image: Image, start: NDArray[Any], end: NDArray[Any], color: Color, thickness: int) -> None:
    """Draw an anti-aliased line between two points in pixels."""
    first, second = (tuple(int(v) for v in to_subpixels(point)) for point in (start, end))
    cv2.line(image, first, second, color, thickness, cv2.LINE_AA, SUBPIXEL_BITS)


def draw_outlined_text(
    image: Image, text: str, position: tuple[int, int], scale: float, color: Color
) -> None:
    """Draw text with a black outline."""
    cv2.putText(image, text, position, FONT, scale, (0, 0, 0), 3, cv2.LINE_AA)
    cv2.putText(image, text, position, FONT, scale, color, 1, cv2.LINE_AA)


def draw_label(image: Image, text: str, corner: tuple[int, int], scale: float, color: Color) -> None:
    """Draw text on a dark plate with its upper left corner at `corner`."""
    (width, height), _ = cv2.getTextSize(text, FONT, scale, 1)
    x, y = corner
    cv2.rectangle(image, corner, (x + width + 10, y + height + 10), BACKGROUND, -1)
    cv2.putText(image, text, (x + 5, y + height + 5), FONT, scale, color, 1, cv2.LINE_AA)


def draw_centered_text(image: Image, text: str, scale: float) -> None:
    """Draw text in the centre of the image."""
    (width, height), _ = cv2.getTextSize(text, FONT, scale, 1)
    position = ((image.shape[1] - width) // 2, (image.shape[0] + height) // 2)
    cv2.putText(image, text, position, FONT, scale, TEXT_COLOR, 1, cv2.LINE_AA)
