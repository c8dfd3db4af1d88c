# SPDX-License-Identifier: Apache-2.0
"""Bags on disk: type hashes, round trips, errors, and incomplete bags."""

import json
import os
import resource
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rosbags.rosbag2.storage_mcap import McapReader

from ftkd_core.errors import UserError
from ftkd_core.types import ObjectList
from ftkd_ros.bag.io import BagReader, BagWriter, is_latched, offered_qos
from ftkd_ros.bag.message_definitions import ROSBAGS, ensure_known, message_types
from ftkd_ros.convert import to_ros
from ftkd_ros.convert.from_ros import detections_to_objects

PUBLISHED_HASH = "RIHS01_793f5eab9595ac1c0da07873cc859db42eae51f0ee76056db8562515d830e018"
HEADER = "std_msgs/msg/Header"
IMAGE = "sensor_msgs/msg/CompressedImage"


def write_bag(path: Path, count: int = 5, size: int = 100, **options: Any) -> Path:
    with BagWriter(path, **options) as bag:
        bag.add_topic("/a", HEADER, latched=True)
        bag.add_topic("/b", IMAGE, depth=3, reliable=False)
        for number in range(count):
            bag.write("/a", 1000 + number, to_ros.make_header(ROSBAGS, number, f"frame{number}"))
            bag.write(
                "/b",
                1000 + number,
                to_ros.compressed_image(ROSBAGS, bytes([number]) * size, number, "camera"),
            )
    return path


def test_detection_arrays_have_the_published_type_hash() -> None:
    assert message_types().hash_rihs01("vision_msgs/msg/Detection3DArray") == PUBLISHED_HASH


@pytest.mark.parametrize(
    "msgtype",
    [
        "vision_msgs/msg/LabelInfo",
        "vision_msgs/msg/Detection3DArray",
        "tf2_msgs/msg/TFMessage",
        "sensor_msgs/msg/CameraInfo",
        "sensor_msgs/msg/CompressedImage",
        "sensor_msgs/msg/PointCloud2",
        "nav_msgs/msg/Odometry",
        "visualization_msgs/msg/MarkerArray",
    ],
)
def test_type_hashes_equal_those_of_the_installed_ros(msgtype: str) -> None:
    package, _, name = msgtype.partition("/msg/")
    prefixes = (*os.environ.get("AMENT_PREFIX_PATH", "").split(os.pathsep), sys.prefix)
    files = [Path(prefix, "share", package, "msg", f"{name}.json") for prefix in prefixes]
    described = json.loads(next(path for path in files if path.is_file()).read_text())
    hashes = {entry["type_name"]: entry["hash_string"] for entry in described["type_hashes"]}
    assert message_types().hash_rihs01(msgtype) == hashes[msgtype]


def test_written_messages_are_read_back(tmp_path: Path) -> None:
    with BagReader(write_bag(tmp_path / "bag", custom_data={"scene": "s"})) as reader:
        assert reader.topics == {"/a": HEADER, "/b": IMAGE}
        assert (reader.message_count, reader.start_ns, reader.end_ns) == (10, 1000, 1004)
        found = list(reader.messages(["/a"]))
        assert [(topic, time) for topic, time, _ in found] == [("/a", 1000 + n) for n in range(5)]
        assert [message.frame_id for _, _, message in found] == [f"frame{n}" for n in range(5)]
        assert [connection.topic for connection, _, _ in reader.raw()] == ["/a", "/b"] * 5
        connections = {connection.topic: connection for connection in reader.connections}
        assert is_latched(connections["/a"]) and not is_latched(connections["/b"])
        (profile,) = offered_qos(connections["/b"])
        assert profile.depth == 3 and profile.reliability.name == "BEST_EFFORT"


def test_objects_with_unknown_velocity_round_trip(tmp_path: Path) -> None:
    boxes = np.array(
        [[1, 2, 3, 4, 5, 6, 3.0, np.nan, np.nan], [9, 8, 7, 6, 5, 4, -2.5, 0.5, -0.25]], dtype=np.float64
    )
    objects = ObjectList(
        boxes=boxes,
        scores=np.array([0.5, 1.0]),
        labels=np.array([8, 0]),
        stamp_ns=12_345_678_901,
        ids=("x", "y"),
    )
    store = message_types()
    messages = []
    for message, msgtype in (
        (to_ros.objects_to_detections(ROSBAGS, objects, "base_link"), "vision_msgs/msg/Detection3DArray"),
        (to_ros.objects_to_velocities(ROSBAGS, objects, "base_link"), "sensor_msgs/msg/PointCloud2"),
    ):
        messages.append(store.deserialize_cdr(store.serialize_cdr(message, msgtype), msgtype))
    found = detections_to_objects(*messages)
    np.testing.assert_allclose(found.boxes, boxes, atol=1e-12)
    np.testing.assert_array_equal(found.scores, objects.scores)
    np.testing.assert_array_equal(found.labels, objects.labels)
    assert found.ids == objects.ids and found.stamp_ns == objects.stamp_ns
    assert not messages[1].is_dense


