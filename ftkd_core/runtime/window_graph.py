# SPDX-License-Identifier: Apache-2.0
"""A SparseBEV without future frames as a pure function of float32 tensors, the form in which it is exported.

The memory is an input and an output: maps, cameras and times of the past frames, newest first. Cameras are in
the vehicle frame of the previous round and times are relative to it, so float32 is exact enough anywhere on
Earth (compare `streaming_graph`). Symbols: N cameras, H/W network image, P past frames, C channels, h/w size
of a pyramid level, D detections."""

import torch
from torch import Tensor, nn

from ftkd_core.config import SparseBEVConfig
from ftkd_core.geometry import full_precision, invert_rigid
from ftkd_core.models.feature_ring import WindowFeatures
from ftkd_core.models.predictions import decode
from ftkd_core.models.sparse_bev import SparseBEV
from ftkd_core.runtime.preprocess import normalise
from ftkd_core.types import CameraRig


def window_memory_names(config: SparseBEVConfig) -> tuple[str, ...]:
    """Return the names of the memory's tensors; () for a model without past frames."""
    if not config.num_past:
        return ()
    maps = (f"memory_level{level}" for level in range(config.decoder.levels))
    return (*maps, "memory_intrinsics", "memory_ego_from_camera", "memory_mask", "memory_time")


class WindowGraph(nn.Module):
    """One round: images (N, H, W, 3) uint8 RGB; previous_from_current (4, 4), the current vehicle frame in
    that of the previous round; elapsed_s (1,) since then; is_first (1,) bool; intrinsics (N, 3, 3),
    ego_from_camera (N, 4, 4), camera_mask (N,) bool; the memory: maps (P, N, C, h, w) of each level,
    intrinsics (P, N, 3, 3), ego_from_camera (P, N, 4, 4), mask (P, N) bool, time (P,) -> boxes (D, 9) in the
    current vehicle frame, scores (D,), labels (D,) int64, and the memory for the next round."""

    def __init__(self, model: SparseBEV, max_detections: int) -> None:
        super().__init__()
        self.model, self.max_detections = model, max_detections

    def forward(
        self, images: Tensor, previous_from_current: Tensor, elapsed_s: Tensor, is_first: Tensor,
        intrinsics: Tensor, ego_from_camera: Tensor, camera_mask: Tensor, *memory: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        pyramid = self.model.extract(normalise(images)[None])
        maps = [level[0] for level in pyramid]
        newest = (*maps, intrinsics, ego_from_camera, camera_mask, torch.zeros_like(elapsed_s[0]))
        past = move_past(memory, previous_from_current, elapsed_s)
        window = [new[None] for new in newest]
        if memory:
            pairs = zip(newest, past, strict=True)
            window = [torch.cat([new[None], _first_or(is_first, new, old)]) for new, old in pairs]
        levels, cameras = window[: len(maps)], CameraRig(*(value[None] for value in window[-4:-1]))
        features = WindowFeatures(tuple(level[None] for level in levels), cameras, window[-1][None])
        found = decode(self.model.decode_window(features), self.max_detections)
        kept = [value[:-1] for value in window] if memory else []
        return found.boxes[0], found.scores[0], found.labels[0], *kept


def _first_or(is_first: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """Return old (P, ...), or copies of new (...) in the first round of a stream."""
    first = is_first.view(-1, *[1] * new.ndim)
    if new.dtype == torch.bool:  # ONNX Runtime has no Where of bool on a CPU
        return (first & new) | (~first & old)
    return torch.where(first, new, old)


@full_precision
def move_past(memory: tuple[Tensor, ...], pose: Tensor, elapsed_s: Tensor) -> tuple[Tensor, ...]:
    """Return a memory with its cameras in the frame whose pose (4, 4) in the memory's own frame is given, and
    its times counted from `elapsed_s` (1,)."""
    if not memory:
        return ()
    *unchanged, ego_from_camera, mask, time = memory
    return (*unchanged, invert_rigid(pose) @ ego_from_camera, mask, time - elapsed_s)


def start_window_memory(model: SparseBEV) -> tuple[Tensor, ...]:
    """Return the memory before the first round, zeros of the shapes of a memory."""
    config, count = model.config, model.config.num_past
    if not count:
        return ()
    cameras, image = len(config.channels), config.image
    with torch.no_grad():
        maps = model.extract(torch.zeros(1, cameras, 3, image.height, image.width))
    return (
        *(level[0].new_zeros(count, *level.shape[1:]) for level in maps),
        torch.zeros(count, cameras, 3, 3),
        torch.eye(4).repeat(count, cameras, 1, 1),
        torch.zeros(count, cameras, dtype=torch.bool),
        torch.zeros(count),
    )
