# SPDX-License-Identifier: Apache-2.0
"""A drive read from a bag has the rounds, geometry and ground truth of the data set it was converted from."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from ftkd_core.classes import CAMERA_CHANNELS
from ftkd_core.data import nuscenes
from ftkd_core.errors import UserError
from ftkd_ros.bag.io import BagReader, BagWriter
from ftkd_ros.bag.message_definitions import ROSBAGS
from ftkd_ros.bag.replay_rounds import Drive, nearest
from ftkd_ros.convert import to_ros
from tests.ros.driving_scene import OFFSETS_US, START_US, SWEEP_US, ego_pose
from tests.ros.recorded_drive import RecordedDrive, record_drive


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> RecordedDrive:
    return record_drive(tmp_path_factory.mktemp("drive"))


def copy_without(source: Path, target: Path, topic: str) -> Path:
    """Copy a bag without one topic."""
    with BagReader(source) as reader, BagWriter(target) as writer:
        kept = [connection for connection in reader.connections if connection.topic != topic]
        for connection in kept:
            writer.add_topic(connection.topic, connection.msgtype)
        for connection, stamp, content in reader.raw([connection.topic for connection in kept]):
            writer.write_raw(connection.topic, stamp, content)
    return target


@pytest.mark.parametrize(("kind", "rounds"), [("sweeps", 25), ("key_frames", 5)])
def test_rounds_equal_those_of_the_data_set(recorded: RecordedDrive, kind: str, rounds: int) -> None:
    dataset = nuscenes.open_dataset(recorded.dataroot, recorded.version)
    expected = nuscenes.sweep_rounds(dataset, recorded.scene, keyframes_only=kind == "key_frames")
    with BagReader(getattr(recorded, kind)) as bag:
        found = list(Drive(bag).rounds())
    assert len(found) == len(expected) == rounds
    for (camera_round, after_jump), sweep in zip(found, expected, strict=True):
        truth = nuscenes.load_sweep_round(sweep)
        assert not after_jump
        assert camera_round.reference_stamp_ns == truth.reference_stamp_ns
        np.testing.assert_allclose(camera_round.global_from_ego, truth.global_from_ego, atol=1e-9)
        for view, expected_view in zip(camera_round.views, truth.views, strict=True):
            assert view is not None and expected_view is not None
            assert view.stamp_ns == expected_view.stamp_ns
            np.testing.assert_array_equal(view.image, expected_view.image)
            np.testing.assert_allclose(view.intrinsics, expected_view.intrinsics)
            np.testing.assert_allclose(view.ego_from_camera, expected_view.ego_from_camera, atol=1e-9)
            np.testing.assert_allclose(view.global_from_ego, expected_view.global_from_ego, atol=1e-9)


def test_time_offsets_are_estimated_from_many_rounds_and_from_one(
    recorded: RecordedDrive, tmp_path: Path
) -> None:
    with BagReader(recorded.sweeps) as bag:
        many = Drive(bag).offsets_ns
    single = tmp_path / "single"
    with BagReader(recorded.key_frames) as reader, BagWriter(single) as writer:
        for connection in reader.connections:
            writer.add_topic(connection.topic, connection.msgtype)
        for connection, stamp, content in reader.raw():
            if stamp < START_US * 1000 + 10**8 or connection.topic == "/tf":
                writer.write_raw(connection.topic, stamp, content)
    with BagReader(single) as bag:
        drive = Drive(bag)
        one = drive.offsets_ns
        assert len(drive.reference_stamps()) == 1
    expected = np.array([OFFSETS_US[channel] * 1000 for channel in CAMERA_CHANNELS])
    for offsets in (many, one):
        differences = np.array(offsets, dtype=np.int64) - expected
        np.testing.assert_allclose(differences, differences[0], atol=10_000)


def test_only_rounds_near_the_given_stamps_are_decoded(recorded: RecordedDrive) -> None:
    with BagReader(recorded.sweeps) as bag:
        drive = Drive(bag)
        stamp = drive.reference_stamps()[7]
        assert [camera_round.reference_stamp_ns for camera_round, _ in drive.rounds(near_ns=[stamp])] == [
            stamp
        ]


def test_key_frames_and_ground_truth_equal_those_of_the_data_set(recorded: RecordedDrive) -> None:
    dataset = nuscenes.open_dataset(recorded.dataroot, recorded.version)
    tokens = nuscenes.scene_samples(dataset, recorded.scene)
    with BagReader(recorded.key_frames) as bag:
        drive = Drive(bag)
        assert [key_frame.token for key_frame in drive.key_frames()] == tokens
        truths = drive.ground_truth()
    for token in tokens:
        expected = nuscenes.ground_truth(dataset, token)
        found = truths[expected.stamp_ns]
        np.testing.assert_allclose(found.boxes, expected.boxes, atol=1e-4)  # velocities are stored as float32
        assert found.ids == expected.ids


def test_poses_are_interpolated_and_never_extrapolated(recorded: RecordedDrive) -> None:
    stamp_us = START_US + SWEEP_US + 20_000
    with BagReader(recorded.sweeps) as bag:
        rig = Drive(bag).rig
        np.testing.assert_allclose(rig.global_from_ego(stamp_us * 1000), ego_pose(stamp_us), atol=1e-4)
        with pytest.raises(UserError, match="no transform map <- base_link at"):
            rig.global_from_ego(START_US * 1000 - 1)


def test_missing_camera_is_none_in_every_round(recorded: RecordedDrive, tmp_path: Path) -> None:
    bag_path = copy_without(recorded.key_frames, tmp_path / "bag", "/cam_back/image/compressed")
    with BagReader(bag_path) as bag:
        rounds = [camera_round for camera_round, _ in Drive(bag).rounds()]
    assert len(rounds) == 5
    back = CAMERA_CHANNELS.index("CAM_BACK")
    for camera_round in rounds:
        assert [index for index, view in enumerate(camera_round.views) if view is None] == [back]


def test_camera_without_calibration_is_masked_and_counted(recorded: RecordedDrive, tmp_path: Path) -> None:
    bag_path = copy_without(recorded.key_frames, tmp_path / "bag", "/cam_front/camera_info")
    with BagReader(bag_path) as bag:
        drive = Drive(bag)
        rounds = [camera_round for camera_round, _ in drive.rounds()]
    assert all(camera_round.views[0] is None for camera_round in rounds)
    (reason, count), *others = drive.faults.items()
    assert "no topic /cam_front/camera_info" in reason
    assert (count, others) == (5, [])


def test_truncated_image_is_masked_and_counted(recorded: RecordedDrive, tmp_path: Path) -> None:
    target = tmp_path / "bag"
    truncated = cv2.imencode(".jpg", np.zeros((36, 64, 3), dtype=np.uint8))[1].tobytes()[:200]
    with BagReader(recorded.key_frames) as reader, BagWriter(target) as writer:
        for connection in reader.connections:
            writer.add_topic(connection.topic, connection.msgtype)
        for connection, stamp, content in reader.raw():
            if connection.topic == "/cam_front/image/compressed":
                writer.write(
                    connection.topic, stamp, to_ros.compressed_image(ROSBAGS, truncated, stamp, "cam_front")
                )
            else:
                writer.write_raw(connection.topic, stamp, content)
    with BagReader(target) as bag:
        drive = Drive(bag)
        rounds = [camera_round for camera_round, _ in drive.rounds()]
    assert [camera_round.views[0] for camera_round in rounds] == [None] * 5
    assert drive.faults.total() == 5


@pytest.mark.parametrize(
    ("topic", "message"),
    [
        ("/tf", "has no topic /tf; it has "),
        ("/tf_static", "has no topic /tf_static"),
        ("/sample_token", "sample_token"),
    ],
)
def test_error_for_a_missing_required_topic_lists_the_existing_topics(
    recorded: RecordedDrive, tmp_path: Path, topic: str, message: str
) -> None:
    with (
        BagReader(copy_without(recorded.key_frames, tmp_path / "bag", topic)) as bag,
        pytest.raises(UserError, match=message) as error,
    ):
        Drive(bag).key_frames()
    assert "/cam_front/image/compressed" in str(error.value)


def test_bag_without_camera_topics_is_refused(tmp_path: Path) -> None:
    with BagWriter(tmp_path / "bag") as writer:
        writer.add_topic("/odom", "nav_msgs/msg/Odometry")
    with (
        BagReader(tmp_path / "bag") as bag,
        pytest.raises(UserError, match=r"no camera topic .* it has /odom"),
    ):
        Drive(bag)


def test_nearest_returns_none_beyond_the_limit() -> None:
    assert nearest([10, 20, 30], 24, 5) == 20
    assert nearest([10, 20, 30], 100, 5) is None
    assert nearest([], 0, 5) is None
