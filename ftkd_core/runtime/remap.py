# SPDX-License-Identifier: Apache-2.0
"""Resampling of a camera image through a geometric map, without aliasing.

`cv2.remap` reads single points of the image, which aliases when the image shrinks. Therefore the image is
first shrunk by whole pixels (area average) and the map is read at twice the output's resolution and averaged.
The intermediate images have about the density of the points that are read. docs/explanation/cameras.md has
the measured differences from a reference. Symbols: h/w camera image, H/W output image.
"""

from collections.abc import Callable
from typing import Final

import cv2
import numpy as np
from numpy.typing import NDArray

from ftkd_core.config import TOKEN_STRIDE

Array = NDArray[np.float64]
PixelMap = Callable[[Array], tuple[Array, NDArray[np.bool_]]]
"""Function from output pixels (P, 2) to camera pixels (P, 2) and whether the camera sees them (P,). Pixel
centres lie at .5."""

_OVERSAMPLING: Final = 2
_MAX_STEP: Final = 1.5  # pixels of the shrunk image between two points that are read


class ImageRemap:
    """Turns camera images of one size into output images (H, W, 3).

    visible (H/16, W/16) float32: share of each token's cell that the camera sees; share: of the whole output.
    window (left, top, right, bottom): part of the camera image that is read; shrink: factor of its area
    average; oversampling: points per output pixel and axis (`device_remap` has the same steps for a GPU).
    Output pixels that the camera does not see repeat the border of its image: a black border is an edge that
    the weights have never seen (pitch -2 degrees: mAP 0.23 with a black border, 0.31 with this one, 0.31 on
    the trained rig; one scene of 12 s).
    """

    def __init__(self, pixel_map: PixelMap, source: tuple[int, int], output: tuple[int, int]) -> None:
        """source, output: width and height of camera and output images."""
        self.source, (width, height) = source, output
        scale = _scale(pixel_map, source, output)
        self.oversampling = _OVERSAMPLING if scale > 1.0 else 1
        self.shrink = max(1, round(scale / self.oversampling / _MAX_STEP + 0.499))
        pixels, seen = _sample(pixel_map, source, output, self.oversampling)
        cells = TOKEN_STRIDE * self.oversampling
        shape = (height // TOKEN_STRIDE, cells, width // TOKEN_STRIDE, cells)
        self.visible: NDArray[np.float32] = seen.reshape(shape).mean(axis=(1, 3), dtype=np.float32)
        self.share = float(seen.mean())
        self.window = _window(pixels[seen] if seen.any() else np.zeros((1, 2)), source, self.shrink)
        left, top, _, _ = self.window
        positions = (np.clip(pixels, 0, source) - (left, top)) / self.shrink - 0.5
        maps = positions.astype(np.float32)
        self._maps = cv2.convertMaps(maps[..., 0], maps[..., 1], cv2.CV_16SC2)
        self.output = output

    def positions(self) -> NDArray[np.float32]:
        """Return the positions (H S, W S, 2) in the shrunk window that are read, in whole 32nds of pixels.

        The centre of the first pixel is at 0."""
        whole, fraction = (np.asarray(values, dtype=np.int64) for values in self._maps)
        parts = np.stack([fraction & 31, fraction >> 5], axis=-1)
        return np.asarray(whole + parts / np.float32(32), dtype=np.float32)

    def __call__(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return the output image of a camera image (h, w, 3) uint8."""
        left, top, right, bottom = self.window
        part = image[top:bottom, left:right]
        if self.shrink > 1:
            size = (part.shape[1] // self.shrink, part.shape[0] // self.shrink)
            part = cv2.resize(part, size, interpolation=cv2.INTER_AREA)  # type: ignore[assignment]
        result = cv2.remap(part, *self._maps, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        if self.oversampling > 1:
            result = cv2.resize(result, self.output, interpolation=cv2.INTER_AREA)
        return np.asarray(result, dtype=np.uint8)


def _sample(
    pixel_map: PixelMap, source: tuple[int, int], output: tuple[int, int], oversampling: int
) -> tuple[Array, NDArray[np.bool_]]:
    """Return camera pixels (rows, columns, 2) of the points of the output and whether they lie in the
    image."""
    columns = (np.arange(output[0] * oversampling) + 0.5) / oversampling
    rows = (np.arange(output[1] * oversampling) + 0.5) / oversampling
    grid = np.stack(np.meshgrid(columns, rows), axis=-1)
    pixels, seen = pixel_map(grid.reshape(-1, 2))
    seen = seen & np.isfinite(pixels).all(axis=1)
    pixels = np.where(seen[:, None], pixels, 0.0)
    seen &= ((pixels >= 0) & (pixels <= source)).all(axis=1)
    return pixels.reshape(grid.shape), seen.reshape(grid.shape[:2])


def _scale(pixel_map: PixelMap, source: tuple[int, int], output: tuple[int, int]) -> float:
    """Return the median distance in camera pixels between neighbouring output pixels that the camera sees; 1
    if it sees none."""
    pixels, seen = _sample(pixel_map, source, output, 1)
    both = seen[:-1, :-1] & seen[1:, :-1] & seen[:-1, 1:]
    if not both.any():
        return 1.0
    right, down = pixels[:-1, 1:] - pixels[:-1, :-1], pixels[1:, :-1] - pixels[:-1, :-1]
    area = np.abs(right[..., 0] * down[..., 1] - right[..., 1] * down[..., 0])
    return float(np.sqrt(np.median(area[both])))


def _window(pixels: Array, source: tuple[int, int], shrink: int) -> tuple[int, int, int, int]:
    """Return (left, top, right, bottom) of the part of the image that is read; its sides are multiples of
    `shrink`."""
    margin = 2 * shrink
    low = np.maximum(np.floor(pixels.min(axis=0)).astype(int) - margin, 0)
    high = np.minimum(np.ceil(pixels.max(axis=0)).astype(int) + margin, source)
    low = np.maximum(high - -(-(high - low) // shrink) * shrink, 0)
    high = low + np.maximum((high - low) // shrink, 1) * shrink
    return int(low[0]), int(low[1]), int(high[0]), int(high[1])
