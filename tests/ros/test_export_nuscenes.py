# SPDX-License-Identifier: Apache-2.0
"""Bag -> nuScenes layout: both round trips agree, and a user's own drive becomes a data set."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from ftkd_core.classes import CAMERA_CHANNELS
from ftkd_core.data import nuscenes
from ftkd_core.errors import UserError
from ftkd_core.lens import Lens
from ftkd_ros.bag.convert import convert_scene
from ftkd_ros.bag.detect import detect_bag
from ftkd_ros.bag.export_nuscenes import ExportOptions, export_bags, rectify
from ftkd_ros.bag.io import BagReader
from ftkd_ros.bag.message_definitions import ROSBAGS
from ftkd_ros.cli import main
from ftkd_ros.convert.images import image_to_rgb
from ftkd_ros.convert.to_ros import rgb_to_image
from ftkd_ros.node.parameters import DetectorParameters
from tests.ros.driving_scene import SCENE, VERSION
from tests.ros.recorded_drive import GroundTruthDetector, RecordedDrive, record_drive
from tests.ros.rewritten_bags import Message, renamed, rewrite

OPTIONS = ExportOptions(version=VERSION)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> RecordedDrive:
    return record_drive(tmp_path_factory.mktemp("export"))


@pytest.fixture(scope="module")
def exported(recorded: RecordedDrive, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("exported") / "data"
    summary = export_bags([recorded.sweeps], output, options=OPTIONS)
    assert (summary.images, summary.key_frames, summary.annotations, summary.faults) == (150, 5, 5, {})
    return output


def test_exported_scene_equals_the_scene_that_was_converted(recorded: RecordedDrive, exported: Path) -> None:
    before = nuscenes.open_dataset(recorded.dataroot, VERSION)
    after = nuscenes.open_dataset(exported, VERSION)
    assert after.notes == []
    tokens = nuscenes.scene_samples(before, SCENE)
    assert nuscenes.scene_samples(after, SCENE) == tokens
    for channel in CAMERA_CHANNELS:
        pairs = zip(*(nuscenes.camera_records(d, SCENE, channel) for d in (before, after)), strict=True)
        for old, new in pairs:
            assert (old.stamp_ns, old.is_key_frame) == (new.stamp_ns, new.is_key_frame)
            assert (old.sample_token, old.width, old.height) == (new.sample_token, new.width, new.height)
            assert old.path.read_bytes() == new.path.read_bytes()
            np.testing.assert_allclose(new.intrinsics, old.intrinsics)
            np.testing.assert_allclose(new.ego_from_camera, old.ego_from_camera, atol=1e-9)
            np.testing.assert_allclose(new.global_from_ego, old.global_from_ego, atol=1e-9)
    for token in tokens:
        assert nuscenes.sample_stamp_ns(before, token) == nuscenes.sample_stamp_ns(after, token)
        np.testing.assert_allclose(
            nuscenes.sample_pose(after, token), nuscenes.sample_pose(before, token), atol=1e-9
        )
        old_truth, new_truth = (nuscenes.ground_truth(d, token) for d in (before, after))
        assert old_truth.ids == new_truth.ids
        np.testing.assert_allclose(new_truth.boxes, old_truth.boxes, atol=1e-6)
        assert nuscenes.annotation_facts(before, token) == nuscenes.annotation_facts(after, token)
    assert nuscenes.split_scenes(after, "exported") == [SCENE]


def test_bag_of_an_exported_bag_equals_the_bag(
    recorded: RecordedDrive, exported: Path, tmp_path: Path
) -> None:
    """All topics but poses at lidar sweeps between key frames, which are not exported."""
    convert_scene(exported, VERSION, SCENE, tmp_path / "again", progress=False)
    contents = []
    for bag in (recorded.sweeps, tmp_path / "again"):
        with BagReader(bag) as reader:
            contents.append(
                {
                    (connection.topic, stamp_ns): content
                    for connection, stamp_ns, content in reader.raw()
                    if connection.topic.startswith(("/cam_", "/sample_token", "/ground_truth", "/tf"))
                }
            )
    before, after = contents
    assert {key for key in before if key not in after} == {
        key for key in before if key[0] == "/tf" and key not in after
    }
    assert set(after) <= set(before)
    same = [
        key for key in after if key[0].startswith(("/cam_", "/sample_token")) and not key[0].endswith("info")
    ]
    assert all(before[key] == after[key] for key in same) and len(same) == 155
    with BagReader(recorded.sweeps) as old, BagReader(tmp_path / "again") as new:
        topics = ["/ground_truth/annotations", "/cam_back/camera_info"]
        pairs = zip(old.messages(topics), new.messages(topics), strict=True)
        for (topic, _, first), (_, _, second) in pairs:
            if topic == topics[0]:
                assert first.data == second.data
            else:
                np.testing.assert_allclose(first.p, second.p)


def own_drive(item: Message) -> Iterator[Message]:
    """A drive of a user: raw images of distorted cameras, no lidar, no annotations."""
    topic, msgtype, message = item
    if topic.startswith(("/ground_truth", "/sample_token", "/scene")):
        return
    if topic == "/tf_static":
        message.transforms = [part for part in message.transforms if part.child_frame_id != "lidar_top"]
    if topic.endswith("camera_info"):
        message.d = np.array([-0.1, 0.01, 0.0, 0.0, 0.0])
    if topic.endswith("/compressed"):
        stamp = message.header.stamp
        stamp_ns = stamp.sec * 10**9 + stamp.nanosec
        raw = rgb_to_image(ROSBAGS, image_to_rgb(message, topic), stamp_ns, message.header.frame_id)
        yield topic.removesuffix("/compressed"), "sensor_msgs/msg/Image", raw
    else:
        yield topic, msgtype, message


def test_own_drive_with_detections_becomes_a_data_set(recorded: RecordedDrive, tmp_path: Path) -> None:
    bag = rewrite(recorded.sweeps, tmp_path / "drive", own_drive)
    detector = GroundTruthDetector(recorded.sweeps)
    detect_bag(bag, tmp_path / "found", factory=lambda _: detector, progress=False)
    arguments = ["--bag", bag, "--detections", tmp_path / "found", "--output", tmp_path / "data"]
    assert main(["export-nuscenes", *map(str, arguments), "--min-score", "0.5"]) == 0
    data = ["--dataroot", str(tmp_path / "data"), "--version", "v1.0-bag"]
    assert main(["check-data", *data]) == 0
    dataset = nuscenes.open_dataset(tmp_path / "data", "v1.0-bag")
    tokens = nuscenes.scene_samples(dataset, "drive")
    stamps = np.array([nuscenes.sample_stamp_ns(dataset, token) for token in tokens])
    assert len(tokens) == 5 and np.abs(np.diff(stamps) - 0.5e9).max() < 1e6
    camera_round = nuscenes.camera_round(dataset, tokens[1])
    assert all(view is not None for view in camera_round.views)
    truth = nuscenes.ground_truth(dataset, tokens[1])
    expected = detector.step(camera_round)
    np.testing.assert_allclose(truth.boxes[:, :6], expected.boxes[:, :6], atol=0.02)
    assert [row["nbr_annotations"] for row in dataset.instance] == [5]  # one object in all key frames
    assert main(["convert", *data, "--scene", "drive", "--output", str(tmp_path / "again")]) == 0


def test_own_topics_and_frames_are_parameters(recorded: RecordedDrive, tmp_path: Path) -> None:
    bag = rewrite(recorded.key_frames, tmp_path / "drive", renamed)
    arguments = ["--bag", str(bag), "--output", str(tmp_path / "data")]
    assert main(["export-nuscenes", *arguments]) == 2
    parameters = [
        "cameras:=[cam_front, cam_back]", "image_topic:=/car/{camera}/image/compressed",
        "camera_info_topic:=/car/{camera}/camera_info", "base_frame:=ego", "map_frame:=odom",
    ]  # fmt: skip
    given = [part for text in parameters for part in ("-p", text)]
    assert not (tmp_path / "data").exists()
    options = ExportOptions(parameters=DetectorParameters())
    with pytest.raises(UserError, match="no transform map or odom -> base_link"):
        export_bags([bag], tmp_path / "data", options=options)
    # The detections of the bag are in frame base_link, which this drive calls ego.
    plain = rewrite(bag, tmp_path / "plain", lambda item: iter([item] if "truth" not in item[0] else []))
    assert main(["export-nuscenes", "--bag", str(plain), "--output", str(tmp_path / "data"), *given]) == 0
    dataset = nuscenes.open_dataset(tmp_path / "data", "v1.0-bag")
    assert nuscenes.camera_channels(dataset) == ("CAM_FRONT", "CAM_BACK")
    assert not dataset.has_ground_truth


def test_several_bags_become_scenes_and_equal_bags_give_equal_tables(
    recorded: RecordedDrive, tmp_path: Path
) -> None:
    for name in ("first", "second"):
        export_bags([recorded.key_frames], tmp_path / name, options=OPTIONS)
    for table in nuscenes.TABLE_NAMES:
        paths = [tmp_path / name / VERSION / f"{table}.json" for name in ("first", "second")]
        assert paths[0].read_bytes() == paths[1].read_bytes()
    other = rewrite(recorded.key_frames, tmp_path / "other", own_drive)
    summary = export_bags([recorded.key_frames, other], tmp_path / "both", options=OPTIONS)
    assert summary.scenes == [SCENE, "other"]
    dataset = nuscenes.open_dataset(tmp_path / "both", VERSION)
    assert len(dataset.sample) == 10 and nuscenes.scene_names(dataset) == summary.scenes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key_interval_s": 0.0}, "key frame interval 0 s"),
        ({"min_score": 2.0}, "minimum score 2"),
        ({"version": "../up"}, "version '../up'"),
    ],
)
def test_bad_options_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ExportOptions(**change)


def test_failed_export_leaves_nothing(recorded: RecordedDrive, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(UserError, match="exists already"):
        export_bags([recorded.key_frames], tmp_path / "taken")
    with pytest.raises(UserError, match="1 bags of detections for 2 bags"):
        export_bags([recorded.key_frames] * 2, tmp_path / "new", detections=[recorded.key_frames])
    with pytest.raises(UserError, match="no topic /detections"):
        export_bags([recorded.key_frames], tmp_path / "new", detections=[recorded.key_frames])
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_rectified_image_is_that_of_a_pinhole() -> None:
    """A straight line in space, bent by the lens, becomes straight."""
    lens, intrinsics = (
        Lens("plumb_bob", (-0.2, 0.03, 0.0, 0.0, 0.0)),
        np.array([[200.0, 0, 160], [0, 200, 120], [0, 0, 1]]),
    )
    distorted = np.zeros((240, 320, 3), dtype=np.uint8)
    line = np.stack([np.linspace(-0.9, 0.9, 2000), np.full(2000, 0.45), np.ones(2000)], axis=1)
    points, _ = lens.project(line)
    for x, y in points @ intrinsics[:2, :2].T + intrinsics[:2, 2]:
        cv2.circle(distorted, (round(x), round(y)), 1, (255, 255, 255), -1)
    rows = np.argmax(rectify(distorted, intrinsics, lens)[:, 10:310, 0].astype(int), axis=0)
    bent = np.argmax(distorted[:, 30:290, 0].astype(int), axis=0)
    assert np.ptp(rows) <= 2 < np.ptp(bent)
    assert abs(np.median(rows) - (120 + 200 * 0.45)) <= 2


def test_tables_have_the_columns_of_the_devkit(exported: Path, recorded: RecordedDrive) -> None:
    for table in nuscenes.TABLE_NAMES:
        rows = json.loads((exported / VERSION / f"{table}.json").read_text())
        expected = json.loads((recorded.dataroot / VERSION / f"{table}.json").read_text())
        if rows:
            assert set(expected[0]) <= set(rows[0]), table
