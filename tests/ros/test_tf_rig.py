# SPDX-License-Identifier: Apache-2.0
"""Geometry from camera_info and tf: time of exposure, checks, and the limit of the wait."""

import threading
import time

import numpy as np
import pytest
from geometry_msgs.msg import TransformStamped
from numpy.typing import NDArray
from sensor_msgs.msg import CameraInfo
from tf2_ros import Buffer

from ftkd_core.errors import UserError
from ftkd_core.geometry import yaw_transform
from ftkd_ros.convert.message_factory import RCLPY
from ftkd_ros.convert.to_ros import make_header, make_transforms
from ftkd_ros.node.ego_motion import RewindingBuffer, TfPose
from ftkd_ros.node.tf_rig import RigReader

SECOND = 1_000_000_000
SIZE = (64, 48)


def transform(parent: str, child: str, stamp_ns: int, matrix: NDArray[np.float64]) -> TransformStamped:
    return make_transforms(RCLPY, stamp_ns, parent, {child: matrix}).transforms[0]


def camera_info(**changes: object) -> CameraInfo:
    message = CameraInfo(width=SIZE[0], height=SIZE[1], k=[50.0, 0.0, 32.0, 0.0, 50.0, 24.0, 0.0, 0.0, 1.0])
    message.header.frame_id = "cam_front"
    for name, value in changes.items():
        setattr(message, name, value)
    return message


def make_reader(buffer: Buffer) -> RigReader:
    pose = TfPose(buffer, "base_link", "map")
    return RigReader(["cam_front"], buffer, base_frame="base_link", ego_motion=pose)


@pytest.fixture
def rig() -> RigReader:
    buffer = Buffer()
    buffer.set_transform_static(
        transform("base_link", "cam_front", 0, yaw_transform(0.3, (1.5, 0, 1.6))), "test"
    )
    for second in range(3):
        pose = yaw_transform(0.2 * second, (10.0 * second, 0, 0))
        buffer.set_transform(transform("map", "base_link", (second + 1) * SECOND, pose), "test")
    reader = RigReader(
        ["cam_front"], buffer, base_frame="base_link", ego_motion=TfPose(buffer, "base_link", "map")
    )
    reader.add_camera_info(camera_info(), "cam_front")
    return reader


def test_looped_stream_of_transforms_clears_the_buffer() -> None:
    buffer = RewindingBuffer()
    buffer.set_transform_static(
        transform("base_link", "cam_front", 0, yaw_transform(0.0, (1.5, 0, 0))), "test"
    )
    for start in (100.0, 0.0):
        for second in (1000, 1001):
            pose = yaw_transform(0.0, (start + second, 0, 0))
            buffer.set_transform(transform("map", "base_link", round(second + start) * SECOND, pose), "test")
    rig = RigReader(
        ["cam_front"], buffer, base_frame="base_link", ego_motion=TfPose(buffer, "base_link", "map")
    )
    rig.add_camera_info(camera_info(), "cam_front")
    found = rig.geometry("cam_front", "cam_front", 1000 * SECOND, SIZE, soon())
    assert found.global_from_ego[0, 3] == 1000.0
    assert found.ego_from_camera[0, 3] == 1.5
    with pytest.raises(UserError):
        rig.global_from_ego(1100 * SECOND, soon(0.01))


def soon(seconds: float = 0.05) -> float:
    return time.monotonic() + seconds


def test_geometry_is_interpolated_at_the_exposure(rig: RigReader) -> None:
    found = rig.geometry("cam_front", "cam_front", SECOND + SECOND // 4, SIZE, soon())
    np.testing.assert_allclose(found.intrinsics, [[50, 0, 32], [0, 50, 24], [0, 0, 1]])
    np.testing.assert_allclose(found.ego_from_camera, yaw_transform(0.3, (1.5, 0, 1.6)), atol=1e-9)
    np.testing.assert_allclose(found.global_from_ego, yaw_transform(0.05, (2.5, 0, 0)), atol=1e-6)


def test_frame_of_camera_info_is_used_if_the_image_has_none(rig: RigReader) -> None:
    found = rig.geometry("cam_front", "", SECOND, SIZE, soon())
    np.testing.assert_allclose(found.ego_from_camera[:3, 3], [1.5, 0, 1.6])
    rig.add_camera_info(camera_info(header=make_header(RCLPY, 0, "")), "cam_front")
    with pytest.raises(UserError, match="cam_front: neither the image nor camera_info names a frame"):
        rig.geometry("cam_front", "", SECOND, SIZE, soon())


def test_frame_of_camera_info_is_used_if_tf_does_not_know_that_of_the_image(rig: RigReader) -> None:
    found = rig.geometry("cam_front", "camera_link_of_the_driver", SECOND, SIZE, soon())
    np.testing.assert_allclose(found.ego_from_camera[:3, 3], [1.5, 0, 1.6])


def test_transform_that_arrives_after_the_image_is_awaited(rig: RigReader) -> None:
    late = transform("map", "base_link", 4 * SECOND, yaw_transform(0.6, (30.0, 0, 0)))
    thread = threading.Timer(0.05, rig._buffer.set_transform, (late, "test"))
    thread.start()
    pose = rig.global_from_ego(3 * SECOND + SECOND // 2, soon(30.0))  # a busy machine delays the timer
    thread.join()
    np.testing.assert_allclose(pose, yaw_transform(0.5, (25.0, 0, 0)), atol=1e-6)


def test_wait_ends_at_the_deadline_and_is_skipped_for_past_stamps(rig: RigReader) -> None:
    started = time.monotonic()
    with pytest.raises(UserError, match="no transform map <- base_link at 9000000000 ns"):
        rig.global_from_ego(9 * SECOND, soon(0.1))
    assert 0.09 <= time.monotonic() - started < 1.0
    started = time.monotonic()
    with pytest.raises(UserError, match="at 500000000 ns"):
        rig.global_from_ego(SECOND // 2, soon(5.0))
    assert time.monotonic() - started < 1.0


def test_camera_without_calibration_is_reported(rig: RigReader) -> None:
    with pytest.raises(UserError, match="cam_back: no camera_info has arrived"):
        rig.geometry("cam_back", "cam_back", SECOND, SIZE, soon(0.02))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"k": [float("nan")] + [0.0] * 7 + [1.0]}, "not those of a camera"),
        ({"k": [0.0] * 9}, "not those of a camera"),
        ({"k": [50.0, 0.0, 32.0, 0.0, -50.0, 24.0, 0.0, 0.0, 1.0]}, "not those of a camera"),
        ({"k": [50.0, 0.0, 32.0, 0.0, 50.0, 24.0, 0.0, 0.0, 0.0]}, "not those of a camera"),
        ({"width": 128}, "camera_info is for 128 x 48 pixels but the image has 64 x 48"),
        ({"width": 0, "height": 0}, "camera_info is for 0 x 0 pixels"),
    ],
)
def test_error_for_a_bad_calibration_names_the_camera(
    rig: RigReader, changes: dict[str, object], match: str
) -> None:
    rig.add_camera_info(camera_info(**changes), "cam_front")
    with pytest.raises(UserError, match=f"cam_front: .*{match}"):
        rig.geometry("cam_front", "cam_front", SECOND, SIZE, soon())


def test_new_calibration_is_used_from_the_next_round(rig: RigReader) -> None:
    rig.add_camera_info(camera_info(k=[70.0, 0.0, 32.0, 0.0, 70.0, 24.0, 0.0, 0.0, 1.0]), "cam_front")
    assert rig.geometry("cam_front", "cam_front", SECOND, SIZE, soon()).intrinsics[0, 0] == 70
