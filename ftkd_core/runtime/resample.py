# SPDX-License-Identifier: Apache-2.0
"""`preprocess.resize_and_crop` for a GPU, as weighted sums of rows and columns.

Both filters of OpenCV are separable: an output row is a sum of a few input rows with fixed weights, and the
same holds for columns. The taps of an image size are computed once. Rows above the crop are neither uploaded
nor read. Symbols: N cameras, h/w camera image, H/W network image, U taps.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ftkd_core.config import ImageConfig


class Taps(NamedTuple):
    """Filter taps along one axis: output i is the sum over u of weight[i, u] * input[source[i, u]]; source
    (I, U) int64, weight (I, U) float32, zero for unused taps."""

    source: NDArray[np.int64]
    weight: NDArray[np.float32]


class ImageTaps(NamedTuple):
    """Taps of one camera image; rows.source counts from `first_row`, the first row that is read."""

    rows: Taps
    columns: Taps
    first_row: int


def image_taps(config: ImageConfig, width: int, height: int) -> ImageTaps:
    """Compute the taps that turn a width x height camera image into the network image."""
    scaled_height = round(height * config.width / width)
    shrinks = config.width < width
    rows, columns = axis_taps(height, scaled_height, shrinks), axis_taps(width, config.width, shrinks)
    cut = scaled_height - config.height
    if cut < 0:  # too flat, so black rows are added on top
        padding = np.zeros((-cut, rows.source.shape[1]))
        rows = Taps(
            np.concatenate([padding.astype(np.int64), rows.source]),
            np.concatenate([padding.astype(np.float32), rows.weight]),
        )
    else:
        rows = Taps(rows.source[cut:], rows.weight[cut:])
    first = int(rows.source.min())
    return ImageTaps(Taps(rows.source - first, rows.weight), columns, first)


def axis_taps(size: int, scaled: int, shrinks: bool) -> Taps:
    """Compute the taps (scaled, U) of `size` pixels scaled to `scaled`: area-averaging if the image shrinks,
    else bilinear (OpenCV's INTER_AREA and INTER_LINEAR)."""
    scale = size / scaled
    cells = np.arange(scaled)[:, None]
    if shrinks:
        low, high = cells * scale, np.minimum((cells + 1) * scale, size)
        index = np.floor(low).astype(np.int64) + np.arange(int(np.ceil(scale)) + 1)
        overlap = np.minimum(high, index + 1) - np.maximum(low, index)
        weight = np.where(overlap > 1e-3, overlap, 0.0)  # OpenCV ignores such small overlaps as well
        weight /= weight.sum(1, keepdims=True)
    else:
        center = np.clip((cells + 0.5) * scale - 0.5, 0, size - 1)
        low = np.floor(center)
        index = low.astype(np.int64) + np.arange(2)
        weight = np.concatenate([1 - (center - low), center - low], axis=1)
    return Taps(np.clip(index, 0, size - 1), weight.astype(np.float32))


class BatchTaps(NamedTuple):
    """Taps of N camera images, padded to a common shape: indices (N, H, U) and (N, W, U) int64, weights of
    the same shapes."""

    row_index: Tensor
    row_weight: Tensor
    column_index: Tensor
    column_weight: Tensor


def batch_taps(taps: list[ImageTaps], device: torch.device) -> BatchTaps:
    """Move the taps of several cameras, whose images may differ in size, to a device."""

    def padded(values: list[NDArray[np.int64]] | list[NDArray[np.float32]]) -> Tensor:
        most = max(value.shape[1] for value in values)
        return torch.stack([F.pad(torch.from_numpy(v), (0, most - v.shape[1])) for v in values]).to(device)

    return BatchTaps(
        padded([t.rows.source for t in taps]), padded([t.rows.weight for t in taps]),
        padded([t.columns.source for t in taps]), padded([t.columns.weight for t in taps]),
    )  # fmt: skip


def resample(raw: Tensor, taps: BatchTaps, mask: Tensor) -> Tensor:
    """Return network images (N, H, W, 3) uint8 of camera images raw (N, h, w, 3) uint8; black where mask (N,)
    is False.

    Halves are rounded up, as in OpenCV. The result equals `preprocess.resize_and_crop` up to one grey level.
    """
    scaled = _weighted(raw.transpose(1, 2), taps.column_index, taps.column_weight)  # (N, W, h, 3)
    images = _weighted(scaled.transpose(1, 2), taps.row_index, taps.row_weight)  # (N, H, W, 3)
    return torch.where(mask[:, None, None, None], (images + 0.5).floor(), 0.0).to(torch.uint8)


def _weighted(values: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """Return weighted sums (N, I, ., 3) of rows of values (N, ., ., 3) selected by index (N, I, U)."""
    shape = (*index.shape[:2], *values.shape[2:])
    result = values.new_zeros(shape, dtype=torch.float32)
    for tap in range(index.shape[2]):
        chosen = values.gather(1, index[:, :, tap, None, None].expand(shape))
        result = result + weight[:, :, tap, None, None] * chosen.float()
    return result
