# SPDX-License-Identifier: Apache-2.0
"""Windows of past and future frames around a current one, for SparseBEV as teacher or student, and the pairs
of stream and window that distillation trains on.

A window never leaves its clip, and a clip is one scene: where the scene begins or ends, its first or last
frame is repeated, and `real` says so. (Upstream's loader has no such check: about one sample in six is given
images of the next scene.) Symbols: B batch, T frames (current, past, future), J future frames, N cameras.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ftkd_core.data.augmentation import Augmentation, AugmentConfig, draw_augmentation
from ftkd_core.data.clips import Clip, StreamBatch, StreamDataset, make_sample
from ftkd_core.data.order import EpochOrder
from ftkd_core.geometry import invert_rigid
from ftkd_core.types import CameraRig, FrameWindow, Targets, pad_targets


class WindowBatch(NamedTuple):
    """images (B, T, N, H, W, 3) uint8; rig (B, T, N, ...) in the current ego frame; time (B, T) seconds from
    the current frame; real (B, T) bool, False for repeated frames; targets of the current frame."""

    images: Tensor
    rig: CameraRig
    time: Tensor
    real: Tensor
    targets: Targets

    def window(self, images: Tensor) -> FrameWindow:
        """The window once its images are normalised, (B, T, N, 3, H, W)."""
        return FrameWindow(images, self.rig, self.time)


def window_order(index: int, length: int, num_past: int, num_future: int) -> tuple[list[int], list[bool]]:
    """Frames of the window around frame `index` of a scene of `length` frames: current, past newest first,
    future nearest first; and which of them are frames of their own.

    Errors: ValueError for an index outside.
    """
    if not 0 <= index < length:
        raise ValueError(f"frame {index} of a scene of {length} frames; expected 0 .. {length - 1}")
    wanted = [index, *(index - step for step in range(1, num_past + 1))]
    wanted += [index + step for step in range(1, num_future + 1)]
    return [min(max(frame, 0), length - 1) for frame in wanted], [0 <= frame < length for frame in wanted]


def make_window(clip: Clip, index: int, change: Augmentation, num_past: int, num_future: int) -> WindowBatch:
    """The window around frame `index` of the clip as a batch of one; all frames under one augmentation."""
    order, real = window_order(index, len(clip.times), num_past, num_future)
    made = {frame: make_sample(clip, frame, change, True) for frame in set(order)}
    frames = [made[frame] for frame in order]
    now = frames[0]
    ego_from_global = invert_rigid(now.global_from_ego)
    extrinsics = [
        ((ego_from_global @ frame.global_from_ego)[:, None] @ frame.rig.ego_from_camera.double()).float()
        for frame in frames
    ]
    rig = CameraRig(
        torch.stack([frame.rig.intrinsics for frame in frames], dim=1),
        torch.stack(extrinsics, dim=1),
        torch.stack([frame.rig.mask for frame in frames], dim=1),
    )
    return WindowBatch(
        torch.stack([frame.images for frame in frames], dim=1),
        rig,
        torch.stack([(frame.time - now.time).float() for frame in frames], dim=1),
        torch.tensor([real]),
        now.targets,
    )


def collate_windows(windows: list[WindowBatch]) -> WindowBatch:
    """One batch of several windows; object slots are padded to the largest number."""
    slots = max(1, *(window.targets.labels.shape[1] for window in windows))
    padded = [pad_targets(window.targets, slots) for window in windows]
    targets = Targets(*(torch.cat(values) for values in zip(*padded, strict=True)))
    rig = CameraRig(*(torch.cat(values) for values in zip(*(w.rig for w in windows), strict=True)))
    images, times, real = (
        torch.cat([getattr(w, name) for w in windows]) for name in ("images", "time", "real")
    )
    return WindowBatch(images, rig, times, real, targets)


class WindowDataset(Dataset[WindowBatch]):
    """Item `step` is a batch of windows; what a step serves is a function of (seed, rank, step). They are
    random ones, or, with `order` of segments of one frame, the next that no other of `ranks` has."""

    def __init__(
        self,
        load: Callable[[int], Clip],
        num_clips: int,
        *,
        batch: int,
        num_past: int,
        num_future: int,
        augment: AugmentConfig,
        seed: int,
        rank: int = 0,
        ranks: int = 1,
        order: EpochOrder | None = None,
    ) -> None:
        if num_clips < 1 or batch < 1:
            raise ValueError(f"{num_clips} clips, batch {batch}: expected at least 1 of each")
        if order is not None:
            order.require(num_clips, 1)
        self._load = lru_cache(maxsize=16)(load)
        self.num_clips, self.batch = num_clips, batch
        self.num_past, self.num_future = num_past, num_future
        self.augment, self.seed, self.rank, self.ranks, self.order = augment, seed, rank, ranks, order

    def __getitem__(self, step: int) -> WindowBatch:
        return collate_windows([self._window(step, place) for place in range(self.batch)])

    def _window(self, step: int, place: int) -> WindowBatch:
        random = np.random.default_rng([self.seed, self.rank, step, place])
        if self.order is None:
            clip = self._load(int(random.integers(self.num_clips)))
            index = int(random.integers(len(clip.times)))
        else:
            number, index = self.order((step * self.ranks + self.rank) * self.batch + place)
            clip = self._load(number)
        change = draw_augmentation(self.augment, random)
        return make_window(clip, index, change, self.num_past, self.num_future)


def in_true_colours(change: Augmentation) -> Augmentation:
    """The same world from the same images, their colours as they are."""
    plain = Augmentation()
    return change._replace(gain=plain.gain, offset=plain.offset)


class PairedDataset(Dataset[tuple[StreamBatch, WindowBatch]]):
    """Item `step` is a stream batch and the teacher's window around each of its frames.

    The teacher sees the same mirrored and turned world, in true colours and with every camera [ours].
    """

    def __init__(self, streams: StreamDataset, num_past: int, num_future: int) -> None:
        self.streams, self.num_past, self.num_future = streams, num_past, num_future

    def __getitem__(self, step: int) -> tuple[StreamBatch, WindowBatch]:
        chosen = [self.streams.choose(stream, step) for stream in self.streams.streams]
        windows = [
            make_window(c.clip, c.frame, in_true_colours(c.change), self.num_past, self.num_future)
            for c in chosen
        ]
        return self.streams[step], collate_windows(windows)
