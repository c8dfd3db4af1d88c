# SPDX-License-Identifier: Apache-2.0
"""Rigs of `benchmarks.rigs`: changes of the rig that the shipped weights were trained on."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Final

import cv2
import numpy as np
from numpy.typing import NDArray

from ftkd_core.canonical_cameras import orientation, rotation_of
from ftkd_core.data.synthetic.rig import SurroundRig, nuscenes_rig
from ftkd_core.lens import Lens

WIDTH: Final = 800
HEIGHT: Final = 450
"""Image size of the trained rig in this benchmark: half of nuScenes', 2.3 times the network's."""


@dataclass(frozen=True, kw_only=True)
class RigCase:
    """A rig to drive with: cameras as rendered, their lens, and the rotation error (degrees) of the
    extrinsics that the detector is given, about random axes."""

    name: str
    rig: SurroundRig
    lens: Lens | None = None
    extrinsics_error_deg: float = 0.0
    render: SurroundRig = field(init=False)

    def __post_init__(self) -> None:
        rendered = self.rig if self.lens is None else pinhole_rig(self.rig)
        object.__setattr__(self, "render", rendered)


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


_PINHOLE_SIZE: Final = 1600
_PINHOLE_FIELD: Final = 150.0


def pinhole_rig(rig: SurroundRig) -> SurroundRig:
    """Return the wide pinhole cameras from which the distorted images of a rig are made."""
    focal = _PINHOLE_SIZE / 2 / np.tan(np.deg2rad(_PINHOLE_FIELD / 2))
    size = (_PINHOLE_SIZE, _PINHOLE_SIZE // 2)
    k = np.array([[focal, 0, size[0] / 2], [0, focal, size[1] / 2], [0, 0, 1]])
    return replace(rig, intrinsics=np.tile(k, (len(rig.channels), 1, 1)), width=size[0], height=size[1])


def distort(case: RigCase, camera: int, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the image (h, w, 3) of a camera with a lens, from the image of its wide pinhole camera."""
    if case.lens is None:
        return image
    u, v = np.meshgrid(np.arange(case.rig.width) + 0.5, np.arange(case.rig.height) + 0.5)
    pixels = np.stack([u, v], axis=-1).reshape(-1, 1, 2)
    k, coefficients = case.rig.intrinsics[camera], np.array(case.lens.coefficients)
    fisheye: Any = cv2.fisheye
    undo: Callable[..., Any] = fisheye.undistortPoints if len(coefficients) == 4 else cv2.undistortPoints
    points = np.asarray(undo(pixels, k, coefficients)).reshape(case.rig.height, case.rig.width, 2)
    wide = case.render.intrinsics[camera]
    maps = (points * wide[0, 0] + wide[:2, 2] - 0.5).astype(np.float32)
    return np.asarray(cv2.remap(image, maps, None, cv2.INTER_LINEAR), dtype=np.uint8)  # type: ignore[call-overload]


def fisheye_case() -> RigCase:
    """Return four equidistant cameras of 140 degrees that look forward, left, back and right."""
    rig = ring([0, 90, 180, -90], [90] * 4)
    focal = WIDTH / 2 / np.deg2rad(70.0)
    intrinsics = rig.intrinsics.copy()
    intrinsics[:, (0, 1), (0, 1)] = focal
    lens = Lens("equidistant", (0.0, 0.0, 0.0, 0.0))
    rig = replace(rig, intrinsics=intrinsics)
    return RigCase(name="four fisheye cameras of 140 degrees", rig=rig, lens=lens)


def distorted_case() -> RigCase:
    """Return the trained rig with raw images of a plumb_bob lens."""
    lens = Lens("plumb_bob", (-0.28, 0.09, 0.0005, -0.0004, -0.012))
    return RigCase(name="raw images, plumb_bob", rig=nuscenes_rig(WIDTH, HEIGHT), lens=lens)


def all_cases() -> list[RigCase]:
    """Return the rigs in the order of the table; the first is the trained one."""
    rig = nuscenes_rig(WIDTH, HEIGHT)
    cases = [RigCase(name="as trained", rig=rig)]
    for pitch in (1, 2, 4, 6, -2, -4):
        cases.append(RigCase(name=f"pitch {pitch:+d} degrees", rig=turned(rig, pitch=pitch)))
    cases.append(RigCase(name="roll +3 degrees", rig=turned(rig, roll=3)))
    cases.append(RigCase(name="yaw +15 degrees", rig=turned(rig, yaw=15)))
    for up in (-0.3, 0.2, 0.6, 1.5):
        cases.append(RigCase(name=f"height {up:+.1f} m", rig=moved(rig, up=up)))
    cases.append(RigCase(name="2 m further forward", rig=moved(rig, forward=2)))
    for factor in (0.6, 0.8, 1.25, 1.6):
        cases.append(RigCase(name=f"focal length x {factor:g}", rig=zoomed(rig, factor)))
    for width, height in ((1920, 1208), (1280, 720), (2880, 1860)):
        # At half size, as the trained rig.
        cases.append(RigCase(name=f"{width}x{height} images", rig=other_size(rig, width // 2, height // 2)))
    cases.append(distorted_case())
    cases.append(RigCase(name="five cameras", rig=ring([0, 72, 144, -144, -72], [80] * 5)))
    cases.append(fisheye_case())
    for error in (0.25, 0.5, 1.0):
        cases.append(
            RigCase(name=f"extrinsics wrong by {error:g} degrees", rig=rig, extrinsics_error_deg=error)
        )
    return cases
