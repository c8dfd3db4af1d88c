# SPDX-License-Identifier: Apache-2.0
"""Canonical cameras: the cameras that weights were trained with, and the orientation of cameras in ego."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ftkd_core.errors import UserError
from ftkd_core.geometry import is_rigid

Array = NDArray[np.float64]

CAMERA_MODELS: Final = ("auto", "virtual", "as_is")
"""How a detector sees the cameras, see `runtime.virtual_camera.VirtualCameras`."""

# Axes of an optical frame (z forward, x right, y down) that looks along the x axis of ego.
_EGO_FROM_OPTICAL: Final = np.array([[0.0, 0.0, 1.0], [-1.0, 0.0, 0.0], [0.0, -1.0, 0.0]])


@dataclass(frozen=True, kw_only=True)
class CanonicalCamera:
    """One camera of the training data: its channel, image size in pixels, intrinsics (3, 3) for that size and
    ego_from_camera (4, 4)."""

    channel: str
    width: int
    height: int
    intrinsics: Array
    ego_from_camera: Array


def cameras_to_json(cameras: Sequence[CanonicalCamera]) -> list[dict[str, Any]]:
    """Return the cameras as values for JSON; the inverse of `cameras_from_json`."""
    return [
        {
            "channel": camera.channel,
            "width": camera.width,
            "height": camera.height,
            "intrinsics": camera.intrinsics.tolist(),
            "ego_from_camera": camera.ego_from_camera.tolist(),
        }
        for camera in cameras
    ]


def cameras_from_json(rows: Sequence[dict[str, Any]], origin: str) -> tuple[CanonicalCamera, ...]:
    """Return the cameras of `cameras_to_json`. Raises UserError that names `origin` for anything else."""
    try:
        cameras = tuple(
            CanonicalCamera(
                channel=str(row["channel"]),
                width=int(row["width"]),
                height=int(row["height"]),
                intrinsics=np.array(row["intrinsics"], dtype=np.float64).reshape(3, 3),
                ego_from_camera=np.array(row["ego_from_camera"], dtype=np.float64).reshape(4, 4),
            )
            for row in rows
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"cameras of {origin}: {error}; expected those that training writes") from None
    for camera in cameras:
        focal = camera.intrinsics[0, 0], camera.intrinsics[1, 1]
        if not is_rigid(camera.ego_from_camera) or not min(focal) > 0 or min(camera.width, camera.height) < 1:
            raise UserError(f"cameras of {origin}: {camera.channel} has no usable calibration")
    return cameras


def orientation(ego_from_camera: Array) -> tuple[float, float, float]:
    """Return yaw, pitch and roll in radians of a camera's optical frame in ego.

    Yaw is the heading of the optical axis, positive to the left; pitch its angle below the horizon; roll the
    clockwise rotation about the axis.
    """
    x, y, z = ego_from_camera[:3, 2]
    yaw, pitch = np.arctan2(y, x), np.arctan2(-z, np.hypot(x, y))
    level = rotation_of(float(yaw), float(pitch), 0.0).T @ ego_from_camera[:3, :3]
    return float(yaw), float(pitch), float(np.arctan2(level[1, 0], level[0, 0]))


def rotation_of(yaw: float, pitch: float, roll: float) -> Array:
    """Return the rotation (3, 3) from a camera's optical frame to ego; the inverse of `orientation`."""
    cos, sin = np.cos([yaw, pitch, roll]), np.sin([yaw, pitch, roll])
    about_z = np.array([[cos[0], -sin[0], 0], [sin[0], cos[0], 0], [0, 0, 1]])
    about_y = np.array([[cos[1], 0, sin[1]], [0, 1, 0], [-sin[1], 0, cos[1]]])
    about_axis = np.array([[cos[2], -sin[2], 0], [sin[2], cos[2], 0], [0, 0, 1]])
    return np.asarray(about_z @ about_y @ _EGO_FROM_OPTICAL @ about_axis)
