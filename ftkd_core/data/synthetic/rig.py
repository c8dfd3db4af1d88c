# SPDX-License-Identifier: Apache-2.0
"""Surround rig of the synthetic vehicle: six cameras and a lidar, with nuScenes-like rounded calibration.

Pixels are areas: pixel column i covers [i, i + 1) of the image plane, so scaling an image scales its
intrinsics exactly.
"""

from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ftkd_core.canonical_cameras import CanonicalCamera
from ftkd_core.classes import CAMERA_CHANNELS
from ftkd_core.geometry import make_transform, yaw_transform

LIDAR_OFFSET_S: Final = 0.0431
"""Seconds from the start of a sweep to the stamp of the LIDAR_TOP key frame, which is the stamp of the
sample."""

EGO_FROM_LIDAR: Final[NDArray[np.float64]] = yaw_transform(-np.pi / 2, (0.94, 0.0, 1.84))
"""Mount of LIDAR_TOP: x to the right, y forward, z up."""

# Axes of an optical frame (z forward, x right, y down) that looks along the x axis of its mount.
_MOUNT_FROM_OPTICAL: Final = np.array([[0.0, 0.0, 1.0], [-1.0, 0.0, 0.0], [0.0, -1.0, 0.0]])
_FULL_WIDTH: Final = 1600
_FULL_HEIGHT: Final = 900


@dataclass(frozen=True, kw_only=True)
class _Mount:
    """One camera at 1600x900: position in ego (m), yaw and downward pitch (degrees), focal length and
    principal point (px), exposure offset (s)."""

    position: tuple[float, float, float]
    yaw_deg: float
    pitch_deg: float
    focal: float
    center: tuple[float, float]
    exposure_s: float


_MOUNTS: Final[dict[str, _Mount]] = {
    "CAM_FRONT": _Mount(
        position=(1.70, 0.02, 1.51),
        yaw_deg=0.3,
        pitch_deg=0.0,
        focal=1266.0,
        center=(816.0, 491.0),
        exposure_s=0.0076,
    ),
    "CAM_FRONT_RIGHT": _Mount(
        position=(1.55, -0.49, 1.50),
        yaw_deg=-56.4,
        pitch_deg=0.4,
        focal=1261.0,
        center=(808.0, 495.0),
        exposure_s=0.0155,
    ),
    "CAM_FRONT_LEFT": _Mount(
        position=(1.52, 0.49, 1.51),
        yaw_deg=55.0,
        pitch_deg=0.2,
        focal=1273.0,
        center=(827.0, 480.0),
        exposure_s=0.0,
    ),
    "CAM_BACK": _Mount(
        position=(0.03, 0.00, 1.58),
        yaw_deg=179.9,
        pitch_deg=0.8,
        focal=809.0,
        center=(829.0, 482.0),
        exposure_s=0.0327,
    ),
    "CAM_BACK_LEFT": _Mount(
        position=(1.04, 0.48, 1.59),
        yaw_deg=108.5,
        pitch_deg=0.1,
        focal=1257.0,
        center=(792.0, 493.0),
        exposure_s=0.0426,
    ),
    "CAM_BACK_RIGHT": _Mount(
        position=(1.01, -0.48, 1.56),
        yaw_deg=-110.6,
        pitch_deg=0.9,
        focal=1260.0,
        center=(807.0, 501.0),
        exposure_s=0.0230,
    ),
}


@dataclass(frozen=True, kw_only=True)
class SurroundRig:
    """N calibrated cameras with a common image size.

    channels: one name per camera; width, height in pixels; intrinsics (N, 3, 3); ego_from_camera (N, 4, 4)
    with camera as the optical frame; exposure_offsets_s (N,), seconds after the start of the sweep.
    """

    channels: tuple[str, ...]
    width: int
    height: int
    intrinsics: NDArray[np.float64]
    ego_from_camera: NDArray[np.float64]
    exposure_offsets_s: NDArray[np.float64]

    def resized(self, width: int, height: int, crop_top: int = 0, crop_bottom: int = 0) -> "SurroundRig":
        """Return the rig with images scaled to width x height and then cropped by rows.

        Raises ValueError if no row or column would be left.
        """
        left = height - crop_top - crop_bottom
        if width < 1 or left < 1 or crop_top < 0 or crop_bottom < 0:
            raise ValueError(
                f"cannot resize to {width}x{height} and cut {crop_top} + {crop_bottom} rows: "
                "expected positive sizes with rows left over"
            )
        intrinsics = self.intrinsics.copy()
        intrinsics[:, 0] *= width / self.width
        intrinsics[:, 1] *= height / self.height
        intrinsics[:, 1, 2] -= crop_top
        return replace(self, width=width, height=left, intrinsics=intrinsics)


def nuscenes_rig(width: int = _FULL_WIDTH, height: int = _FULL_HEIGHT) -> SurroundRig:
    """Return the six cameras of a nuScenes-like vehicle in the order of `CAMERA_CHANNELS`, with images of
    width x height."""
    mounts = [_MOUNTS[channel] for channel in CAMERA_CHANNELS]
    full = SurroundRig(
        channels=CAMERA_CHANNELS,
        width=_FULL_WIDTH,
        height=_FULL_HEIGHT,
        intrinsics=np.stack(
            [[[m.focal, 0.0, m.center[0]], [0.0, m.focal, m.center[1]], [0.0, 0.0, 1.0]] for m in mounts]
        ),
        ego_from_camera=np.stack([_ego_from_camera(m) for m in mounts]),
        exposure_offsets_s=np.array([m.exposure_s for m in mounts]),
    )
    return full.resized(width, height)


def _ego_from_camera(mount: _Mount) -> NDArray[np.float64]:
    pitch = np.deg2rad(mount.pitch_deg)
    pitched = np.array([[np.cos(pitch), 0, np.sin(pitch)], [0, 1, 0], [-np.sin(pitch), 0, np.cos(pitch)]])
    yawed = yaw_transform(float(np.deg2rad(mount.yaw_deg)))[:3, :3]
    return make_transform(yawed @ pitched @ _MOUNT_FROM_OPTICAL, mount.position)


def canonical_cameras(rig: SurroundRig) -> tuple[CanonicalCamera, ...]:
    """Return the cameras of a rig as they are stored with weights trained on it."""
    return tuple(
        CanonicalCamera(
            channel=channel,
            width=rig.width,
            height=rig.height,
            intrinsics=rig.intrinsics[index],
            ego_from_camera=rig.ego_from_camera[index],
        )
        for index, channel in enumerate(rig.channels)
    )
