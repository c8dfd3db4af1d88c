# SPDX-License-Identifier: Apache-2.0
"""Settings of the launch files that need no launch package: DDS environment, cameras, names for RViz."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from ftkd_core.errors import UserError
from ftkd_ros.convert.calibration_files import optical_rotation
from ftkd_ros.node.parameter_files import read_file
from ftkd_ros.node.parameters import DetectorParameters

_FAST: Final = ("FASTDDS_DEFAULT_PROFILES_FILE", "FASTRTPS_DEFAULT_PROFILES_FILE")
_BEFORE_KILTED: Final = ("humble", "iron", "jazzy")  # they read the second variable; later ones warn of it
_CYCLONE: Final = "CYCLONEDDS_URI"
_RVIZ_TOPICS: Final = ("detections/markers", "detections/surround", "detections/bird_eye")


def dds_environment(config: Path, environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that select our DDS settings; the user's own settings are kept."""
    found: dict[str, str] = {}
    if not any(name in environment for name in _FAST):
        old = environment.get("ROS_DISTRO", "") in _BEFORE_KILTED
        found[_FAST[old]] = str(config / "fastdds.xml")
    if _CYCLONE not in environment:
        found[_CYCLONE] = (config / "cyclonedds.xml").absolute().as_uri()
    return found


def camera_list(text: str) -> tuple[str, ...]:
    """Return the names of the launch argument `cameras`, separated by commas; empty: none."""
    names = tuple(name.strip() for name in text.split(",")) if text.strip() else ()
    if not all(names):
        raise UserError(f"launch argument cameras: {text!r}; expected names separated by commas")
    return names


def detector_parameters(params_file: str | Path, cameras: Sequence[str] = ()) -> DetectorParameters:
    """Return the parameters of a file for the node `detector`, with other cameras if they are given.

    Raises UserError for a file that cannot be read and for bad values.
    """
    values = read_file(Path(params_file))
    if cameras:
        values["cameras"] = list(cameras)
    chosen: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in values.items()
        if name in ("cameras", "image_transport", "image_topic", "camera_info_topic")
    }
    return DetectorParameters(**chosen)


def rviz_remappings(parameters: DetectorParameters, namespace: str) -> list[tuple[str, str]]:
    """Return the remappings of RViz: outputs in a namespace, and camera_info next to each image topic.

    RViz's Camera display expects camera_info beside the last part of the image topic.
    """
    pairs = []
    if prefix := namespace.strip("/"):
        pairs += [(f"/{topic}", f"/{prefix}/{topic}") for topic in _RVIZ_TOPICS]
    for image, info in zip(parameters.image_topics, parameters.camera_info_topics, strict=True):
        expected = f"{image.rpartition('/')[0]}/camera_info"
        if expected != info:
            pairs.append((expected, info))
    return pairs


def optical_quaternion(yaw_deg: float, pitch_deg: float) -> tuple[float, float, float, float]:
    """Return the rotation (x, y, z, w) base_link <- optical frame of a camera with this yaw and pitch.

    yaw: positive to the left; pitch: positive downwards.
    """
    x, y, z, w = (round(float(part), 9) for part in optical_rotation(yaw_deg, pitch_deg).as_quat())
    return x, y, z, w
