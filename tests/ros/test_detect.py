# SPDX-License-Identifier: Apache-2.0
"""The offline runner: deterministic, and the same as the node over ROS."""

import json
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from recorded import KnowingDetector, Recorded, record

from ftkd_core.errors import UserError
from ftkd_core.runtime.detector import Detector
from ftkd_core.types import ObjectList
from ftkd_ros import cli
from ftkd_ros.bag import message_builders as build
from ftkd_ros.bag.detect import DETECTIONS_TOPIC, SUMMARY_NAME, VELOCITIES_TOPIC, detect_bag
from ftkd_ros.bag.io import BagReader, BagWriter
from ftkd_ros.bag.replay_rounds import Drive, read_objects
from tests.core.helpers import small_model


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    return record(tmp_path_factory.mktemp("detect"))


def small_detector() -> Detector:
    """A streaming network with random weights whose every detection counts."""
    return Detector(small_model(), weights_name="random", device=_cpu(), score_threshold=0.0)


def _cpu() -> Any:
    import torch

    return torch.device("cpu")


def detections_of(path: Path) -> dict[int, ObjectList]:
    with BagReader(path) as bag:
        return read_objects(bag, DETECTIONS_TOPIC, VELOCITIES_TOPIC)


def test_every_round_is_detected_once_at_its_stamp(recorded: Recorded, tmp_path: Path) -> None:
    detector = KnowingDetector(recorded.sweeps)
    summary = detect_bag(recorded.sweeps, tmp_path / "out", factory=lambda *_: detector, progress=False)
    with BagReader(recorded.sweeps) as bag:
        stamps = Drive(bag).reference_stamps()
    assert sorted(detections_of(tmp_path / "out")) == stamps
    assert (summary.rounds_in, summary.rounds_detected, summary.resets) == (25, 25, {})
    told = json.loads((tmp_path / "out" / SUMMARY_NAME).read_text())
    assert told["rounds_dropped"] == 0
    assert (told["weights"], told["device"]) == ("knowing.safetensors", "cpu")
    assert told["latency_ms"]["p95"] >= told["latency_ms"]["p50"] > 0


