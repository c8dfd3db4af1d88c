# SPDX-License-Identifier: Apache-2.0
"""Rigs of the synthetic vehicle: cameras with their mounts, lenses and times of exposure, and a lidar.

The default is six cameras with nuScenes-like rounded calibration; `rig_presets` has other vehicles. Pixels
are areas: pixel column i covers [i, i + 1) of the image plane, so scaling an image scales its intrinsics
exactly.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ftkd_core.canonical_cameras import CanonicalCamera
from ftkd_core.classes import CAMERA_CHANNELS
from ftkd_core.errors import UserError
from ftkd_core.geometry import make_transform, yaw_transform
from ftkd_core.lens import Lens, check_fold

LIDAR_OFFSET_S: Final = 0.0431
"""Seconds from the start of a sweep to the stamp of the LIDAR_TOP key frame, which is the stamp of the
sample."""

EGO_FROM_LIDAR: Final[NDArray[np.float64]] = yaw_transform(-np.pi / 2, (0.94, 0.0, 1.84))
"""Mount of LIDAR_TOP: x to the right, y forward, z up."""

# Axes of an optical frame (z forward, x right, y down) that looks along the x axis of its mount.
_MOUNT_FROM_OPTICAL: Final = np.array([[0.0, 0.0, 1.0], [-1.0, 0.0, 0.0], [0.0, -1.0, 0.0]])
_FULL_WIDTH: Final = 1600
_FULL_HEIGHT: Final = 900


MAX_CAMERAS: Final = 8
HEIGHT_RANGE_M: Final = (1.0, 3.2)
_MAX_PITCH_DEG: Final = 45.0
_MAX_ROLL_DEG: Final = 30.0
_MAX_EXPOSURE_S: Final = 0.05
_FREE_RUNNING_HZ: Final = (25.0, 60.0)  # sweeps with images are at least 50 ms apart
_PHASES: Final = (0.3, 0.618)  # of free-running cameras, in periods: first, and step from camera to camera
_DRIFT: Final = 4e-5  # difference of the periods of two consecutive free-running cameras


@dataclass(frozen=True, kw_only=True)
class MountedCamera:
    """One camera: position in ego (m); yaw to the left, pitch down and roll clockwise (degrees); focal length
    and principal point (px); exposure offset (s) after the start of a sweep; lens, None for a pinhole."""

    position: tuple[float, float, float]
    yaw_deg: float
    pitch_deg: float = 0.0
    roll_deg: float = 0.0
    focal: float
    center: tuple[float, float]
    exposure_s: float = 0.0
    lens: Lens | None = None


@dataclass(frozen=True, kw_only=True)
class RigConfig:
    """A rig by camera name, with one image size. free_running_hz: image rate of cameras that are not
    triggered, each with its own phase and clock; 0 triggers all cameras.

    Raises UserError that names camera and value for a rig that no vehicle has.
    """

    width: int
    height: int
    cameras: Mapping[str, MountedCamera]
    free_running_hz: float = 0.0

    def __post_init__(self) -> None:
        if not 1 <= len(self.cameras) <= MAX_CAMERAS:
            raise UserError(f"rig of {len(self.cameras)} cameras; expected 1 to {MAX_CAMERAS}")
        slowest, fastest = _FREE_RUNNING_HZ
        if self.free_running_hz and not slowest <= self.free_running_hz <= fastest:
            raise UserError(
                f"free_running_hz {self.free_running_hz:g}: expected 0 or {slowest:g} to {fastest:g}"
            )
        for name, camera in self.cameras.items():
            self._check(name, camera)

    def _check(self, name: str, camera: MountedCamera) -> None:
        low, high = HEIGHT_RANGE_M
        ranges = {
            "height": (camera.position[2], low, high),
            "pitch_deg": (camera.pitch_deg, -_MAX_PITCH_DEG, _MAX_PITCH_DEG),
            "roll_deg": (camera.roll_deg, -_MAX_ROLL_DEG, _MAX_ROLL_DEG),
            "yaw_deg": (camera.yaw_deg, -180.0, 180.0),
            "focal": (camera.focal, 0.1 * self.width, 10.0 * self.width),
            "principal point x": (camera.center[0], 0.0, self.width),
            "principal point y": (camera.center[1], 0.0, self.height),
            "exposure_s": (camera.exposure_s, 0.0, _MAX_EXPOSURE_S),
        }
        for what, (value, least, most) in ranges.items():
            if not least <= value <= most:  # also refuses nan
                raise UserError(f"{name}: {what} {value:g}; expected {least:g} to {most:g}")
        check_fold(_intrinsics(camera), camera.lens, (self.width, self.height), name)

    def build(self) -> "SurroundRig":
        """Return the rig."""
        cameras = list(self.cameras.values())
        return SurroundRig(
            channels=tuple(self.cameras),
            width=self.width,
            height=self.height,
            intrinsics=np.stack([_intrinsics(camera) for camera in cameras]),
            ego_from_camera=np.stack([_ego_from_camera(camera) for camera in cameras]),
            exposure_offsets_s=np.array([camera.exposure_s for camera in cameras]),
            lenses=tuple(camera.lens for camera in cameras),
            free_running_hz=self.free_running_hz,
        )


_MOUNTS: Final[dict[str, MountedCamera]] = {
    "CAM_FRONT": MountedCamera(
        position=(1.70, 0.02, 1.51),
        yaw_deg=0.3,
        pitch_deg=0.0,
        focal=1266.0,
        center=(816.0, 491.0),
        exposure_s=0.0076,
    ),
    "CAM_FRONT_RIGHT": MountedCamera(
        position=(1.55, -0.49, 1.50),
        yaw_deg=-56.4,
        pitch_deg=0.4,
        focal=1261.0,
        center=(808.0, 495.0),
        exposure_s=0.0155,
    ),
    "CAM_FRONT_LEFT": MountedCamera(
        position=(1.52, 0.49, 1.51),
        yaw_deg=55.0,
        pitch_deg=0.2,
        focal=1273.0,
        center=(827.0, 480.0),
        exposure_s=0.0,
    ),
    "CAM_BACK": MountedCamera(
        position=(0.03, 0.00, 1.58),
        yaw_deg=179.9,
        pitch_deg=0.8,
        focal=809.0,
        center=(829.0, 482.0),
        exposure_s=0.0327,
    ),
    "CAM_BACK_LEFT": MountedCamera(
        position=(1.04, 0.48, 1.59),
        yaw_deg=108.5,
        pitch_deg=0.1,
        focal=1257.0,
        center=(792.0, 493.0),
        exposure_s=0.0426,
    ),
    "CAM_BACK_RIGHT": MountedCamera(
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
    with camera as the optical frame; exposure_offsets_s (N,), seconds after the start of the sweep. lenses:
    one per camera, None for a pinhole; empty if all are pinholes. free_running_hz as in `RigConfig`.
    """

    channels: tuple[str, ...]
    width: int
    height: int
    intrinsics: NDArray[np.float64]
    ego_from_camera: NDArray[np.float64]
    exposure_offsets_s: NDArray[np.float64]
    lenses: tuple[Lens | None, ...] = ()
    free_running_hz: float = 0.0

    def lens(self, camera: int) -> Lens | None:
        """Return the lens of a camera, None for a pinhole."""
        return self.lenses[camera] if self.lenses else None

    def exposures_s(self, sweep_start_s: float) -> NDArray[np.float64]:
        """Return the time of exposure (N,) of each camera in the sweep that starts at a scene time.

        A free-running camera has images at the multiples of its own period, of which the first after the
        wanted time is taken.
        """
        wanted = sweep_start_s + self.exposure_offsets_s
        if not self.free_running_hz:
            return wanted
        index = np.arange(len(self.channels))
        period = (1.0 + _DRIFT * index) / self.free_running_hz
        phase = (_PHASES[0] + _PHASES[1] * index) % 1.0
        return np.asarray((np.ceil(wanted / period - phase) + phase) * period)

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
    return nuscenes_config().build().resized(width, height)


def nuscenes_config() -> RigConfig:
    """Return the configuration of the nuScenes-like rig."""
    cameras = {channel: _MOUNTS[channel] for channel in CAMERA_CHANNELS}
    return RigConfig(width=_FULL_WIDTH, height=_FULL_HEIGHT, cameras=cameras)


def _intrinsics(camera: MountedCamera) -> NDArray[np.float64]:
    return np.array(
        [[camera.focal, 0.0, camera.center[0]], [0.0, camera.focal, camera.center[1]], [0.0, 0.0, 1.0]]
    )


def _ego_from_camera(camera: MountedCamera) -> NDArray[np.float64]:
    pitch, roll = np.deg2rad(camera.pitch_deg), np.deg2rad(camera.roll_deg)
    pitched = np.array([[np.cos(pitch), 0, np.sin(pitch)], [0, 1, 0], [-np.sin(pitch), 0, np.cos(pitch)]])
    yawed = yaw_transform(float(np.deg2rad(camera.yaw_deg)))[:3, :3]
    rotation = yawed @ pitched @ _MOUNT_FROM_OPTICAL
    if roll:
        cos, sin = np.cos(roll), np.sin(roll)
        rotation = rotation @ np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])
    return make_transform(rotation, camera.position)


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
