# SPDX-License-Identifier: Apache-2.0
"""Rigs of other vehicles, by name.

| name | cameras | images | height | differs from `nuscenes` by |
|---|---|---|---|---|
| `nuscenes` | 6 | 1600x900 | 1.5 m | - |
| `autoware_sensor_kit` | 6 on the roof | 1920x1280, plumb_bob | 1.9 m | lens, image size, pitch |
| `truck` | 6 on a cab | 1920x1208, rational_polynomial | 2.4 to 2.9 m | height, pitch, lens; free-running |
| `shuttle_fisheye` | 4 | 1280x960, equidistant, 190 degrees | 2.2 m | lens, number, pitch |
| `five_cameras` | 5 | 1280x720 | 1.55 m | number and yaws |
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

import numpy as np

from ftkd_core.data.synthetic.rig import MountedCamera, RigConfig, SurroundRig, nuscenes_config
from ftkd_core.errors import UserError
from ftkd_core.lens import Lens

_TRIGGERED_S: Final = 0.043  # exposure of cameras that are triggered together: at the stamp of the key frame
_ROOF_LENS: Final = Lens("plumb_bob", (-0.32, 0.12, 0.0003, -0.0002, -0.02))
_CAB_LENS: Final = Lens("rational_polynomial", (0.9, 0.1, 0.0002, -0.0001, 0.0, 1.15, 0.15, 0.0))
_FISHEYE: Final = Lens("equidistant", (0.02, -0.006, 0.001, -0.0002))


def autoware_sensor_kit() -> RigConfig:
    """Return six cameras on the roof of a car, with raw images, triggered by a rotating lidar."""
    mounts = {
        "CAM_FRONT": ((1.60, 0.0, 1.90), 0.0, 2.0, 1400.0, 0.0083),
        "CAM_FRONT_RIGHT": ((1.35, -0.50, 1.92), -55.0, 3.0, 1395.0, 0.0160),
        "CAM_FRONT_LEFT": ((1.35, 0.50, 1.92), 55.0, 3.0, 1403.0, 0.0006),
        "CAM_BACK": ((-0.40, 0.0, 1.88), 180.0, 4.0, 1010.0, 0.0333),
        "CAM_BACK_LEFT": ((0.60, 0.55, 1.91), 110.0, 3.5, 1398.0, 0.0430),
        "CAM_BACK_RIGHT": ((0.60, -0.55, 1.91), -110.0, 3.5, 1401.0, 0.0236),
    }
    cameras = {
        name: MountedCamera(
            position=position, yaw_deg=yaw, pitch_deg=pitch, focal=focal, center=(963.0, 645.0),
            exposure_s=exposure, lens=_ROOF_LENS,
        )
        for name, (position, yaw, pitch, focal, exposure) in mounts.items()
    }  # fmt: skip
    return RigConfig(width=1920, height=1280, cameras=cameras)


def truck() -> RigConfig:
    """Return six free-running cameras of 40 Hz on the cab of a truck, with raw images; at this rate the
    sweeps are whole numbers of periods apart, so the offset of a camera drifts but does not jump."""
    mounts = {
        "CAM_FRONT": ((4.90, 0.0, 2.70), 0.0, 8.0, 0.0, 1660.0),
        "CAM_FRONT_RIGHT": ((4.60, -1.25, 2.60), -58.0, 7.0, 1.0, 1380.0),
        "CAM_FRONT_LEFT": ((4.60, 1.25, 2.60), 58.0, 7.0, -1.0, 1375.0),
        "CAM_BACK": ((-1.00, 0.0, 2.90), 180.0, 10.0, 0.0, 960.0),
        "CAM_BACK_LEFT": ((3.40, 1.30, 2.40), 118.0, 6.0, 0.5, 1370.0),
        "CAM_BACK_RIGHT": ((3.40, -1.30, 2.40), -118.0, 6.0, -0.5, 1382.0),
    }
    cameras = {
        name: MountedCamera(
            position=position, yaw_deg=yaw, pitch_deg=pitch, roll_deg=roll, focal=focal,
            center=(957.0, 606.0), lens=_CAB_LENS, exposure_s=_TRIGGERED_S - 1 / 40,
        )
        for name, (position, yaw, pitch, roll, focal) in mounts.items()
    }  # fmt: skip
    return RigConfig(width=1920, height=1208, cameras=cameras, free_running_hz=40.0)


def shuttle_fisheye() -> RigConfig:
    """Return four fisheye cameras on a small bus, triggered at the same time."""
    mounts = {
        "CAM_FRONT": ((3.90, 0.0, 2.20), 0.0, 12.0),
        "CAM_LEFT": ((1.50, 1.05, 2.25), 90.0, 14.0),
        "CAM_BACK": ((-0.90, 0.0, 2.20), 180.0, 12.0),
        "CAM_RIGHT": ((1.50, -1.05, 2.25), -90.0, 14.0),
    }
    cameras = {
        name: MountedCamera(
            position=position,
            yaw_deg=yaw,
            pitch_deg=pitch,
            focal=386.0,
            center=(641.0, 478.0),
            lens=_FISHEYE,
            exposure_s=_TRIGGERED_S,
        )
        for name, (position, yaw, pitch) in mounts.items()
    }
    return RigConfig(width=1280, height=960, cameras=cameras)


def five_cameras() -> RigConfig:
    """Return five cameras of 80 degrees in equal directions, triggered at the same time."""
    cameras = {}
    for index, yaw in enumerate((0.0, 72.0, 144.0, -144.0, -72.0)):
        x, y = 0.8 + np.cos(np.deg2rad(yaw)), np.sin(np.deg2rad(yaw))
        cameras[f"CAM_{index}"] = MountedCamera(
            position=(float(x), float(y), 1.55), yaw_deg=yaw, focal=640 / np.tan(np.deg2rad(40.0)),
            center=(640.0, 360.0), exposure_s=_TRIGGERED_S,
        )  # fmt: skip
    return RigConfig(width=1280, height=720, cameras=cameras)


RIGS: Final[Mapping[str, RigConfig]] = MappingProxyType(
    {
        "nuscenes": nuscenes_config(),
        "autoware_sensor_kit": autoware_sensor_kit(),
        "truck": truck(),
        "shuttle_fisheye": shuttle_fisheye(),
        "five_cameras": five_cameras(),
    }
)
DEFAULT_RIG: Final = "nuscenes"


def preset_rig(name: str, width: int | None = None, height: int | None = None) -> SurroundRig:
    """Return the rig of a name with images of width x height; without height with the rig's aspect, without
    both at full size. Raises UserError for an unknown name."""
    if name not in RIGS:
        raise UserError(f"rig {name!r}: expected one of {', '.join(RIGS)}")
    rig = RIGS[name].build()
    width = width or rig.width
    return rig.resized(width, height or round(rig.height * width / rig.width))