@pytest.mark.parametrize(("options", "runtime"), [((), "auto"), (("--runtime", "plain"), "plain")])
def test_the_runtime_can_be_chosen(
    options: tuple[str, ...],
    runtime: str,
    recorded: Recorded,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[dict[str, Any]] = []

    def from_weights(_weights: object, **arguments: Any) -> KnowingDetector:
        asked.append(arguments)
        return KnowingDetector(recorded.key_frames)

    monkeypatch.setattr(Detector, "from_weights", from_weights)
    bags = ["--bag", str(recorded.key_frames), "--output", str(tmp_path / "out")]
    assert cli.main(["detect", *bags, *options]) == 0
    assert asked == [{"device": "auto", "score_threshold": 0.05, "runtime": runtime}]


def test_the_same_bag_gives_the_same_bytes(recorded: Recorded, tmp_path: Path) -> None:
    contents = []
    for name in ("first", "second"):
        detect_bag(recorded.key_frames, tmp_path / name, factory=lambda *_: small_detector(), progress=False)
        with BagReader(tmp_path / name) as bag:
            contents.append([(c.topic, stamp, bytes(content)) for c, stamp, content in bag.raw()])
    assert contents[0] == contents[1]
    assert len(contents[0]) == 10


def test_a_gap_resets_the_stream(recorded: Recorded, tmp_path: Path) -> None:
    """The bag once more, 60 s later: what the detector remembers does not belong to it."""
    target, later_ns = tmp_path / "twice", 60 * 10**9
    with BagReader(recorded.key_frames) as reader, BagWriter(target) as writer:
        for connection in reader.connections:
            writer.add_topic(connection.topic, connection.msgtype)
        for connection, stamp, content in reader.raw():
            writer.write_raw(connection.topic, stamp, content)
        for connection, stamp, content in reader.raw():
            moved = _later(reader.deserialize(connection, content), later_ns)
            writer.write(connection.topic, stamp + later_ns, moved)
    detector = KnowingDetector(recorded.key_frames)
    summary = detect_bag(target, tmp_path / "out", factory=lambda *_: detector, progress=False)
    assert summary.rounds_detected == 10
    assert summary.resets == {"gap": 1}
    assert detector.resets == 1


def _later(message: Any, by_ns: int) -> Any:
    """The message with all its header stamps moved."""
    parts = getattr(message, "transforms", None) or getattr(message, "detections", None) or []
    for part in [message, *parts]:
        stamped = getattr(part, "header", part)
        if hasattr(stamped, "stamp"):
            stamped.stamp.sec += by_ns // 10**9
    return message


def test_an_output_that_exists_is_refused_before_anything_is_loaded(
    recorded: Recorded, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("data")

    def factory(*_: object) -> Any:
        raise AssertionError("the detector must not be loaded for an output that is refused")

    with pytest.raises(UserError, match="exists already"):
        detect_bag(recorded.key_frames, tmp_path / "out", factory=factory, progress=False)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["precious"]


def test_weights_that_do_not_exist_are_named_and_nothing_is_written(
    recorded: Recorded, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"nowhere\.safetensors"):
        detect_bag(
            recorded.key_frames, tmp_path / "out", weights=tmp_path / "nowhere.safetensors", progress=False
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.ros
def test_offline_and_over_ros_give_the_same_detections(recorded: Recorded, tmp_path: Path) -> None:
    """The same streaming network fed from the bag and by a node that hears the bag's messages over DDS."""
    detect_bag(recorded.key_frames, tmp_path / "out", factory=lambda *_: small_detector(), progress=False)
    offline = detections_of(tmp_path / "out")
    live = _through_ros(recorded.key_frames)
    assert sorted(live) == sorted(offline)
    assert len(live) == 5
    for stamp, objects in offline.items():
        np.testing.assert_array_equal(live[stamp].labels, objects.labels)
        np.testing.assert_allclose(live[stamp].scores, objects.scores, atol=1e-5)
        np.testing.assert_allclose(live[stamp].boxes, objects.boxes, atol=1e-3)
    first, last = (offline[stamp].boxes for stamp in (min(offline), max(offline)))
    assert np.abs(first - last).max() > 1e-3, "a network that ignores its input would prove nothing"


def _live_node(context: Any, offsets_s: list[float]) -> Any:
    """The detector node, active, with the small detector and patience."""
    from rclpy.parameter import Parameter

    from ftkd_ros.node.detector_node import DetectorNode

    overrides = {
        "qos_reliability": "reliable",
        "sync_deadline_s": 5.0,
        "tf_timeout_s": 5.0,
        "camera_time_offsets_s": offsets_s,
    }
    node = DetectorNode(
        lambda _: small_detector(),
        context=context,
        parameter_overrides=[Parameter(name, value=value) for name, value in overrides.items()],
    )
    node.trigger_configure()
    node.trigger_activate()
    return node


def _publish_by_round(
    publishers: dict[str, Any], messages: list[tuple[str, bytes]], answered: Callable[[], tuple[int, int]]
) -> None:
    """A round at a time: the node keeps the newest, and here all of them shall be compared."""
    images = 0
    for topic, content in messages:
        publishers[topic].publish(content)
        images += topic.endswith("/image/compressed")
        if topic.endswith("/image/compressed") and images % 6 == 0:
            _wait(lambda wanted=images // 6: answered() == (wanted, wanted))


def _through_ros(path: Path) -> dict[int, ObjectList]:
    """Detections of the live node for the messages of a bag, published a round at a time."""
    import rclpy
    from rclpy.context import Context
    from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
    from rclpy.qos import DurabilityPolicy, QoSProfile
    from sensor_msgs.msg import PointCloud2
    from vision_msgs.msg import Detection3DArray

    from ftkd_ros.bag.node_running import message_class
    from ftkd_ros.convert.to_ros import detections_to_objects, stamp_to_ns

    context = Context()
    rclpy.init(context=context)
    with BagReader(path) as bag:
        offsets_ns = Drive(bag).offsets_ns
        messages = [(c.topic, bytes(content)) for c, _, content in bag.raw() if c.topic not in _TRUTH]
        kinds = {c.topic: message_class(c.msgtype) for c in bag.connections if c.topic not in _TRUTH}
    node = _live_node(context, [offset * 1e-9 for offset in offsets_ns if offset is not None])
    bench = rclpy.create_node("bench", context=context)
    latched = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
    publishers = {
        topic: bench.create_publisher(kind, topic, latched if topic == "/tf_static" else 100)
        for topic, kind in kinds.items()
    }
    arrays: list[Any] = []
    clouds: list[Any] = []
    bench.create_subscription(Detection3DArray, DETECTIONS_TOPIC, arrays.append, 10)
    bench.create_subscription(PointCloud2, VELOCITIES_TOPIC, clouds.append, 10)
    executor = SingleThreadedExecutor(context=context)
    executor.add_node(node)
    executor.add_node(bench)

    def spin() -> None:
        with suppress(ExternalShutdownException):  # how rclpy ends a spin when its context does
            executor.spin()

    thread = threading.Thread(target=spin, daemon=True)
    thread.start()
    try:
        heard = [topic for topic in publishers if topic != "/odom"]
        _wait(lambda: all(publishers[topic].get_subscription_count() for topic in heard))
        _wait(lambda: bench.count_publishers(VELOCITIES_TOPIC) > 0)
        _publish_by_round(publishers, messages, lambda: (len(clouds), len(arrays)))
    finally:
        node.close()
        rclpy.shutdown(context=context)
        thread.join(5)
    by_stamp = {stamp_to_ns(cloud.header.stamp): cloud for cloud in clouds}
    return {
        stamp: detections_to_objects(array, by_stamp[stamp])
        for array in arrays
        for stamp in [stamp_to_ns(array.header.stamp)]
    }


_TRUTH = ("/ground_truth/detections", "/ground_truth/velocities", "/sample_token")


def _wait(condition: Any, timeout_s: float = 60.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "waited in vain for the node"
        time.sleep(0.01)


def test_messages_of_a_round_go_back_and_forth_unchanged(tmp_path: Path) -> None:
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
        bag.write(DETECTIONS_TOPIC, 1, build.detections(objects, "base_link"))
        bag.write(VELOCITIES_TOPIC, 1, build.velocities(objects, "base_link"))
    (found,) = detections_of(tmp_path / "bag").values()
    np.testing.assert_allclose(found.boxes, objects.boxes, rtol=1e-6)
    np.testing.assert_array_equal(found.labels, objects.labels)
    with BagWriter(tmp_path / "elsewhere") as bag:
        bag.add_topic(DETECTIONS_TOPIC, "vision_msgs/msg/Detection3DArray")
        bag.write(DETECTIONS_TOPIC, 1, build.detections(objects, "map"))
    with pytest.raises(UserError, match="in frame 'map'; expected base_link"):
        detections_of(tmp_path / "elsewhere")
