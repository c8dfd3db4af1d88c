# SPDX-License-Identifier: Apache-2.0
"""nuScenes -> bag: content and order of the messages."""

import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import yaml

from ftkd_core.classes import CAMERA_CHANNELS
from ftkd_core.data import nuscenes
from ftkd_core.errors import UserError
from ftkd_core.geometry import invert_rigid
from ftkd_ros.bag.convert import ConversionSummary, convert_scene
from ftkd_ros.bag.io import BagReader
from ftkd_ros.convert.from_ros import detections_to_objects, stamp_to_ns, transform_to_matrix
from tests.ros.driving_scene import (
    CAR_SPEED_M_S,
    OFFSETS_US,
    SCENE,
    SPEED_M_S,
    START_US,
    SWEEP_US,
    TURN_RAD_S,
    VERSION,
    ego_pose,
    write_drive,
)

REPOSITORY = Path(__file__).resolve().parents[2]
SAMPLE_ROOT = Path(
    os.environ.get("FTKD_NUSCENES_SAMPLE", REPOSITORY.parent / "shared/data/nuscenes_one_sample")
)
SWEEPS = 13
KEY_FRAMES = 3


@pytest.fixture(scope="module")
def dataroot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_drive(tmp_path_factory.mktemp("drive"), sweeps=SWEEPS)


@pytest.fixture(scope="module")
def summary(dataroot: Path) -> ConversionSummary:
    return convert_scene(dataroot, VERSION, SCENE, dataroot / "bags" / "all", progress=False)


class BagContent(NamedTuple):
    """Messages of a bag: (log time, message) by topic, and (topic, log time, message) in order."""

    by_topic: dict[str, list[tuple[int, Any]]]
    in_order: list[tuple[str, int, Any]]


@pytest.fixture(scope="module")
def recorded(summary: ConversionSummary) -> BagContent:
    return read(summary.output)


def read(bag: Path) -> BagContent:
    by_topic: dict[str, list[tuple[int, Any]]] = {}
    with BagReader(bag) as reader:
        in_order = list(reader.messages(sorted(reader.topics)))
    for topic, time_ns, message in in_order:
        by_topic.setdefault(topic, []).append((time_ns, message))
    return BagContent(by_topic, in_order)


def test_image_files_are_stored_unchanged(
    dataroot: Path, summary: ConversionSummary, recorded: BagContent
) -> None:
    assert summary.images == 6 * SWEEPS and summary.key_frames == KEY_FRAMES
    for channel in CAMERA_CHANNELS:
        found = recorded.by_topic[f"/{channel.lower()}/image/compressed"]
        assert len(found) == SWEEPS
        for sweep, (log_time_ns, message) in enumerate(found):
            stamp_us = START_US + sweep * SWEEP_US + OFFSETS_US[channel]
            assert log_time_ns == stamp_to_ns(message.header.stamp) == stamp_us * 1000
            assert message.header.frame_id == channel.lower() and message.format == "jpeg"
            assert message.data.tobytes() == (dataroot / f"samples/{channel}/{stamp_us}.jpg").read_bytes()


def test_camera_info_equals_the_calibration_of_the_data_set(dataroot: Path, recorded: BagContent) -> None:
    dataset = nuscenes.open_dataset(dataroot, VERSION)
    for channel in CAMERA_CHANNELS:
        record = nuscenes.camera_records(dataset, SCENE, channel)[0]
        infos = recorded.by_topic[f"/{channel.lower()}/camera_info"]
        images = recorded.by_topic[f"/{channel.lower()}/image/compressed"]
        assert [(time, info.header.frame_id) for time, info in infos] == [
            (time, image.header.frame_id) for time, image in images
        ]
        info = infos[0][1]
        assert (info.width, info.height) == (record.width, record.height)
        assert info.distortion_model == "plumb_bob" and not info.d.any()
        np.testing.assert_array_equal(info.k.reshape(3, 3), record.intrinsics)
        np.testing.assert_array_equal(info.p.reshape(3, 4), np.c_[record.intrinsics, np.zeros(3)])
        np.testing.assert_array_equal(info.r.reshape(3, 3), np.eye(3))