def test_unknown_type_is_read_from_the_installed_ros(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "share" / "wheel_msgs" / "msg"
    folder.mkdir(parents=True)
    (folder / "Wheel.msg").write_text("std_msgs/Header header\nTyre[] tyres\n")
    (folder / "Tyre.msg").write_text("float64 pressure # bar\n")
    monkeypatch.setenv("AMENT_PREFIX_PATH", f"/nowhere{os.pathsep}{tmp_path}")
    ensure_known("wheel_msgs/msg/Wheel")
    tyre, wheel = ROSBAGS.new("wheel_msgs/msg/Tyre"), ROSBAGS.new("wheel_msgs/msg/Wheel")
    tyre.pressure, wheel.tyres = 2.5, [tyre]
    store = message_types()
    content = store.serialize_cdr(wheel, "wheel_msgs/msg/Wheel")
    assert store.deserialize_cdr(content, "wheel_msgs/msg/Wheel").tyres[0].pressure == 2.5
    with pytest.raises(UserError, match=r"other_msgs/msg/Thing.*unknown.*package 'other_msgs'"):
        ensure_known("other_msgs/msg/Thing")


def test_missing_bag_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere' does not exist"):
        BagReader(tmp_path / "nowhere")
    with pytest.raises(UserError, match="has no metadata.yaml; give the folder"):
        BagReader(tmp_path)


def test_error_for_a_missing_topic_lists_the_existing_topics(tmp_path: Path) -> None:
    with BagReader(write_bag(tmp_path / "bag")) as reader:
        with pytest.raises(UserError, match=r"no topic /c; it has /a, /b"):
            list(reader.raw(["/a", "/c"]))
        assert len(list(reader.raw(["/a", "/c"], optional=True))) == 5


@pytest.mark.parametrize("keep", [0, 4, 1000, 1_500_000, -10])
def test_truncated_bag_is_refused(tmp_path: Path, keep: int) -> None:
    bag = write_bag(tmp_path / "bag", size=500_000)
    file = bag / "bag.mcap"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"bag'.* cannot be read .*interrupted: run `mcap recover`"):
        BagReader(bag)


def test_damaged_chunk_is_refused(tmp_path: Path) -> None:
    bag = write_bag(tmp_path / "bag", size=500_000)
    file = bag / "bag.mcap"
    content = bytearray(file.read_bytes())
    first_image = content.find(b"camera\0")
    content[first_image - 70 : first_image] = b"\xff" * 70  # includes the length of the record
    file.write_bytes(content)
    with BagReader(bag) as reader, pytest.raises(UserError, match=r"is damaged|not a valid"):
        list(reader.messages(["/a", "/b"]))


def test_interrupted_recording_keeps_flushed_messages_and_its_error_explains_recovery(tmp_path: Path) -> None:
    """The file has the flushed messages as complete records; metadata.yaml is missing."""
    bag = BagWriter(tmp_path / "bag", atomic=False)
    bag.add_topic("/a", HEADER)
    bag.write("/a", 1, to_ros.make_header(ROSBAGS, 1, "kept"))
    bag.flush()
    bag.write("/a", 2, to_ros.make_header(ROSBAGS, 2, "lost"))
    with pytest.raises(UserError, match=r"it contains bag.mcap, so its recording was interrupted"):
        BagReader(tmp_path / "bag")
    content = (tmp_path / "bag" / "bag.mcap").read_bytes()
    assert b"kept" in content and b"lost" not in content
    bag.abandon()
    # The chunk is complete: with the footer of a finished file, a reader finds the message.
    footer = b"\x02" + (20).to_bytes(8, "little") + bytes(20) + b"\x89MCAP0\r\n"
    (tmp_path / "bag" / "bag.mcap").write_bytes(content + footer)
    reader = McapReader(tmp_path / "bag" / "bag.mcap")
    reader.open()
    assert [time for _, time, _ in reader.messages(reader.connections)] == [1]
    reader.close()


def test_error_while_writing_leaves_no_bag(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="/unknown"), BagWriter(tmp_path / "deep" / "bag") as bag:
        bag.write("/unknown", 0, None)
    assert not list((tmp_path / "deep").iterdir())


def test_second_writer_of_one_bag_is_refused(tmp_path: Path) -> None:
    second = BagWriter(tmp_path / "bag")
    second.add_topic("/a", HEADER)
    write_bag(tmp_path / "bag")
    with pytest.raises(UserError, match="exists already"):
        second.close()
    assert [entry.name for entry in tmp_path.iterdir()] == ["bag"]
    with BagReader(tmp_path / "bag") as reader:
        assert reader.message_count == 10


def test_output_folder_that_cannot_be_created_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be created"):
        BagWriter(tmp_path / "file" / "bag")


@pytest.mark.parametrize("atomic", [True, False])
def test_full_disk_is_reported(tmp_path: Path, atomic: bool) -> None:
    """A limit on file size makes a write fail in the middle of a chunk, as a full disk does."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_500_000, limits[1]))
    try:
        with pytest.raises(UserError, match="the disk is full"):
            write_bag(tmp_path / "bag", size=600_000, atomic=atomic)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "bag").exists() is not atomic
