# SPDX-License-Identifier: Apache-2.0
"""Run a SparseBEV over all frames of a clip. Each frame's features are extracted once and shared by all
windows that contain it: with seven frames per window, a seventh of the backbone's work."""

from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

import torch
from lightning_fabric.utilities import move_data_to_device
from torch import Tensor

from ftkd_core.data.augmentation import Augmentation
from ftkd_core.data.clips import Clip, make_sample
from ftkd_core.data.windows import WindowBatch, collate_windows, make_window, window_order
from ftkd_core.data.windows import hide_future as with_hidden_future
from ftkd_core.models.feature_ring import WindowFeatures
from ftkd_core.models.predictions import Predictions
from ftkd_core.models.sparse_bev import SparseBEV
from training.feature_cache import network_input


class WindowOutput(NamedTuple):
    """A batch of windows, on the model's device, and the model's output for it; pyramid as
    `SparseBEV.forward` returns it, one tensor (B, T, N, C, H, W) per level."""

    windows: WindowBatch
    predictions: Predictions
    pyramid: tuple[Tensor, ...]


PYRAMID_STRIDES: Final = (32, 16, 8, 4)
"""Strides of the pyramid levels, coarsest first; a SparseBEV with fewer levels has the first of them."""


def by_stride(pyramid: Sequence[Tensor]) -> dict[int, Tensor]:
    """Map stride to level for a pyramid whose finest level comes first and whose last level has stride 32."""
    return dict(zip(PYRAMID_STRIDES, reversed(pyramid[:4]), strict=False))


@torch.no_grad()
def infer_clip(
    model: SparseBEV, clip: Clip, batch: int = 4, *, hide_future: bool = False,
    augmentation: Augmentation | None = None,
) -> Iterator[WindowOutput]:  # fmt: skip
    """Yield the model's output for all frames of a clip in order, `batch` windows at a time, with one
    augmentation for all (default: none); with hide_future the model sees no future frames.

    The output equals that of the model on each window alone. The model's training mode is not changed.
    """
    config = model.config
    device = model.query_boxes.device
    length, change = len(clip.times), augmentation or Augmentation()
    frames = [make_sample(clip, index, change, True).images for index in range(length)]
    levels = [model.extract(network_input(images.to(device))) for images in frames]
    pyramid = tuple(torch.cat(level) for level in zip(*levels, strict=True))  # (T, N, C, H, W) per level
    for first in range(0, length, batch):
        chosen = range(first, min(first + batch, length))
        windows = collate_windows(
            [make_window(clip, i, change, config.num_past, config.num_future) for i in chosen]
        )
        order = [window_order(i, length, config.num_past, config.num_future)[0] for i in chosen]
        if hide_future:
            windows = with_hidden_future(windows, config.num_past)
            order = [[*row[: 1 + config.num_past], *row[:1] * config.num_future] for row in order]
        windows = move_data_to_device(windows, device)
        index = torch.tensor(order, device=device)
        features = tuple(level[index] for level in pyramid)  # (B, T, N, C, H, W) per level
        predictions = model.decode_window(WindowFeatures(features, windows.rig, windows.time))
        yield WindowOutput(windows, predictions, features)