def test_tf_has_the_exact_pose_at_every_exposure(recorded: BagContent) -> None:
    moving = [message.transforms[0] for _, message in recorded.by_topic["/tf"]]
    assert len(moving) == 7 * SWEEPS
    for transform in moving:
        assert (transform.header.frame_id, transform.child_frame_id) == ("map", "base_link")
        expected = ego_pose(stamp_to_ns(transform.header.stamp) // 1000)
        np.testing.assert_allclose(transform_to_matrix(transform.transform), expected, rtol=0, atol=1e-9)


def test_tf_static_has_the_pose_of_every_sensor_in_the_vehicle(dataroot: Path, recorded: BagContent) -> None:
    ((log_time_ns, message),) = recorded.by_topic["/tf_static"]
    assert log_time_ns == START_US * 1000
    expected = nuscenes.sensor_poses(nuscenes.open_dataset(dataroot, VERSION), SCENE)
    found = {t.child_frame_id: t for t in message.transforms}
    assert set(found) == {channel.lower() for channel in expected}
    for channel, pose in expected.items():
        transform = found[channel.lower()]
        assert transform.header.frame_id == "base_link"
        np.testing.assert_allclose(transform_to_matrix(transform.transform), pose, rtol=0, atol=1e-9)


def test_odometry_velocity_is_in_the_vehicle_frame(recorded: BagContent) -> None:
    for _, message in recorded.by_topic["/odom"]:
        expected = ego_pose(stamp_to_ns(message.header.stamp) // 1000)
        np.testing.assert_allclose(transform_to_matrix(message.pose.pose), expected, rtol=0, atol=1e-9)
        linear, angular = message.twist.twist.linear, message.twist.twist.angular
        # One-sided differences at both ends: a turn of 0.2 rad/s during 50 ms is 5 mrad.
        np.testing.assert_allclose([linear.x, linear.y], [SPEED_M_S, 0], atol=0.06)
        np.testing.assert_allclose([angular.x, angular.y, angular.z], [0, 0, TURN_RAD_S], atol=0.01)


def test_ground_truth_round_trips(dataroot: Path, recorded: BagContent) -> None:
    dataset = nuscenes.open_dataset(dataroot, VERSION)
    tokens = recorded.by_topic["/sample_token"]
    assert [message.frame_id for _, message in tokens] == nuscenes.scene_samples(dataset, SCENE)
    truths = recorded.by_topic["/ground_truth/detections"]
    clouds = recorded.by_topic["/ground_truth/velocities"]
    assert len(truths) == len(clouds) == KEY_FRAMES
    for (_, token), (_, truth), (_, cloud) in zip(tokens, truths, clouds, strict=True):
        expected = nuscenes.ground_truth(dataset, token.frame_id)
        found = detections_to_objects(truth, cloud)
        assert found.stamp_ns == expected.stamp_ns == stamp_to_ns(token.stamp)
        assert found.ids == expected.ids == ("car1",) and truth.header.frame_id == "base_link"
        np.testing.assert_array_equal(found.labels, expected.labels)
        np.testing.assert_allclose(found.boxes[:, :7], expected.boxes[:, :7], rtol=0, atol=1e-9)
        np.testing.assert_allclose(found.boxes[:, 7:], expected.boxes[:, 7:], rtol=1e-6)  # float32
        assert np.hypot(*found.boxes[0, 7:]) == pytest.approx(CAR_SPEED_M_S, rel=1e-3)


def test_transforms_and_camera_info_precede_their_image(recorded: BagContent) -> None:
    """Before each image, the bag has the transform at its exposure and its camera_info."""
    pose_stamps: set[int] = set()
    infos: set[tuple[str, int]] = set()
    seen_static = False
    for topic, log_time_ns, message in recorded.in_order:
        seen_static |= topic == "/tf_static"
        if topic == "/tf":
            pose_stamps.add(stamp_to_ns(message.transforms[0].header.stamp))
        elif topic.endswith("/camera_info"):
            infos.add((message.header.frame_id, log_time_ns))
        elif topic.endswith("/compressed"):
            assert seen_static and log_time_ns in pose_stamps
            assert (message.header.frame_id, log_time_ns) in infos
        elif topic.startswith(("/ground_truth", "/sample_token")):
            assert log_time_ns in pose_stamps
    times = [log_time_ns for _, log_time_ns, _ in recorded.in_order]
    assert times == sorted(times)


def test_metadata_has_the_fields_that_ros2_bag_play_needs(summary: ConversionSummary) -> None:
    information = yaml.safe_load((summary.output / "metadata.yaml").read_text())[
        "rosbag2_bagfile_information"
    ]
    assert information["storage_identifier"] == "mcap" and information["version"] == 8
    assert information["custom_data"]["scene"] == SCENE
    assert (summary.output / information["relative_file_paths"][0]).is_file()
    durability = {}
    for topic in information["topics_with_message_count"]:
        (profile,) = yaml.safe_load(topic["topic_metadata"]["offered_qos_profiles"])
        assert profile["reliability"] == 1 and profile["history"] == 1 and profile["depth"] >= 1
        durability[topic["topic_metadata"]["name"]] = profile["durability"]
        assert topic["topic_metadata"]["type_description_hash"].startswith("RIHS01_")
    assert [name for name, value in durability.items() if value == 1] == ["/tf_static"]
    with BagReader(summary.output) as reader:
        assert all(connection.msgdef.data for connection in reader.connections)


def test_key_frame_bag_keeps_the_poses_of_all_sweeps(dataroot: Path, tmp_path: Path) -> None:
    found = convert_scene(dataroot, VERSION, SCENE, tmp_path / "keys", sweeps=False, progress=False)
    assert found.images == 6 * KEY_FRAMES
    assert found.messages["/tf"] == 7 * SWEEPS
    stamps = [time for time, _ in read(found.output).by_topic["/cam_back/image/compressed"]]
    step = 6 * SWEEP_US
    assert stamps == [(START_US + k * step + OFFSETS_US["CAM_BACK"]) * 1000 for k in range(KEY_FRAMES)]


def test_existing_output_is_refused_and_unchanged(dataroot: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "user_file").write_text("user data")
    with pytest.raises(UserError, match="taken' exists already"):
        convert_scene(dataroot, VERSION, SCENE, tmp_path / "taken", progress=False)
    assert [path.name for path in tmp_path.rglob("*")] == ["taken", "user_file"]


def test_error_for_an_unknown_scene_lists_the_existing_scenes(dataroot: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"scene-0999.*has scene-0001"):
        convert_scene(dataroot, VERSION, "scene-0999", tmp_path / "bag", progress=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["missing", "not an image"])
def test_damaged_image_is_named_in_the_error_and_leaves_no_bag(tmp_path: Path, damage: str) -> None:
    root = write_drive(tmp_path / "data", sweeps=2)
    path = root / f"samples/CAM_BACK/{START_US + SWEEP_US + OFFSETS_US['CAM_BACK']}.jpg"
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(b"<html>404</html>")
    with pytest.raises(UserError, match=path.name):
        convert_scene(root, VERSION, SCENE, tmp_path / "bag", progress=False)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["data"]


@pytest.mark.skipif(
    not (SAMPLE_ROOT / "v1.0-mini").is_dir(),
    reason=f"the real nuScenes key frame is not at {SAMPLE_ROOT} (its licence keeps it "
    "out of the repository); set FTKD_NUSCENES_SAMPLE to a folder that contains one",
)
def test_one_real_key_frame_is_converted(tmp_path: Path) -> None:
    """Velocities are unknown and therefore nan; boxes equal those of the devkit."""
    found = convert_scene(SAMPLE_ROOT, "v1.0-mini", "scene-0061", tmp_path / "one", progress=False)
    assert found.images == 6 and found.messages["/tf"] == found.messages["/odom"] == 7
    bag = read(found.output).by_topic
    ((_, truth),), ((_, cloud),) = bag["/ground_truth/detections"], bag["/ground_truth/velocities"]
    assert not cloud.is_dense
    objects = detections_to_objects(truth, cloud)
    assert len(objects.boxes) > 50 and np.isnan(objects.boxes[:, 7:]).all()
    dataset = nuscenes.open_dataset(SAMPLE_ROOT, "v1.0-mini")
    token = nuscenes.scene_samples(dataset, "scene-0061")[0]
    annotation = dataset.get("sample_annotation", dataset.get("sample", token)["anns"][0])
    ego_from_global = invert_rigid(nuscenes.sample_pose(dataset, token))
    center = (ego_from_global @ [*annotation["translation"], 1.0])[:3]
    row = objects.ids.index(annotation["instance_token"])
    np.testing.assert_allclose(objects.boxes[row, :3], center, atol=1e-6)
    np.testing.assert_allclose(objects.boxes[row, [4, 3, 5]], annotation["size"])
