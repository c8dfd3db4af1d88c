# SPDX-License-Identifier: Apache-2.0
"""Rigs for training: each scene draws its own, so that weights do not memorise the height of one vehicle.

A virtual camera (`runtime.virtual_camera`) corrects lens, focal length, pitch, roll and image size, but not
the position of a camera and not an error of its calibration. The draw covers what remains, and views that see
only a part of their virtual image. Lenses are left out: their removal is exact, and they cost rendering time.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from ftkd_core.canonical_cameras import orientation, rotation_of
from ftkd_core.data.synthetic.rig import HEIGHT_RANGE_M, SurroundRig, nuscenes_rig
from ftkd_core.data.synthetic.rig_presets import RIGS, preset_rig
from ftkd_core.errors import UserError

VARIED: Final = "varied"
TRAINED_SHARE: Final = 0.3
"""Share of scenes with the unchanged nuScenes-like rig, so that it does not lose."""
MISSING_SHARE: Final = 0.25
"""Share of the other scenes in which one camera is missing; two in a quarter of these."""
CALIBRATION_ERROR_DEG: Final = 0.5
"""Largest rotation of a camera against its calibration."""
CHASSIS_PITCH_DEG: Final = 1.5
CHASSIS_ROLL_DEG: Final = 1.0
"""Largest rotation of the vehicle against the ground (braking, load), which no calibration contains."""
_MOUNT_PITCH_DEG: Final = (-3.0, 8.0)
_MOUNT_ROLL_DEG: Final = 3.0
_YAW_DEG: Final = 8.0
_FORWARD_M: Final = (-0.5, 3.0)
_WIDER: Final = (1.0, 2.4)
_FOCAL: Final = (0.8, 1.25)
_ASPECTS: Final = (16 / 9, 1920 / 1208, 3 / 2, 4 / 3)
# Yaws and horizontal fields of rigs that are not a changed nuScenes-like one, and their share.
_RINGS: Final[tuple[tuple[Sequence[float], float, float], ...]] = (
    ((0, 60, 120, 180, -120, -60), 70.0, 0.15),
    ((0, 72, 144, -144, -72), 80.0, 0.15),
    ((0, 90, 180, -90), 115.0, 0.15),
)


@dataclass(frozen=True, kw_only=True)
class DrivenRig:
    """A rig in a scene: the cameras as they are, and as their calibration describes them."""

    true: SurroundRig
    calibrated: SurroundRig

    def resized(self, width: int, height: int | None = None) -> "DrivenRig":
        """Return the rig with other images; without height with the same aspect."""
        height = height or round(self.true.height * width / self.true.width)
        return DrivenRig(
            true=self.true.resized(width, height), calibrated=self.calibrated.resized(width, height)
        )


def check_rig_name(name: str) -> None:
    """Raise UserError unless a rig has this name."""
    if name != VARIED and name not in RIGS:
        raise UserError(f"rig {name!r}: expected one of {', '.join([*RIGS, VARIED])}")


def rig_of_scene(name: str, seed: int) -> DrivenRig:
    """Return the rig of a name for the scene of a seed: the preset, or for `varied` one drawn by the seed."""
    check_rig_name(name)
    if name == VARIED:
        return draw_rig(seed)
    rig = preset_rig(name)
    return DrivenRig(true=rig, calibrated=rig)


def draw_rig(seed: int) -> DrivenRig:
    """Draw a rig; the same seed gives the same rig."""
    random = np.random.default_rng([seed, 23])
    if random.random() < TRAINED_SHARE:
        rig = nuscenes_rig()
        return DrivenRig(true=rig, calibrated=rig)
    calibrated = _without_missing(_mounted(_layout(random), random), random)
    return DrivenRig(true=_disturbed(calibrated, random), calibrated=calibrated)


def _layout(random: np.random.Generator) -> SurroundRig:
    """Draw the number of cameras, their yaws, fields of view and image size."""
    kind, aspect = random.random(), float(random.choice(_ASPECTS))
    for yaws, field, share in _RINGS:
        if kind < share:
            return _ring(yaws, field, aspect)
        kind -= share
    rig = nuscenes_rig()
    height = round(rig.width / aspect)
    intrinsics, poses = rig.intrinsics.copy(), rig.ego_from_camera.copy()
    intrinsics[:, 1, 2] += (height - rig.height) / 2
    intrinsics[:, (0, 1), (0, 1)] *= np.exp(random.uniform(*np.log(_FOCAL)))
    for pose in poses[1:]:  # the front camera looks ahead
        yaw, pitch, roll = orientation(pose)
        pose[:3, :3] = rotation_of(yaw + np.deg2rad(random.uniform(-_YAW_DEG, _YAW_DEG)), pitch, roll)
    return replace(rig, height=height, intrinsics=intrinsics, ego_from_camera=poses)


def _ring(yaws_deg: Sequence[float], field_deg: float, aspect: float) -> SurroundRig:
    width, count = 1600, len(yaws_deg)
    height = round(width / aspect)
    focal = width / 2 / np.tan(np.deg2rad(field_deg) / 2)
    poses = np.tile(np.eye(4), (count, 1, 1))
    for pose, yaw in zip(poses, np.deg2rad(yaws_deg), strict=True):
        pose[:3, :3] = rotation_of(float(yaw), 0.0, 0.0)
        pose[:3, 3] = (0.9 + 0.8 * np.cos(yaw), 0.5 * np.sin(yaw), 1.5)
    k = np.array([[focal, 0.0, width / 2], [0.0, focal, height / 2], [0.0, 0.0, 1.0]])
    return SurroundRig(
        channels=tuple(f"CAM_{index}" for index in range(count)), width=width, height=height,
        intrinsics=np.tile(k, (count, 1, 1)), ego_from_camera=poses, exposure_offsets_s=np.full(count, 0.04),
    )  # fmt: skip


def _mounted(rig: SurroundRig, random: np.random.Generator) -> SurroundRig:
    """Draw the height of the rig, its position and size, and the pitch and roll of its mounts."""
    low, high = HEIGHT_RANGE_M
    height, forward = random.uniform(low, high), random.uniform(*_FORWARD_M)
    wider, pitch = random.uniform(*_WIDER), random.uniform(*_MOUNT_PITCH_DEG)
    poses = rig.ego_from_camera.copy()
    for pose in poses:
        yaw, own_pitch, own_roll = orientation(pose)
        pitch_deg = pitch + random.uniform(-2.0, 2.0)
        roll_deg = random.uniform(-_MOUNT_ROLL_DEG, _MOUNT_ROLL_DEG)
        pose[:3, :3] = rotation_of(yaw, own_pitch + np.deg2rad(pitch_deg), own_roll + np.deg2rad(roll_deg))
        pose[0, 3] += forward
        pose[1, 3] *= wider
        pose[2, 3] = np.clip(height + random.uniform(-0.15, 0.15), low, high)
    return replace(rig, ego_from_camera=poses)


def _without_missing(rig: SurroundRig, random: np.random.Generator) -> SurroundRig:
    """Leave out cameras that are missing in the whole scene."""
    if random.random() >= MISSING_SHARE:
        return rig
    missing = random.permutation(len(rig.channels))[: 2 if random.random() < 0.25 else 1]
    kept = [index for index in range(len(rig.channels)) if index not in missing]
    return replace(
        rig, channels=tuple(rig.channels[i] for i in kept), intrinsics=rig.intrinsics[kept],
        ego_from_camera=rig.ego_from_camera[kept], exposure_offsets_s=rig.exposure_offsets_s[kept],
    )  # fmt: skip


def _disturbed(rig: SurroundRig, random: np.random.Generator) -> SurroundRig:
    """Turn the vehicle against the ground, and each camera against its calibration."""
    pitch = np.clip(random.normal(0.0, CHASSIS_PITCH_DEG / 2), -CHASSIS_PITCH_DEG, CHASSIS_PITCH_DEG)
    roll = np.clip(random.normal(0.0, CHASSIS_ROLL_DEG / 2), -CHASSIS_ROLL_DEG, CHASSIS_ROLL_DEG)
    ground_from_ego = np.eye(4)
    ground_from_ego[:3, :3] = Rotation.from_euler("yx", [pitch, roll], degrees=True).as_matrix()
    errors = _small_rotations(random, len(rig.channels))
    poses = ground_from_ego @ rig.ego_from_camera
    poses[:, :3, :3] = poses[:, :3, :3] @ errors
    return replace(rig, ego_from_camera=poses)


def _small_rotations(random: np.random.Generator, count: int) -> NDArray[np.float64]:
    """Return rotations (count, 3, 3) about random axes, uniform up to `CALIBRATION_ERROR_DEG`."""
    axes = random.normal(size=(count, 3))
    axes /= np.linalg.norm(axes, axis=1, keepdims=True)
    angles = np.deg2rad(random.uniform(0.0, CALIBRATION_ERROR_DEG, (count, 1)))
    return np.asarray(Rotation.from_rotvec(axes * angles).as_matrix())
