# SPDX-License-Identifier: Apache-2.0
"""Sliding-window training of the streaming student: every step processes whole windows from their first
frame.

Streaming training (`tasks.StreamingTask`) serves one frame per step and carries the memory over; it is
faster, and consecutive steps see consecutive frames. Here every step starts with an empty memory, runs the
frames before the last only to fill it, and computes losses on the last. Source: StreamPETR's two modes
(exiawsh/StreamPETR, `stream_petr_*_90e` and `*_seq_*`).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ftkd_core.data.clips import StreamBatch, StreamDataset
from ftkd_core.models.memory import Memory
from training.datasets import StreamingDataset
from training.feature_cache import network_input
from training.tasks import State, StreamingTask, split_item, visible_geometry


class SlidingWindowDataset(Dataset[list[Any]]):
    """Item `step` is the list of `length` frames of the step's windows, oldest first.

    The last is a full item of `items`, with the teacher's part if it has one; the others are frames only.
    `items` must serve segments of `length` frames whose streams all start together.
    """

    def __init__(self, items: StreamingDataset, length: int) -> None:
        self.items, self.length = items, length

    def __getitem__(self, step: int) -> list[Any]:
        frames = self.items if isinstance(self.items, StreamDataset) else self.items.streams
        first, last = step * self.length, (step + 1) * self.length - 1
        return [*(frames[k] for k in range(first, last)), self.items[last]]


class SlidingWindowTask(StreamingTask):
    """StreamPETR on a window of frames of each of B scenes; nothing is carried from step to step."""

    def forward(
        self, batch: Sequence[Any], state: State, generator: torch.Generator
    ) -> tuple[dict[str, Tensor], State]:
        streams = len(split_item(batch[0])[0].is_first)
        filled = self._fill_memory(batch[:-1], self.start_state(streams))
        terms, _ = super().forward(batch[-1], filled, generator)
        return terms, state

    @torch.no_grad()
    def _fill_memory(self, items: Sequence[StreamBatch], state: State) -> State:
        """Return the state after the frames without a loss: batch norms, dropout and images as at inference
        (upstream)."""
        modes = {module: module.training for module in self.detector.modules()}
        self.detector.eval()
        num_fields = len(Memory._fields)
        for batch in items:
            frame = batch.frame(network_input(batch.images))
            geometry = visible_geometry(self.detector, batch)
            predictions, memory = self.detector(frame, Memory(*state[:num_fields]), geometry=geometry)
            state = (*memory, *(predictions.image_features.float() for _ in state[num_fields:]))
        for module, mode in modes.items():  # a frozen backbone stays in eval mode
            module.training = mode
        return state
