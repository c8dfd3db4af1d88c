# SPDX-License-Identifier: Apache-2.0
"""The offline runner: deterministic, with the same detections as the node over ROS."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ftkd_core.errors import UserError
from ftkd_core.runtime.detector import Detector
from ftkd_core.types import ObjectList
from ftkd_ros import cli
from ftkd_ros.bag.detect import DETECTIONS_TOPIC, SUMMARY_NAME, VELOCITIES_TOPIC, Selection, detect_bag
from ftkd_ros.bag.detect_progress import DetectionProgress, SavedRound
from ftkd_ros.bag.io import BagReader, BagWriter
from ftkd_ros.bag.message_definitions import ROSBAGS
from ftkd_ros.bag.replay_rounds import Drive, read_objects
from ftkd_ros.convert import to_ros
from ftkd_ros.node.parameters import DetectorParameters
from tests.core.helpers import small_model
from tests.ros.live_node import detections_of_live_node
from tests.ros.recorded_drive import GroundTruthDetector, RecordedDrive, record_drive
from tests.ros.rewritten_bags import chained, inverted, odometry_only, renamed, rewrite

ALL = DetectorParameters(score_threshold=0.0)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> RecordedDrive:
    return record_drive(tmp_path_factory.mktemp("detect"))


def small_detector() -> Detector:
    """Return a streaming detector with random weights and score threshold 0."""
    cpu = torch.device("cpu")
    return Detector(small_model(), weights_name="random", device=cpu, runtime="fast", score_threshold=0.0)


def detections_of(path: Path, frame: str = "base_link") -> dict[int, ObjectList]:
    with BagReader(path) as bag:
        return read_objects(bag, DETECTIONS_TOPIC, VELOCITIES_TOPIC, frame=frame)


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
    expected = {"preset": None, "device": "auto", "score_threshold": 0.0, "runtime": runtime}
    assert calls == [{**expected, "max_detections": 300, "camera_model": "auto"}]


def test_equal_input_gives_identical_bags(recorded: RecordedDrive, tmp_path: Path) -> None:
    contents = []
    for name in ("first", "second"):
        detect_bag(
            recorded.key_frames,
            tmp_path / name,
            parameters=ALL,
            factory=lambda _: small_detector(),
            progress=False,
        )
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
            recorded.key_frames,
            tmp_path / "out",
            parameters=DetectorParameters(weights=str(tmp_path / "nowhere.safetensors")),
            progress=False,
        )
    assert not (tmp_path / "out").exists()


RENAMED = {
    "cameras": ["cam_front", "cam_front_right", "cam_front_left", "cam_back"],
    "image_topic": "/car/{camera}/image/compressed",
    "camera_info_topic": "/car/{camera}/camera_info",
    "base_frame": "ego",
    "map_frame": "odom",
    "min_cameras": 4,
    "max_range_m": 30.0,
}


@pytest.mark.ros
@pytest.mark.parametrize(
    ("change", "given"),
    [
        (None, {}),
        (chained, {}),
        (inverted, {}),
        (renamed, RENAMED),
        (odometry_only, {"odometry_topic": "/odom"}),
    ],
    ids=["converted", "chain of frames", "inverse edges", "own names", "odometry"],
)  # fmt: skip
def test_offline_runner_and_node_give_the_same_detections(
    change: Any, given: dict[str, Any], recorded: RecordedDrive, tmp_path: Path
) -> None:
    """The same network processes a bag, and the messages of the bag over DDS."""
    bag = recorded.key_frames
    if change is not None:
        bag = rewrite(bag, tmp_path / "bag", change)
    typed = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    parameters = DetectorParameters(score_threshold=0.0, **typed)
    detect_bag(
        bag, tmp_path / "out", parameters=parameters, factory=lambda _: small_detector(), progress=False
    )
    offline = detections_of(tmp_path / "out", parameters.base_frame)
    live = detections_of_live_node(bag, small_detector, **given)
    assert sorted(live) == sorted(offline)
    assert len(live) == 5
    for stamp, objects in offline.items():
        np.testing.assert_array_equal(live[stamp].labels, objects.labels)
        np.testing.assert_allclose(live[stamp].scores, objects.scores, atol=1e-5)
        np.testing.assert_allclose(live[stamp].boxes, objects.boxes, atol=1e-3)
    first, last = (offline[stamp].boxes for stamp in (min(offline), max(offline)))
    assert first.shape != last.shape or np.abs(first - last).max() > 1e-3, "must depend on the input"


@pytest.mark.parametrize("change", [chained, inverted])
def test_other_trees_of_frames_give_the_detections_of_the_converted_bag(
    change: Any, recorded: RecordedDrive, tmp_path: Path
) -> None:
    bags = {"plain": recorded.sweeps, "changed": rewrite(recorded.sweeps, tmp_path / "bag", change)}
    rounds = {}
    for name, bag in bags.items():
        detector = GroundTruthDetector(recorded.sweeps)
        detect_bag(bag, tmp_path / name, factory=lambda _, used=detector: used, progress=False)
        rounds[name] = detector.rounds
    assert len(rounds["plain"]) == len(rounds["changed"]) == 25
    for plain, changed in zip(*rounds.values(), strict=True):
        np.testing.assert_allclose(changed.global_from_ego, plain.global_from_ego, atol=1e-6)
        for view, other in zip(plain.views, changed.views, strict=True):
            assert view is not None and other is not None
            np.testing.assert_allclose(other.ego_from_camera, view.ego_from_camera, atol=1e-6)
            np.testing.assert_allclose(other.global_from_ego, view.global_from_ego, atol=1e-6)


@pytest.mark.parametrize(
    ("selection", "indices"),
    [
        (Selection(start_s=0.99), range(12, 25)),
        (Selection(start_s=0.49, duration_s=0.5), range(6, 12)),
        (Selection(every=10), (0, 10, 20)),
        (Selection(start_s=0.99, every=6, duration_s=0.8), (12, 18)),
    ],
)
def test_part_of_a_bag_is_detected(
    selection: Selection, indices: Any, recorded: RecordedDrive, tmp_path: Path
) -> None:
    detector = GroundTruthDetector(recorded.sweeps)
    detect_bag(
        recorded.sweeps, tmp_path / "out", selection=selection, factory=lambda _: detector, progress=False
    )
    with BagReader(recorded.sweeps) as bag:
        stamps = Drive(bag).reference_stamps()
    assert sorted(detections_of(tmp_path / "out")) == [stamps[index] for index in indices]


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        (Selection(start_s=99), "no round from 99 s on; the bag has 25 rounds over 2.0 s"),
        (Selection(every=0), "every 0; expected start >= 0, duration > 0 and every >= 1"),
        (Selection(duration_s=-1), "duration -1 s"),
    ],
)
def test_part_without_rounds_is_refused(
    selection: Selection, message: str, recorded: RecordedDrive, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        detect_bag(
            recorded.sweeps,
            tmp_path / "out",
            selection=selection,
            factory=lambda _: GroundTruthDetector(recorded.sweeps),
            progress=False,
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("runtime", ["plain", "fast"])
def test_killed_run_is_resumed_with_the_same_bytes(
    runtime: str, recorded: RecordedDrive, tmp_path: Path
) -> None:
    def detector(fails_at: int | None = None) -> Detector:
        made = Detector(
            small_model(),
            weights_name="random",
            device=torch.device("cpu"),
            score_threshold=0.0,
            runtime=runtime,
        )
        steps = iter(range(100))
        step = made.step

        def interrupted(camera_round: Any) -> ObjectList:
            if next(steps) == fails_at:
                raise KeyboardInterrupt
            return step(camera_round)

        made.step = interrupted  # type: ignore[method-assign]
        return made

    def run(folder: str, fails_at: int | None = None) -> Any:
        (tmp_path / folder).mkdir(exist_ok=True)
        return detect_bag(
            recorded.key_frames,
            tmp_path / folder / "out",
            parameters=ALL,
            factory=lambda _: detector(fails_at),
            progress=False,
            save_interval_s=0.0,
        )

    with pytest.raises(KeyboardInterrupt):
        run("killed", fails_at=3)
    assert not (tmp_path / "killed" / "out").exists()
    assert run("killed").resumed_rounds == 3
    run("whole")
    names = [sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("killed", "whole")]
    assert names == [["out"], ["out"]]
    contents = [(tmp_path / name / "out" / "out.mcap").read_bytes() for name in ("killed", "whole")]
    assert contents[0] == contents[1]


def test_progress_is_taken_over_only_with_equal_settings(tmp_path: Path) -> None:
    def stopped(key: dict[str, str], use: Callable[[DetectionProgress], None]) -> None:
        with DetectionProgress(tmp_path / "out", key) as progress:
            use(progress)
            raise KeyboardInterrupt

    def write(progress: DetectionProgress) -> None:
        with pytest.raises(UserError, match="another process is writing"):
            DetectionProgress(tmp_path / "out", {"weights": "a"})
        progress.add(SavedRound(1, b"detections", b"velocities"))
        progress.save({"done": 1}, {"memory": np.arange(3)})
        progress.add(SavedRound(2, b"lost", b"after the last state"))

    def check(progress: DetectionProgress) -> None:
        assert progress.state is not None and progress.state.notes["done"] == 1
        np.testing.assert_array_equal(progress.state.arrays["memory"], [0, 1, 2])
        assert list(progress.rounds()) == [SavedRound(1, b"detections", b"velocities")]

    for use in (write, check):
        with pytest.raises(KeyboardInterrupt):
            stopped({"weights": "a"}, use)
    with DetectionProgress(tmp_path / "out", {"weights": "b"}) as progress:
        assert progress.state is None and list(progress.rounds()) == []
    assert list(tmp_path.iterdir()) == []


def test_parameters_of_files_and_options_reach_the_detector(
    recorded: RecordedDrive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """-p overrides files, other options override both; thresholds and ranges filter the output."""
    monkeypatch.setattr(
        Detector, "from_weights", lambda *_, **arguments: GroundTruthDetector(recorded.key_frames)
    )
    path = tmp_path / "detector.yaml"
    path.write_text("/**: {ros__parameters: {score_threshold: 0.9, max_range_m: 100.0, min_cameras: 6}}")
    bags = ["--bag", str(recorded.key_frames), "--params-file", str(path), "--output"]
    assert cli.main(["detect", *bags, str(tmp_path / "none")]) == 0
    assert cli.main(["detect", *bags, str(tmp_path / "some"), "-p", "score_threshold:=0.7"]) == 0
    assert (
        cli.main(
            ["detect", *bags, str(tmp_path / "near"), "--score-threshold", "0", "-p", "max_range_m:=1.0"]
        )
        == 0
    )
    found = {
        name: sum(len(objects.boxes) for objects in detections_of(tmp_path / name).values())
        for name in ("none", "some", "near")
    }
    assert found["none"] == 0 and found["some"] > 0 and found["near"] == 0
    written = json.loads((tmp_path / "near" / SUMMARY_NAME).read_text())["parameters"]
    assert written == {"score_threshold": 0.0, "max_range_m": 1.0, "min_cameras": 6}


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
