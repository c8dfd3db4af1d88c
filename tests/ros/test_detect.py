# SPDX-License-Identifier: Apache-2.0
"""The offline runner: deterministic, with the same detections as the node over ROS."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ftkd_core.errors import UserError
from ftkd_core.runtime.detector import Detector
from ftkd_core.types import ObjectList
from ftkd_ros import cli
from ftkd_ros.bag.detect import DETECTIONS_TOPIC, SUMMARY_NAME, VELOCITIES_TOPIC, detect_bag
from ftkd_ros.bag.io import BagReader, BagWriter
from ftkd_ros.bag.message_definitions import ROSBAGS
from ftkd_ros.bag.replay_rounds import Drive, read_objects
from ftkd_ros.convert import to_ros
from tests.core.helpers import small_model
from tests.ros.live_node import detections_of_live_node
from tests.ros.recorded_drive import GroundTruthDetector, RecordedDrive, record_drive


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> RecordedDrive:
    return record_drive(tmp_path_factory.mktemp("detect"))


def small_detector() -> Detector:
    """Return a streaming detector with random weights and score threshold 0."""
    cpu = torch.device("cpu")
    return Detector(small_model(), weights_name="random", device=cpu, runtime="fast", score_threshold=0.0)


def detections_of(path: Path) -> dict[int, ObjectList]:
    with BagReader(path) as bag:
        return read_objects(bag, DETECTIONS_TOPIC, VELOCITIES_TOPIC)


def test_every_round_is_detected_once_at_its_stamp(recorded: RecordedDrive, tmp_path: Path) -> None:
    detector = GroundTruthDetector(recorded.sweeps)
    summary = detect_bag(recorded.sweeps, tmp_path / "out", factory=lambda *_: detector, progress=False)
    with BagReader(recorded.sweeps) as bag:
        stamps = Drive(bag).reference_stamps()
    assert sorted(detections_of(tmp_path / "out")) == stamps
    assert (summary.rounds_in, summary.rounds_detected, summary.resets) == (25, 25, {})
    written = json.loads((tmp_path / "out" / SUMMARY_NAME).read_text())
    assert written["rounds_dropped"] == 0
    assert (written["weights"], written["device"]) == ("ground_truth.safetensors", "cpu")
    assert written["latency_ms"]["p95"] >= written["latency_ms"]["p50"] > 0


@pytest.mark.parametrize(("options", "runtime"), [((), "auto"), (("--runtime", "plain"), "plain")])
def test_runtime_option_reaches_the_detector(
    options: tuple[str, ...],
    runtime: str,
    recorded: RecordedDrive,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[dict[str, Any]] = []

    def from_weights(_weights: object, **arguments: Any) -> GroundTruthDetector:
        calls.append(arguments)
        return GroundTruthDetector(recorded.key_frames)

    monkeypatch.setattr(Detector, "from_weights", from_weights)
    bags = ["--bag", str(recorded.key_frames), "--output", str(tmp_path / "out")]
    assert cli.main(["detect", *bags, *options]) == 0
    expected = {"device": "auto", "score_threshold": 0.05, "runtime": runtime, "camera_model": "auto"}
    assert calls == [expected]


def test_equal_input_gives_identical_bags(recorded: RecordedDrive, tmp_path: Path) -> None:
    contents = []
    for name in ("first", "second"):
        detect_bag(recorded.key_frames, tmp_path / name, factory=lambda *_: small_detector(), progress=False)
        with BagReader(tmp_path / name) as bag:
            contents.append([(c.topic, stamp, bytes(content)) for c, stamp, content in bag.raw()])
    assert contents[0] == contents[1]
    assert len(contents[0]) == 10


def test_gap_between_rounds_resets_the_detector(recorded: RecordedDrive, tmp_path: Path) -> None:
    """The second part repeats the bag 60 s later."""
    target, shift_ns = tmp_path / "twice", 60 * 10**9
    with BagReader(recorded.key_frames) as reader, BagWriter(target) as writer:
        for connection in reader.connections:
            writer.add_topic(connection.topic, connection.msgtype)
        for connection, stamp, content in reader.raw():
            writer.write_raw(connection.topic, stamp, content)
        for connection, stamp, content in reader.raw():
            moved = _shift_stamps(reader.deserialize(connection, content), shift_ns)
            writer.write(connection.topic, stamp + shift_ns, moved)
    detector = GroundTruthDetector(recorded.key_frames)
    summary = detect_bag(target, tmp_path / "out", factory=lambda *_: detector, progress=False)
    assert summary.rounds_detected == 10
    assert summary.resets == {"gap": 1}
    assert detector.resets == 1


def _shift_stamps(message: Any, by_ns: int) -> Any:
    """Shift all header stamps of a message."""
    parts = getattr(message, "transforms", None) or getattr(message, "detections", None) or []
    for part in [message, *parts]:
        stamped = getattr(part, "header", part)
        if hasattr(stamped, "stamp"):
            stamped.stamp.sec += by_ns // 10**9
    return message


def test_existing_output_is_refused_before_the_detector_is_loaded(
    recorded: RecordedDrive, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "user_file").write_text("data")

    def factory(*_: object) -> Any:
        raise AssertionError("the detector must not be loaded if the output is refused")

    with pytest.raises(UserError, match="exists already"):
        detect_bag(recorded.key_frames, tmp_path / "out", factory=factory, progress=False)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["user_file"]


def test_missing_weights_are_named_in_the_error_and_leave_no_output(
    recorded: RecordedDrive, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"nowhere\.safetensors"):
        detect_bag(
            recorded.key_frames, tmp_path / "out", weights=tmp_path / "nowhere.safetensors", progress=False
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.ros
def test_offline_runner_and_node_give_the_same_detections(recorded: RecordedDrive, tmp_path: Path) -> None:
    """The same network processes a bag, and the messages of the bag over DDS."""
    detect_bag(recorded.key_frames, tmp_path / "out", factory=lambda *_: small_detector(), progress=False)
    offline = detections_of(tmp_path / "out")
    live = detections_of_live_node(recorded.key_frames, small_detector)
    assert sorted(live) == sorted(offline)
    assert len(live) == 5
    for stamp, objects in offline.items():
        np.testing.assert_array_equal(live[stamp].labels, objects.labels)
        np.testing.assert_allclose(live[stamp].scores, objects.scores, atol=1e-5)
        np.testing.assert_allclose(live[stamp].boxes, objects.boxes, atol=1e-3)
    first, last = (offline[stamp].boxes for stamp in (min(offline), max(offline)))
    assert np.abs(first - last).max() > 1e-3, "the detections must depend on the input"


def test_objects_round_trip_through_a_bag(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    boxes = rng.normal(size=(4, 9)) * 10
    boxes[:, 3:6] = np.abs(boxes[:, 3:6]) + 0.1
    boxes[:, 6] = rng.uniform(-3, 3, 4)
    objects = ObjectList(
        boxes=boxes, scores=rng.random(4), labels=np.array([0, 3, 8, 9]), stamp_ns=1_700_000_000_123
    )
    with BagWriter(tmp_path / "bag") as bag:
        bag.add_topic(DETECTIONS_TOPIC, "vision_msgs/msg/Detection3DArray")
        bag.add_topic(VELOCITIES_TOPIC, "sensor_msgs/msg/PointCloud2")
        bag.write(DETECTIONS_TOPIC, 1, to_ros.objects_to_detections(ROSBAGS, objects, "base_link"))
        bag.write(VELOCITIES_TOPIC, 1, to_ros.objects_to_velocities(ROSBAGS, objects, "base_link"))
    (found,) = detections_of(tmp_path / "bag").values()
    np.testing.assert_allclose(found.boxes, objects.boxes, rtol=1e-6)
    np.testing.assert_array_equal(found.labels, objects.labels)
    with BagWriter(tmp_path / "elsewhere") as bag:
        bag.add_topic(DETECTIONS_TOPIC, "vision_msgs/msg/Detection3DArray")
        bag.write(DETECTIONS_TOPIC, 1, to_ros.objects_to_detections(ROSBAGS, objects, "map"))
    with pytest.raises(UserError, match="in frame 'map'; expected base_link"):
        detections_of(tmp_path / "elsewhere")
