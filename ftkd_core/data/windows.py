# SPDX-License-Identifier: Apache-2.0
"""Windows of past and future frames around a current frame, for SparseBEV, and pairs of stream and window for
distillation.

A window never leaves its clip, and a clip is one scene: at the ends of the scene the first or last frame is
repeated and `real` is False. The public SparseBEV loader has no such check; about one in six of its samples
contains images of the next scene. Symbols: B batch, T frames (current, past, future), N cameras.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ftkd_core.data.augmentation import Augmentation, AugmentConfig, draw_augmentation, in_view
from ftkd_core.data.clips import Clip, StreamBatch, StreamDataset, make_sample
from ftkd_core.data.order import EpochOrder
from ftkd_core.geometry import invert_rigid
from ftkd_core.types import CameraRig, FrameWindow, Targets, pad_targets


class WindowBatch(NamedTuple):
    """Batch of windows: images (B, T, N, H, W, 3) uint8; rig (B, T, N, ...) in the current ego frame; time
    (B, T) seconds relative to the current frame; real (B, T) bool, False for repeated frames; targets of the
    current frame."""

    images: Tensor
    rig: CameraRig
    time: Tensor
    real: Tensor
    targets: Targets

    def window(self, images: Tensor) -> FrameWindow:
        """Return the network's input for normalised images (B, T, N, 3, H, W)."""
        return FrameWindow(images, self.rig, self.time)


def window_order(
    index: int, length: int, num_past: int, num_future: int, stride: int = 1
) -> tuple[list[int], list[bool]]:
    """Return the frame numbers of the window around frame `index` of a scene of `length` frames (current,
    past newest first, future nearest first, `stride` apart) and a flag for each that is False for a repeated
    frame.

    Raises ValueError for an index outside the scene.
    """
    if not 0 <= index < length:
        raise ValueError(f"frame {index} of a scene of {length} frames; expected 0 .. {length - 1}")
    wanted = [index, *(index - step * stride for step in range(1, num_past + 1))]
    wanted += [index + step * stride for step in range(1, num_future + 1)]
    return [min(max(frame, 0), length - 1) for frame in wanted], [0 <= frame < length for frame in wanted]


