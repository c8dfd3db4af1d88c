# SPDX-License-Identifier: Apache-2.0
"""Rigs of `benchmarks.rigs`: changes of the rig that the shipped weights were trained on."""

import hashlib
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from ftkd_core.canonical_cameras import orientation, rotation_of
from ftkd_core.data.synthetic.rig import SurroundRig, nuscenes_rig
from ftkd_core.data.synthetic.rig_presets import preset_rig
from ftkd_core.lens import Lens

TRAINED: Final = "as trained"
WIDTH: Final = 800
HEIGHT: Final = 450
"""Image size of the trained rig in this benchmark: half of nuScenes', 2.3 times the network's."""


@dataclass(frozen=True, kw_only=True)
class RigCase:
    """A rig to drive with; the rotation error (degrees) of the extrinsics that the detector is given, about
    random axes; and the rate of its rounds."""

    name: str
    rig: SurroundRig
    extrinsics_error_deg: float = 0.0
    rate_hz: int = 2

    @property
    def content_hash(self) -> str:
        """Eight hexadecimal digits of everything that defines the case but its name."""
        rig = self.rig
        digest = hashlib.sha256()
        for array in (rig.intrinsics, rig.ego_from_camera, rig.exposure_offsets_s):
            digest.update((np.round(array, 9) + 0.0).tobytes())
        rest = (
            *(rig.channels, rig.width, rig.height, rig.lenses, rig.free_running_hz),
            *(self.extrinsics_error_deg, self.rate_hz),
        )
        digest.update(repr(rest).encode())
        return digest.hexdigest()[:8]


def turned(rig: SurroundRig, *, yaw: float = 0.0, pitch: float = 0.0, roll: float = 0.0) -> SurroundRig:
    """Return the rig with all cameras turned by degrees: to the left, down, clockwise."""
    poses = rig.ego_from_camera.copy()
    for pose in poses:
        angles = np.array(orientation(pose)) + np.deg2rad([yaw, pitch, roll])
        pose[:3, :3] = rotation_of(*angles)
    return replace(rig, ego_from_camera=poses)


def moved(rig: SurroundRig, *, forward: float = 0.0, up: float = 0.0) -> SurroundRig:
    """Return the rig with all cameras moved by metres."""
    poses = rig.ego_from_camera.copy()
    poses[:, :3, 3] += (forward, 0.0, up)
    return replace(rig, ego_from_camera=poses)


def zoomed(rig: SurroundRig, factor: float) -> SurroundRig:
    """Return the rig with other focal lengths and the same images."""
    intrinsics = rig.intrinsics.copy()
    intrinsics[:, (0, 1), (0, 1)] *= factor
    return replace(rig, intrinsics=intrinsics)


def other_size(rig: SurroundRig, width: int, height: int) -> SurroundRig:
    """Return the rig with images of another size, the same field of view across, and the principal point in
    the middle."""
    intrinsics = rig.intrinsics.copy()
    intrinsics[:, (0, 1), (0, 1)] *= width / rig.width
    intrinsics[:, :2, 2] = (width / 2, height / 2)
    return replace(rig, intrinsics=intrinsics, width=width, height=height)


def ring(yaws_deg: list[float], fields_deg: list[float], height_m: float = 1.55) -> SurroundRig:
    """Return a rig of cameras on a circle of 1 m around (0.8, 0) with these yaws and horizontal fields."""
    poses, intrinsics = [], []
    for yaw, across in zip(np.deg2rad(yaws_deg), np.deg2rad(fields_deg), strict=True):
        pose = np.eye(4)
        pose[:3, :3] = rotation_of(float(yaw), 0.0, 0.0)
        pose[:3, 3] = (0.8 + np.cos(yaw), np.sin(yaw), height_m)
        focal = WIDTH / 2 / np.tan(across / 2)
        poses.append(pose)
        intrinsics.append([[focal, 0, WIDTH / 2], [0, focal, HEIGHT / 2], [0, 0, 1]])
    names = tuple(f"CAM_{index}" for index in range(len(yaws_deg)))
    return SurroundRig(
        channels=names, width=WIDTH, height=HEIGHT, intrinsics=np.array(intrinsics),
        ego_from_camera=np.array(poses), exposure_offsets_s=np.zeros(len(yaws_deg)),
    )  # fmt: skip


def fisheye_case() -> RigCase:
    """Return four equidistant cameras of 140 degrees that look forward, left, back and right."""
    rig = ring([0, 90, 180, -90], [90] * 4)
    focal = WIDTH / 2 / np.deg2rad(70.0)
    intrinsics = rig.intrinsics.copy()
    intrinsics[:, (0, 1), (0, 1)] = focal
    lens = Lens("equidistant", (0.0, 0.0, 0.0, 0.0))
    rig = replace(rig, intrinsics=intrinsics, lenses=(lens,) * 4)
    return RigCase(name="four fisheye cameras of 140 degrees", rig=rig)


def distorted_case() -> RigCase:
    """Return the trained rig with raw images of a plumb_bob lens."""
    lens = Lens("plumb_bob", (-0.28, 0.09, 0.0005, -0.0004, -0.012))
    rig = nuscenes_rig(WIDTH, HEIGHT)
    return RigCase(name="raw images, plumb_bob", rig=replace(rig, lenses=(lens,) * len(rig.channels)))


def all_cases() -> list[RigCase]:
    """Return the rigs in the order of the table; the first is the trained one."""
    rig = nuscenes_rig(WIDTH, HEIGHT)
    cases = [RigCase(name=TRAINED, rig=rig)]
    for pitch in (1, 2, 4, 6, -1, -2, -4, -6):
        cases.append(RigCase(name=f"pitch {pitch:+d} degrees", rig=turned(rig, pitch=pitch)))
    for roll in (3, -3):
        cases.append(RigCase(name=f"roll {roll:+d} degrees", rig=turned(rig, roll=roll)))
    cases.append(RigCase(name="yaw +15 degrees", rig=turned(rig, yaw=15)))
    for up in (-0.5, -0.3, 0.2, 0.6, 1.0, 1.5):
        cases.append(RigCase(name=f"height {up:+.1f} m", rig=moved(rig, up=up)))
    cases.append(RigCase(name="2 m further forward", rig=moved(rig, forward=2)))
    for factor in (0.6, 0.8, 1.25, 1.6):
        cases.append(RigCase(name=f"focal length x {factor:g}", rig=zoomed(rig, factor)))
    for width, height in ((1120, 630), (1280, 720), (1920, 1208), (2240, 1260), (2880, 1860)):
        # At half size, as the trained rig.
        cases.append(RigCase(name=f"{width}x{height} images", rig=other_size(rig, width // 2, height // 2)))
    cases += [distorted_case(), fisheye_case()]
    for name in ("five_cameras", "autoware_sensor_kit", "truck", "shuttle_fisheye"):
        cases.append(RigCase(name=name, rig=preset_rig(name, WIDTH)))
    for error in (0.25, 0.5, 1.0):
        name = f"extrinsics wrong by {error:g} degrees"
        cases.append(RigCase(name=name, rig=rig, extrinsics_error_deg=error))
    for rate in (5, 10, 12, 20):
        cases.append(RigCase(name=f"{rate} Hz", rig=rig, rate_hz=rate))
    return cases
