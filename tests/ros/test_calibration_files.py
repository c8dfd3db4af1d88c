# SPDX-License-Identifier: Apache-2.0
"""Calibration and extrinsics from files: camera_calibration YAML, URDF, YAML poses; bad entries are named."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rclpy.time import Time
from scipy.spatial.transform import Rotation

from ftkd_core.errors import UserError
from ftkd_ros.convert.calibration import read_calibration
from ftkd_ros.convert.calibration_files import read_camera_yaml, read_extrinsics
from ftkd_ros.convert.message_factory import RCLPY
from ftkd_ros.convert.to_ros import make_transforms
from ftkd_ros.node.ego_motion import RewindingBuffer, look_up

CALIBRATION: dict[str, Any] = {
    "image_width": 640,
    "image_height": 480,
    "camera_name": "front",
    "camera_matrix": {"rows": 3, "cols": 3, "data": [500.0, 0, 320, 0, 510.0, 240, 0, 0, 1]},
    "distortion_model": "plumb_bob",
    "distortion_coefficients": {"rows": 1, "cols": 5, "data": [-0.2, 0.05, 0.0, 0.0, 0.0]},
    "rectification_matrix": {"rows": 3, "cols": 3, "data": [1, 0, 0, 0, 1, 0, 0, 0, 1]},
    "projection_matrix": {"rows": 3, "cols": 4, "data": [480.0, 0, 318, 0, 0, 490, 239, 0, 0, 0, 1, 0]},
}


def write(folder: Path, content: Any, name: str = "file.yaml") -> Path:
    path = folder / name
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


def test_file_of_camera_calibration_gives_both_geometries(tmp_path: Path) -> None:
    info = read_camera_yaml(RCLPY, write(tmp_path, CALIBRATION), "front")
    raw = read_calibration(info, "front", (640, 480), image_geometry="raw")
    rectified = read_calibration(info, "front", (640, 480), image_geometry="rectified")
    assert raw.intrinsics[0, 0] == 500 and raw.lens is not None and raw.lens.model == "plumb_bob"
    assert rectified.intrinsics[0, 0] == 480 and rectified.lens is None
    assert info.header.frame_id == "front"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_width": 0}, "image_width is 0; expected a number of pixels"),
        ({"camera_matrix": None}, "camera_matrix is None; expected 9 finite numbers"),
        ({"camera_matrix": {"data": [1, 2]}}, "camera_matrix is .*expected 9 finite numbers"),
        ({"projection_matrix": {"data": [float("nan")] * 12}}, "projection_matrix is .*12 finite numbers"),
        ({"distortion_coefficients": {"data": ["a"]}}, "distortion_coefficients is .*list of finite numbers"),
    ],
)
def test_bad_entry_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = write(tmp_path, CALIBRATION | change)
    with pytest.raises(UserError, match=f"file.yaml': {message}"):
        read_camera_yaml(RCLPY, path, "front")


@pytest.mark.parametrize("content", ["a: [", "- 1", ""])
def test_file_that_is_no_mapping_is_refused(tmp_path: Path, content: str) -> None:
    path = write(tmp_path, content)
    with pytest.raises(UserError, match="file.yaml'"):
        read_camera_yaml(RCLPY, path, "front")
    with pytest.raises(UserError, match="file.yaml'"):
        read_extrinsics(path)


ANGLE = st.floats(-3, 3)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.tuples(*[st.floats(-5, 5)] * 3), roll=ANGLE, pitch=st.floats(-1.5, 1.5), yaw=ANGLE)
def test_urdf_yaml_and_quaternion_are_the_same_pose(
    tmp_path: Path, position: tuple[float, float, float], roll: float, pitch: float, yaw: float
) -> None:
    x, y, z = position
    pose = {"x": x, "y": y, "z": z}
    rotation = Rotation.from_euler("xyz", [roll, pitch, yaw])
    angles = {"base_link": {"cam": pose | {"roll": roll, "pitch": pitch, "yaw": yaw}}}
    quaternion = {"base_link": {"cam": pose | {"rotation": rotation.as_quat().tolist()}}}
    urdf = (
        '<robot name="car"><link name="base_link"/><link name="cam"/><joint name="j" type="fixed">'
        f'<parent link="base_link"/><child link="cam"/><origin xyz="{x} {y} {z}" rpy="{roll} {pitch} {yaw}"/>'
        "</joint></robot>"
    )
    paths = (
        write(tmp_path, angles),
        write(tmp_path, quaternion, "q.yaml"),
        write(tmp_path, urdf, "car.urdf"),
    )
    matrices = [read_extrinsics(path)[0].matrix for path in paths]
    for matrix in matrices:
        np.testing.assert_allclose(matrix[:3, :3], rotation.as_matrix(), atol=1e-9)
        np.testing.assert_allclose(matrix[:3, 3], position, atol=1e-9)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(yaw=st.floats(-179, 179), pitch=st.floats(-80, 80))
def test_yaw_and_pitch_give_an_optical_frame(tmp_path: Path, yaw: float, pitch: float) -> None:
    path = write(tmp_path, {"base_link": {"cam": {"z": 1.5, "yaw_deg": yaw, "pitch_deg": pitch}}})
    matrix = read_extrinsics(path)[0].matrix
    forward = matrix[:3, 2]
    assert np.rad2deg(np.arctan2(forward[1], forward[0])) == pytest.approx(yaw, abs=1e-6)
    assert np.rad2deg(np.arcsin(-forward[2])) == pytest.approx(pitch, abs=1e-6)
    assert matrix[2, 0] == pytest.approx(0, abs=1e-9)  # x of the image is level


def test_joints_of_a_urdf_are_chained(tmp_path: Path) -> None:
    joint = (
        '<joint name="{0}" type="{3}"><parent link="{1}"/><child link="{2}"/><origin xyz="1 0 0"/></joint>'
    )
    text = joint.format("a", "base_link", "mast", "fixed") + joint.format("b", "mast", "cam", "fixed")
    text += joint.format("w", "base_link", "wheel", "continuous")
    path = write(tmp_path, f"<robot>{text}</robot>", "car.urdf")
    buffer = RewindingBuffer()
    for mount in read_extrinsics(path):
        message = make_transforms(RCLPY, 0, mount.parent, {mount.child: mount.matrix})
        buffer.set_transform_static(message.transforms[0], "test")
    assert look_up(buffer, "base_link", "cam", 10, 0.0)[0, 3] == 2
    assert not buffer.can_transform("base_link", "wheel", Time())


@pytest.mark.parametrize(
    ("pose", "message"),
    [
        ({"x": 1, "yaw": 1, "yaw_deg": 1}, "cam has x, yaw, yaw_deg; expected x, y, z and roll"),
        ({"heading": 1}, "cam has heading; expected"),
        ({"x": "front"}, "cam: x is 'front'; expected a finite number"),
        ({"rotation": [0, 0, 0, 0]}, "expected a quaternion x, y, z, w of length 1"),
        (3, "cam is 3; expected"),
    ],
)
def test_bad_pose_is_named(tmp_path: Path, pose: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_extrinsics(write(tmp_path, {"base_link": {"cam": pose}}))
