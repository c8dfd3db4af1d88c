# SPDX-License-Identifier: Apache-2.0
"""Sliding-window training of the streaming student: every step sees whole windows from their first frame on.

Streaming training serves one frame a step and carries the memory over; it is the faster of the two, and
neighbouring steps see neighbouring frames. Here every step starts anew, runs the frames before the last
`graded` for the memory alone, and learns from the last. Source: StreamPETR's two modes
(exiawsh/StreamPETR, `stream_petr_*_90e` against `*_seq_*`); the mean over graded frames is ours (upstream:
their sum).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ftkd_core.data.clips import StreamBatch, StreamDataset
from ftkd_core.data.windows import PairedDataset
from ftkd_core.models.memory import Memory
from ftkd_core.models.stream_petr import StreamPETR
from training.feature_cache import network_input
from training.tasks import CachedDataset, Distiller, State, StreamLesson


class SlidingDataset(Dataset[list[Any]]):
    """Item `step` is the list of `length` frames that make the step's windows, oldest first; the last
    `graded` come with what a teacher says of them, if items hold that. items serves segments of that length
    whose streams all start together."""

    def __init__(
        self, items: StreamDataset | PairedDataset | CachedDataset, length: int, graded: int = 1
    ) -> None:
        self.items, self.length, self.graded = items, length, graded

    def __getitem__(self, step: int) -> list[Any]:
        frames = self.items if isinstance(self.items, StreamDataset) else self.items.streams
        first, taught = step * self.length, self.length - self.graded
        return [(self.items if k >= taught else frames)[first + k] for k in range(self.length)]


class SlidingLesson(StreamLesson):
    """StreamPETR on a window of frames of each of B scenes; nothing is carried from step to step."""

    def __init__(
        self, detector: StreamPETR, streams: int, distiller: Distiller | None = None, graded: int = 1,
        grid_mask: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__(detector, streams, distiller, grid_mask)
        self.graded = graded

    def forward(
        self, batch: Sequence[Any], state: State, generator: torch.Generator
    ) -> tuple[dict[str, Tensor], State]:
        before, graded = batch[: -self.graded], batch[-self.graded :]
        now = self._remember(before, self.start_state())
        sums: dict[str, Tensor] = {}
        for item in graded:
            terms, now = super().forward(item, now, generator)
            for name, value in terms.items():
                sums[name] = sums.get(name, torch.zeros_like(value)) + value / len(graded)
        return sums, state

    @torch.no_grad()
    def _remember(self, items: Sequence[StreamBatch], state: State) -> State:
        """The state after frames that teach nothing: batch norms, dropout and images as at inference
        (upstream)."""
        modes = {module: module.training for module in self.detector.modules()}
        self.detector.eval()
        kept = len(Memory._fields)
        for seen in items:
            frame = seen.frame(network_input(seen.images, self.detector.config.image))
            predictions, memory = self.detector(frame, Memory(*state[:kept]))
            state = (*memory, *(predictions.image_features.float() for _ in state[kept:]))
        for module, mode in modes.items():  # a backbone that learns nothing was in eval mode before
            module.training = mode
        return state
