# SPDX-License-Identifier: Apache-2.0
"""A SparseBEV over a whole clip: neighbouring windows share their frames, so each frame's features are
extracted once. With 7 frames a window that is a seventh of the backbone's work."""

from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

import torch
from lightning_fabric.utilities import move_data_to_device
from torch import Tensor

from ftkd_core.data.augmentation import Augmentation
from ftkd_core.data.clips import Clip, make_sample
from ftkd_core.data.windows import WindowBatch, collate_windows, make_window, window_order
from ftkd_core.models.predictions import Predictions
from ftkd_core.models.sparse_bev import SparseBEV, WindowFeatures
from training.feature_cache import network_input


class WindowView(NamedTuple):
    """Windows around some frames of a clip, on the model's device, and what the model says of them; pyramid
    as `SparseBEV.forward` returns it, (B, T, N, C, H, W) a level."""

    windows: WindowBatch
    predictions: Predictions
    pyramid: tuple[Tensor, ...]


PYRAMID_STRIDES: Final = (32, 16, 8, 4)
"""Of the levels of a SparseBEV that are maps of their own, from the coarsest, which all have."""


def by_stride(pyramid: Sequence[Tensor]) -> dict[int, Tensor]:
    """The maps of a pyramid, finest first and stride 32 last, by stride."""
    return dict(zip(PYRAMID_STRIDES, reversed(pyramid[:4]), strict=False))


@torch.no_grad()
def view_clip(model: SparseBEV, clip: Clip, batch: int = 4) -> Iterator[WindowView]:
    """All frames of a clip in order, `batch` windows at a time, as the clip shows them; the same as the model
    on each window alone (a test says so). The model stays in its mode; teachers are in eval mode."""
    config = model.config
    device = model.query_boxes.device
    length = len(clip.times)
    frames = [make_sample(clip, index, Augmentation(), True).images for index in range(length)]
    levels = [model.extract(network_input(images.to(device), config.image)) for images in frames]
    pyramid = tuple(torch.cat(level) for level in zip(*levels, strict=True))  # (F, N, C, H, W) each
    for first in range(0, length, batch):
        chosen = range(first, min(first + batch, length))
        windows = move_data_to_device(
            collate_windows(
                [make_window(clip, i, Augmentation(), config.num_past, config.num_future) for i in chosen]
            ),
            device,
        )
        order = [window_order(i, length, config.num_past, config.num_future)[0] for i in chosen]
        index = torch.tensor(order, device=device)
        seen = tuple(level[index] for level in pyramid)  # (B, T, N, C, H, W)
        predictions = model.decode_window(WindowFeatures(seen, windows.rig, windows.time))
        yield WindowView(windows, predictions, seen)