def draw_stride(
    sweeps: tuple[int, int], earlier: int, num_past: int, num_future: int, random: np.random.Generator
) -> int:
    """Draw the distance between the frames of a window that has `earlier` camera rounds before it.

    As SparseBEV's code: between the two numbers of `sweeps`; without future frames, and near the start of a
    scene, at most so far that all past frames exist, but at least 1.
    """
    least, most = sweeps
    if not num_future and num_past:
        most = max(1, min(most, earlier // num_past))
    return int(random.integers(min(least, most), most + 1))


def make_window(
    clip: Clip, index: int, augmentation: Augmentation, num_past: int, num_future: int, stride: int = 1
) -> WindowBatch:
    """Make the window around frame `index` of the clip as a batch of 1, with one augmentation for all
    frames; they are `stride` frames of the clip apart."""
    order, real = window_order(index, len(clip.times), num_past, num_future, stride)
    made = {frame: make_sample(clip, frame, augmentation, True) for frame in set(order)}
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


def hide_future(window: WindowBatch, num_past: int) -> WindowBatch:
    """Return windows (B, T) in which the current frame replaces every future frame: its images and rig, time
    0, `real` False."""
    first, future = 1 + num_past, window.time.shape[1] - 1 - num_past
    rig = CameraRig(*(value[:, :first] for value in window.rig))
    past = WindowBatch(
        window.images[:, :first], rig, window.time[:, :first], window.real[:, :first], window.targets
    )
    return add_hidden_future(past, future)


def add_hidden_future(window: WindowBatch, count: int) -> WindowBatch:
    """Return windows without future frames with `count` hidden ones added: repetitions of the current frame,
    `real` False."""

    def extended(value: Tensor) -> Tensor:
        return torch.cat([value, value[:, :1].expand(-1, count, *value.shape[2:])], dim=1)

    rig = CameraRig(*(extended(value) for value in window.rig))
    real = torch.cat([window.real, window.real.new_zeros(len(window.real), count)], dim=1)
    return WindowBatch(extended(window.images), rig, extended(window.time), real, window.targets)


def collate_windows(windows: list[WindowBatch]) -> WindowBatch:
    """Concatenate windows to one batch; object slots are padded to the largest number."""
    slots = max(1, *(window.targets.labels.shape[1] for window in windows))
    padded = [pad_targets(window.targets, slots) for window in windows]
    targets = Targets(*(torch.cat(values) for values in zip(*padded, strict=True)))
    rig = CameraRig(*(torch.cat(values) for values in zip(*(w.rig for w in windows), strict=True)))
    images, times, real = (
        torch.cat([getattr(w, name) for w in windows]) for name in ("images", "time", "real")
    )
    return WindowBatch(images, rig, times, real, targets)


class WindowDataset(Dataset[WindowBatch]):
    """Batches of windows; item `step` depends only on (seed, rank, step). Windows are random or, with an
    `order` of segments of one frame, the next ones in that order that no other of `ranks` processes uses. The
    future of a window is hidden with probability `hide_future`. sweeps as in `draw_stride`: the frames of the
    clips are camera rounds; (0, 0) takes consecutive frames."""

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
        hide_future: float = 0.0,
        sweeps: tuple[int, int] = (0, 0),
    ) -> None:
        if num_clips < 1 or batch < 1:
            raise ValueError(f"{num_clips} clips, batch {batch}: expected at least 1 of each")
        if order is not None:
            order.require(num_clips, 1)
        self._load = lru_cache(maxsize=16)(load)
        self.num_clips, self.batch = num_clips, batch
        self.num_past, self.num_future = num_past, num_future
        self.augment, self.seed, self.rank, self.ranks, self.order = augment, seed, rank, ranks, order
        self.hide_future, self.sweeps = hide_future, sweeps

    def __getitem__(self, step: int) -> WindowBatch:
        return collate_windows([self._window(step, place) for place in range(self.batch)])

    def _window(self, step: int, place: int) -> WindowBatch:
        chosen = self.select(step, place)
        clip, frame, augmentation, stride = chosen.clip, chosen.frame, chosen.augmentation, chosen.stride
        if not chosen.hidden:
            return make_window(clip, frame, augmentation, self.num_past, self.num_future, stride)
        past = make_window(clip, frame, augmentation, self.num_past, 0, stride)
        return add_hidden_future(past, self.num_future)

    def select(self, step: int, place: int) -> "WindowChoice":
        """Select the window at a place of the batch of a step; depends only on (seed, rank, step, place)."""
        random = np.random.default_rng([self.seed, self.rank, step, place])
        if self.order is None:
            number = int(random.integers(self.num_clips))
            clip = self._load(number)
            key = int(random.integers(clip.num_keys))
        else:
            number, key = self.order((step * self.ranks + self.rank) * self.batch + place)
            clip = self._load(number)
        augmentation = draw_augmentation(self.augment, random)
        frame = key if clip.keys is None else int(clip.keys[key])
        hidden = random.random() < self.hide_future
        stride, view = 1, 0
        if self.sweeps != (0, 0):
            stride = draw_stride(self.sweeps, frame, self.num_past, self.num_future, random)
        if self.augment.views:
            view = int(random.integers(self.augment.views))
            augmentation = in_view(augmentation, self.augment, number, view)
        return WindowChoice(clip, frame, augmentation, stride, hidden, number, key, view)


class WindowChoice(NamedTuple):
    """Window around frame `frame` of a clip, its augmentation and the distance of its frames; hidden: without
    its future. clip_index: index of the clip in its source; key: the frame's number among the key frames;
    view: number of the augmentation among `AugmentConfig.views`."""

    clip: Clip
    frame: int
    augmentation: Augmentation
    stride: int
    hidden: bool
    clip_index: int
    key: int
    view: int


def without_color_change(augmentation: Augmentation) -> Augmentation:
    """Return the augmentation without its colour change."""
    plain = Augmentation()
    return augmentation._replace(gain=plain.gain, offset=plain.offset, distortion=0.0)


class PairedDataset(Dataset[tuple[StreamBatch, WindowBatch]]):
    """Pairs of a stream batch and the windows of the teacher around each of its frames.

    The teacher sees the same mirrored and rotated world, without colour changes and with all cameras [ours].
    """

    def __init__(self, streams: StreamDataset, num_past: int, num_future: int) -> None:
        self.streams, self.num_past, self.num_future = streams, num_past, num_future

    def __getitem__(self, step: int) -> tuple[StreamBatch, WindowBatch]:
        chosen = [self.streams.select_frame(stream, step) for stream in self.streams.streams]
        windows = [
            make_window(c.clip, c.frame, without_color_change(c.augmentation), self.num_past, self.num_future)
            for c in chosen
        ]
        return self.streams[step], collate_windows(windows)
