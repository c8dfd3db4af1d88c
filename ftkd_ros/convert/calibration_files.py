# SPDX-License-Identifier: Apache-2.0
"""Calibration from files, for vehicles without camera_info or tf_static.

Intrinsics: the YAML file that `camera_calibration` (and camera_info_manager) writes. Extrinsics: the fixed
joints of a URDF, or a YAML file of parent frame, child frame and pose:

    base_link:
      cam_front: {x: 1.7, y: 0.0, z: 1.5, yaw_deg: 0, pitch_deg: 0}      # optical frame that looks this way
      cam_left_link: {x: 1.5, y: 0.5, z: 1.5, roll: 0, pitch: 0, yaw: 0.96}  # radians, as in a URDF
      cam_back: {x: 0, y: 0, z: 1.5, rotation: [0.5, 0.5, -0.5, -0.5]}    # quaternion x, y, z, w
"""

import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import yaml
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from ftkd_core.errors import UserError
from ftkd_core.geometry import make_transform
from ftkd_ros.convert.message_factory import MessageFactory

_MATRICES: Final = {
    "camera_matrix": ("k", 9),
    "rectification_matrix": ("r", 9),
    "projection_matrix": ("p", 12),
}
_POSITION: Final = ("x", "y", "z")
_ANGLES: Final = (("roll", "pitch", "yaw"), ("yaw_deg", "pitch_deg"), ("rotation",))


class Mount(NamedTuple):
    """Static transform (4, 4) parent <- child."""

    parent: str
    child: str
    matrix: NDArray[np.float64]


def read_camera_yaml(messages: MessageFactory, path: Path, camera: str) -> Any:
    """Return the sensor_msgs/CameraInfo of a calibration file; its frame is the name of the camera.

    Raises UserError that names the file and the entry.
    """
    content = _read_yaml(path, f"calibration of {camera}")
    message = messages.new("sensor_msgs/msg/CameraInfo")
    message.header.frame_id = camera
    for entry, name in (("image_width", "width"), ("image_height", "height")):
        value = content.get(entry)
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            raise UserError(f"calibration {str(path)!r}: {entry} is {value!r}; expected a number of pixels")
        setattr(message, name, value)
    for entry, (name, count) in _MATRICES.items():
        if entry in content or entry == "camera_matrix":
            numbers = _numbers(content.get(entry), count, f"calibration {str(path)!r}: {entry}")
            setattr(message, name, np.array(numbers))
    if "distortion_coefficients" in content:
        what = f"calibration {str(path)!r}: distortion_coefficients"
        message.d = messages.sequence(np.array(_numbers(content["distortion_coefficients"], None, what)))
        message.distortion_model = str(content.get("distortion_model") or "plumb_bob")
    return message


def read_extrinsics(path: Path) -> list[Mount]:
    """Return the static transforms of a URDF or YAML file. Raises UserError that names file and frame."""
    if path.suffix in (".urdf", ".xml"):
        return _read_urdf(path)
    found = []
    for parent, children in _read_yaml(path, "extrinsics").items():
        if not isinstance(children, Mapping):
            raise UserError(f"extrinsics {str(path)!r}: {parent} is {children!r}; expected frames with poses")
        for child, pose in children.items():
            where = f"extrinsics {str(path)!r}: {child}"
            found.append(_mount(str(parent), str(child), *_pose(pose, where)))
    if not found:
        raise UserError(f"extrinsics {str(path)!r}: no frames; expected parent, child and pose of each")
    return found


def _pose(pose: Any, where: str) -> tuple[list[float], Rotation]:
    """Return position and rotation of one entry."""
    expected = "expected x, y, z and roll, pitch, yaw (radians), yaw_deg and pitch_deg, or rotation"
    if not isinstance(pose, Mapping):
        raise UserError(f"{where} is {pose!r}; {expected}")
    unknown = set(pose) - {*_POSITION, *(name for names in _ANGLES for name in names)}
    used = [names for names in _ANGLES if any(name in pose for name in names)]
    if unknown or len(used) > 1:
        raise UserError(f"{where} has {', '.join(sorted(map(str, pose)))}; {expected}")
    position = [_number(pose.get(axis, 0.0), f"{where}: {axis}") for axis in _POSITION]
    if used == [("rotation",)]:
        quaternion = _numbers(pose["rotation"], 4, f"{where}: rotation")
        if not abs(float(np.linalg.norm(quaternion)) - 1) < 0.01:
            raise UserError(f"{where}: rotation {quaternion}; expected a quaternion x, y, z, w of length 1")
        return position, Rotation.from_quat(quaternion)
    if used == [("yaw_deg", "pitch_deg")]:
        yaw, pitch = (_number(pose.get(name, 0.0), f"{where}: {name}") for name in ("yaw_deg", "pitch_deg"))
        return position, optical_rotation(yaw, pitch)
    angles = [_number(pose.get(name, 0.0), f"{where}: {name}") for name in ("roll", "pitch", "yaw")]
    return position, Rotation.from_euler("xyz", angles)


def optical_rotation(yaw_deg: float, pitch_deg: float) -> Rotation:
    """Return base_link <- optical frame of a camera with this yaw (to the left) and pitch (downwards)."""
    level = Rotation.from_matrix([[0, 0, 1], [-1, 0, 0], [0, -1, 0]])  # z forward, x right, y down
    return Rotation.from_euler("ZY", [yaw_deg, pitch_deg], degrees=True) * level


def _read_urdf(path: Path) -> list[Mount]:
    try:
        root = ElementTree.fromstring(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ElementTree.ParseError) as error:
        raise UserError(
            f"extrinsics {str(path)!r} cannot be read: {error}; expand xacro files first"
        ) from None
    found = []
    for joint in root.iter("joint"):
        parent, child, origin = joint.find("parent"), joint.find("child"), joint.find("origin")
        if joint.get("type") != "fixed" or parent is None or child is None:
            continue
        where = f"extrinsics {str(path)!r}: joint {joint.get('name')}"
        values = {} if origin is None else origin.attrib
        position, angles = (
            _numbers(values.get(name, "0 0 0").split(), 3, f"{where}: {name}") for name in ("xyz", "rpy")
        )
        rotation = Rotation.from_euler("xyz", angles)
        found.append(_mount(parent.get("link", ""), child.get("link", ""), position, rotation))
    if not found:
        raise UserError(f"extrinsics {str(path)!r}: no fixed joint; expected a URDF with the cameras")
    return found


def _mount(parent: str, child: str, position: list[float], rotation: Rotation) -> Mount:
    return Mount(parent, child, make_transform(rotation.as_matrix(), position))


def _read_yaml(path: Path, what: str) -> Mapping[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{what}: file {str(path)!r} cannot be read: {reason}") from None
    if not isinstance(content, Mapping):
        raise UserError(f"{what}: file {str(path)!r} has no entries; expected YAML with names and values")
    return content


def _numbers(value: Any, count: int | None, where: str) -> list[float]:
    """Return a list of finite numbers; `{rows, cols, data}` is accepted, as camera_calibration writes it."""
    values: Any = value.get("data") if isinstance(value, Mapping) else value
    try:
        numbers = [float(item) for item in values]
    except (TypeError, ValueError):
        numbers = []
    wrong_count = len(numbers) != count if count is not None else not numbers
    if wrong_count or not np.isfinite(numbers).all():
        raise UserError(f"{where} is {value!r}; expected {count or 'a list of'} finite numbers")
    return numbers


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not np.isfinite(value):
        raise UserError(f"{where} is {value!r}; expected a finite number")
    return float(value)
