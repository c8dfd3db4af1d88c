# SPDX-License-Identifier: Apache-2.0
"""Features of the frames that a SparseBEV reads: those of a window, and the ring of a stream.

Symbols: B batch, T frames (current first), N cameras, L levels, C channels, H/W size of a level.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ftkd_core.geometry import full_precision, invert_rigid
from ftkd_core.types import CameraRig, Frame


class WindowFeatures(NamedTuple):
    """Input of the decoder: pyramid, L maps (B, T, N, C, H, W), finest first; rig (B, T, N, ...) in the
    current ego frame; time (B, T) seconds relative to the current frame."""

    pyramid: tuple[Tensor, ...]
    rig: CameraRig
    time: Tensor


class FeatureRing(NamedTuple):
    """Features of the newest T frames of a stream, newest first; its size is fixed.

    pyramid, L maps (B, T, N, C, H, W); intrinsics (B, T, N, 3, 3); global_from_camera (B, T, N, 4, 4)
    float64; mask (B, T, N); time (B, T) float64 seconds. Until T frames have arrived, the oldest is repeated.
    """

    pyramid: tuple[Tensor, ...]
    intrinsics: Tensor
    global_from_camera: Tensor
    mask: Tensor
    time: Tensor


@full_precision
def push(ring: FeatureRing | None, pyramid: Sequence[Tensor], frame: Frame, length: int) -> FeatureRing:
    """Return the ring after this frame. If a stream starts (`frame.is_first`, or no ring) it contains this
    frame only."""
    pose = frame.global_from_ego.double()[:, None] @ frame.rig.ego_from_camera.double()  # (B, N, 4, 4)
    newest = FeatureRing(tuple(pyramid), frame.rig.intrinsics, pose, frame.rig.mask, frame.time)

    def filled(new: Tensor, old: Tensor | None) -> Tensor:
        alone = new[:, None].expand(-1, length, *new.shape[1:])
        if old is None:
            return alone.clone()
        pushed = torch.cat([new[:, None], old[:, :-1]], dim=1)
        first = frame.is_first.view(-1, *[1] * (pushed.ndim - 1))
        return torch.where(first, alone, pushed)

    before: Sequence[Tensor | None] = [None] * len(newest.pyramid) if ring is None else ring.pyramid
    maps = tuple(filled(new.detach(), old) for new, old in zip(newest.pyramid, before, strict=True))
    rest = (filled(new, None if ring is None else ring[i]) for i, new in enumerate(newest[1:], start=1))  # type: ignore[arg-type]
    return FeatureRing(maps, *rest)


@full_precision
def ring_window(ring: FeatureRing, frame: Frame) -> WindowFeatures:
    """Return the ring in the current ego frame."""
    ego_from_global = invert_rigid(frame.global_from_ego.double())
    ego_from_camera = (ego_from_global[:, None, None] @ ring.global_from_camera.double()).float()
    time = (ring.time - frame.time[:, None]).float()
    return WindowFeatures(ring.pyramid, CameraRig(ring.intrinsics, ego_from_camera, ring.mask), time)
