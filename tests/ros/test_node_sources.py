# SPDX-License-Identifier: Apache-2.0
"""Where the node gets pose and calibration from: tf of map or odom, odometry, files, latched camera_info."""

import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from diagnostic_msgs.msg import DiagnosticStatus
from nav_msgs.msg import Odometry
from rclpy.qos import DurabilityPolicy, QoSProfile
from sensor_msgs.msg import CameraInfo

from ftkd_core.errors import UserError
from ftkd_ros.convert.message_factory import RCLPY
from ftkd_ros.convert.to_ros import make_header
from ftkd_ros.node.parameters import DetectorParameters
from tests.ros.fakes import CAMERAS, SIZE, SPEED, FakeRig, RunningNode
from tests.ros.test_node_rigs import run, statuses

pytestmark = pytest.mark.ros

INTRINSICS = [50.0, 0.0, 32.0, 0.0, 50.0, 24.0, 0.0, 0.0, 1.0]


@pytest.mark.parametrize("frame", ["map", "odom"])
def test_auto_takes_the_ground_frame_that_tf_has(frame: str, capfd: pytest.CaptureFixture[str]) -> None:
    rig = FakeRig(map_frame=frame)
    running = RunningNode(qos_reliability="reliable")
    try:
        rig.wait_until(rig.is_connected)
        run(rig, 15)
        assert rig.received["/detections"]
    finally:
        running.close()
        rig.close()
    assert f"map_frame auto: {frame}, because tf has it" in capfd.readouterr().err


def test_missing_ground_frame_is_named_with_the_parameters() -> None:
    rig = FakeRig(map_frame="world")
    running = RunningNode(qos_reliability="reliable", max_silence_s=1.0, tf_timeout_s=0.05)
    try:
        rig.wait_until(rig.is_connected)
        run(rig, 25)
        rounds = statuses(rig)["detector: rounds"]
        assert rounds.level == DiagnosticStatus.ERROR
        assert "tf has neither map nor odom above base_link" in rounds.message
        assert "set map_frame or odometry_topic" in rounds.message
    finally:
        running.close()
        rig.close()


def test_files_and_odometry_replace_tf_and_camera_info(tmp_path: Path) -> None:
    """A vehicle without /tf, /tf_static and camera_info."""
    camera = {
        "image_width": SIZE[0],
        "image_height": SIZE[1],
        "camera_matrix": {"data": INTRINSICS},
    }
    for name in CAMERAS:
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(camera))
    poses = {name: {"x": 1.5, "z": 1.6, "yaw_deg": 60.0 * index} for index, name in enumerate(CAMERAS)}
    (tmp_path / "poses.yaml").write_text(yaml.safe_dump({"base_link": poses}))
    rig = FakeRig(has_tf=False)
    running = RunningNode(
        qos_reliability="reliable",
        odometry_topic="/wheel/odometry",
        calibration_file=f"{tmp_path}/{{camera}}.yaml",
        extrinsics_file=str(tmp_path / "poses.yaml"),
    )
    publisher = rig.node.create_publisher(Odometry, "/wheel/odometry", 10)

    def publish_pose() -> None:
        stamp = time.time_ns() + 50_000_000
        message = Odometry(header=make_header(RCLPY, stamp, "odom"), child_frame_id="base_link")
        message.pose.pose.position.x = SPEED * (stamp % 10**12) * 1e-9
        message.pose.pose.orientation.w = 1.0
        publisher.publish(message)

    rig.node.create_timer(0.02, publish_pose)
    try:
        rig.wait_until(lambda: rig._images["cam_front"].get_subscription_count() > 0)
        assert rig._infos["cam_front"].get_subscription_count() == 0
        run(rig, 25)
        first, last = running.detector.rounds[0], running.detector.rounds[-1]
        moved = last.global_from_ego[0, 3] - first.global_from_ego[0, 3]
        seconds = (last.reference_stamp_ns - first.reference_stamp_ns) * 1e-9
        assert moved == pytest.approx(SPEED * seconds, abs=0.2) and seconds > 0.5
        view = last.views[1]
        assert view is not None
        np.testing.assert_allclose(view.intrinsics.ravel(), INTRINSICS)
        assert view.ego_from_camera[2, 3] == 1.6
        assert np.arctan2(view.ego_from_camera[1, 2], view.ego_from_camera[0, 2]) == pytest.approx(np.pi / 3)
    finally:
        running.close()
        rig.close()


def test_camera_info_that_was_latched_before_the_start_is_received() -> None:
    rig = FakeRig()
    latched = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
    publishers = []
    for camera in CAMERAS:
        rig.node.destroy_publisher(rig._infos[camera])
        publishers.append(rig.node.create_publisher(CameraInfo, f"/{camera}/camera_info", latched))
        info = CameraInfo(header=make_header(RCLPY, 1, camera), width=SIZE[0], height=SIZE[1])
        info.k = INTRINSICS
        publishers[-1].publish(info)
        rig._infos[camera] = rig.node.create_publisher(CameraInfo, f"/unused/{camera}", 1)
    running = RunningNode(qos_reliability="reliable")
    try:
        rig.wait_until(lambda: all(p.get_subscription_count() > 0 for p in rig._images.values()))
        run(rig, 15)
        views = running.detector.rounds[-1].views
        assert sum(view is not None for view in views) == 6
    finally:
        running.close()
        rig.close()


def test_files_that_do_not_exist_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"parameter calibration_file: no file '/nowhere/cam_front.yaml'"):
        DetectorParameters(calibration_file="/nowhere/{camera}.yaml")
    with pytest.raises(UserError, match=r"parameter extrinsics_file: no file '/nowhere/car.urdf'"):
        DetectorParameters(extrinsics_file="/nowhere/car.urdf")
    with pytest.raises(UserError, match=r"parameter odometry_topic: 'a b' is not a topic name"):
        DetectorParameters(odometry_topic="a b")
