# SPDX-License-Identifier: Apache-2.0
"""Numbers of a round (pose, time, rig) as one vector, so that one asynchronous copy transfers them to the
device.

Layout, float64: global_from_ego (16), time (1), is_first (1), then for N cameras intrinsics (9 N),
ego_from_camera (16 N), mask (N).
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ftkd_core.types import CameraRig

RigKey = bytes


def pack_header(
    rig: CameraRig, global_from_ego: NDArray[np.float64], time_s: float, is_first: bool
) -> NDArray[np.float64]:
    """Pack a rig of batch 1 on the CPU and the pose and time of the round into a header (18 + 26 N,)."""
    parts = [np.asarray(global_from_ego, dtype=np.float64), np.array([time_s, is_first])]
    parts += [value.double().numpy() for value in rig]
    return np.concatenate([part.reshape(-1) for part in parts])


def unpack_header(header: Tensor, cameras: int) -> tuple[Tensor, CameraRig, Tensor, Tensor]:
    """Return global_from_ego (1, 4, 4) float64, rig (float32), time (1,) float64 and is_first (1,) bool on
    the header's device."""
    sizes = [16, 1, 1, 9 * cameras, 16 * cameras, cameras]
    pose, time, first, intrinsics, extrinsics, mask = torch.split(header, sizes)
    rig = CameraRig(
        intrinsics.float().view(1, cameras, 3, 3), extrinsics.float().view(1, cameras, 4, 4), mask[None] > 0.5
    )
    return pose.view(1, 4, 4), rig, time, first > 0.5


def rig_key(rig: CameraRig) -> RigKey:
    """Return the key under which a rig's geometry is cached: its values rounded to 1e-5 (metres, radians,
    pixels).

    Ego motion causes rounding errors of this size in the extrinsics of a fixed camera.
    """
    return b"".join((np.round(value.double().numpy(), 5) + 0.0).tobytes() for value in rig)


class Header:
    """Static host and device buffers of a header."""

    def __init__(self, cameras: int, device: torch.device) -> None:
        self._host = torch.zeros(18 + 26 * cameras, dtype=torch.float64, pin_memory=device.type == "cuda")
        eyes = [np.eye(4), np.zeros(2), *[np.eye(3)] * cameras, *[np.eye(4)] * cameras, np.ones(cameras)]
        self._host.copy_(torch.from_numpy(np.concatenate([part.reshape(-1) for part in eyes])))
        self.device_values = self._host.to(device, copy=True)

    def upload(self, values: NDArray[np.float64]) -> None:
        """Start to copy a header to the device; the previous copy must have finished."""
        self._host.copy_(torch.from_numpy(values))
        self.device_values.copy_(self._host, non_blocking=True)
