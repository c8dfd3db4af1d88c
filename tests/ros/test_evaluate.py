# SPDX-License-Identifier: Apache-2.0
"""RecordedDrive detections -> official metrics: the join to key frames, what a recording covers, and bad
input.
"""

import json
from pathlib import Path

import numpy as np
import pytest

from ftkd_core.errors import UserError
from ftkd_core.types import ObjectList
from ftkd_ros.bag.detect import DETECTIONS_TOPIC, VELOCITIES_TOPIC, detect_bag, write_objects
from ftkd_ros.bag.evaluate import evaluate_recording, summary_lines
from ftkd_ros.bag.io import BagReader, BagWriter
from ftkd_ros.bag.replay_rounds import Drive, read_objects
from ftkd_ros.cli import main
from tests.ros.recorded_drive import GroundTruthDetector, RecordedDrive, record_drive


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> RecordedDrive:
    return record_drive(tmp_path_factory.mktemp("evaluate"))


@pytest.fixture(scope="module")
def detections(recorded: RecordedDrive, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bag with perfect detections of every sweep."""
    output = tmp_path_factory.mktemp("recording") / "detections"
    detector = GroundTruthDetector(recorded.sweeps)
    detect_bag(recorded.sweeps, output, factory=lambda *_: detector, progress=False)
    return output


def rewrite(source: Path, target: Path, keep: set[int], shift_ns: int = 0) -> Path:
    """Copy some rounds of a recording with shifted stamps."""
    with BagReader(source) as bag:
        objects = read_objects(bag, DETECTIONS_TOPIC, VELOCITIES_TOPIC)
    with BagWriter(target) as bag:
        bag.add_topic(DETECTIONS_TOPIC, "vision_msgs/msg/Detection3DArray")
        bag.add_topic(VELOCITIES_TOPIC, "sensor_msgs/msg/PointCloud2")
        for number, (stamp, found) in enumerate(sorted(objects.items())):
            if number in keep:
                write_objects(
                    bag,
                    ObjectList(
                        boxes=found.boxes, scores=found.scores, labels=found.labels, stamp_ns=stamp + shift_ns
                    ),
                )
    return target


def test_perfect_detections_give_perfect_metrics(
    recorded: RecordedDrive, detections: Path, tmp_path: Path
) -> None:
    metrics = evaluate_recording(
        detections, recorded.sweeps, dataroot=recorded.dataroot, version=recorded.version, output=tmp_path
    )
    # Detections are 0.5 ms older than the key frame, in which the ego moves by millimetres.
    assert metrics["classes"]["car"]["AP"] == pytest.approx(1.0)
    assert metrics["classes"]["car"]["ATE"] < 0.01
    assert metrics["classes"]["car"]["AVE"] < 0.01
    assert metrics["mAP"] == pytest.approx(0.1)
    assert (metrics["rounds_in"], metrics["rounds_detected"], metrics["rounds_dropped"]) == (25, 25, 0)
    assert metrics["coverage"]["with_detections"] == metrics["coverage"]["key_frames"] == 5
    assert metrics["coverage"]["offset_ms"]["mean"] == pytest.approx(-0.5, abs=0.01)
    assert metrics["weights"] == "ground_truth.safetensors"
    assert metrics["training"] == "300 steps, distilled by ftkd"
    assert metrics == json.loads((tmp_path / "metrics.json").read_text())
    assert len(json.loads((tmp_path / "results.json").read_text())["results"]) == 5
    assert any(line.startswith("mAP 0.100") for line in summary_lines(metrics))


def test_metrics_json_has_all_documented_keys(
    recorded: RecordedDrive, detections: Path, tmp_path: Path
) -> None:
    recording = rewrite(detections, tmp_path / "without_summary", set(range(25)))
    metrics = evaluate_recording(
        recording,
        recorded.sweeps,
        dataroot=recorded.dataroot,
        version=recorded.version,
        output=tmp_path / "out",
    )
    scores = "mAP NDS mATE mASE mAOE mAVE mAAE"
    run_keys = "rounds_in rounds_detected rounds_dropped latency_ms device weights data"
    assert {*scores.split(), *run_keys.split()} <= set(metrics)
    assert set(metrics["latency_ms"]) >= {"p50", "p95"}


def test_key_frames_without_detections_count_as_empty_with_a_note(
    recorded: RecordedDrive, detections: Path, tmp_path: Path
) -> None:
    recording = rewrite(detections, tmp_path / "half", set(range(12)))  # key frames are rounds 0 6 12 18 24
    metrics = evaluate_recording(
        recording,
        recorded.sweeps,
        dataroot=recorded.dataroot,
        version=recorded.version,
        output=tmp_path / "out",
    )
    assert (metrics["rounds_detected"], metrics["rounds_dropped"]) == (12, 13)
    assert metrics["coverage"]["with_detections"] == 2
    assert metrics["classes"]["car"]["AP"] < 0.5
    assert "3 of 5 key frames have no detections; they count as empty." in metrics["notes"]


def test_warnings_of_the_detector_are_notes_of_the_metrics(
    recorded: RecordedDrive, detections: Path, tmp_path: Path
) -> None:
    summary = tmp_path / "detector.json"
    summary.write_text(json.dumps({"weights": "w", "warnings": ["cameras are at another height"]}))
    metrics = evaluate_recording(
        detections,
        recorded.sweeps,
        dataroot=recorded.dataroot,
        version=recorded.version,
        output=tmp_path / "out",
        summary_file=summary,
    )
    assert "cameras are at another height" in metrics["notes"]


def test_detections_more_than_25_ms_away_are_not_joined(
    recorded: RecordedDrive, detections: Path, tmp_path: Path
) -> None:
    recording = rewrite(detections, tmp_path / "late", set(range(20)), shift_ns=30_000_000)
    metrics = evaluate_recording(
        recording,
        recorded.sweeps,
        dataroot=recorded.dataroot,
        version=recorded.version,
        output=tmp_path / "out",
    )
    assert metrics["coverage"]["with_detections"] == 0
    assert metrics["mAP"] == 0


def test_detections_of_another_drive_are_refused(
    recorded: RecordedDrive, detections: Path, tmp_path: Path
) -> None:
    recording = rewrite(detections, tmp_path / "other", set(range(25)), shift_ns=10**12)
    with pytest.raises(UserError, match="different times"):
        evaluate_recording(
            recording,
            recorded.sweeps,
            dataroot=recorded.dataroot,
            version=recorded.version,
            output=tmp_path / "out",
        )
    assert not (tmp_path / "out").exists()


def test_ego_pose_is_taken_at_the_stamp_of_the_detections(recorded: RecordedDrive, detections: Path) -> None:
    """Poses at consecutive stamps must give the speed of the ego, 8 m/s."""
    with BagReader(recorded.sweeps) as bag:
        drive = Drive(bag)
        stamps = drive.reference_stamps()
        positions = np.array([drive.rig.global_from_ego(stamp)[:2, 3] for stamp in stamps])
    speeds = np.linalg.norm(np.diff(positions, axis=0), axis=1) / np.diff(np.array(stamps)) * 1e9
    np.testing.assert_allclose(speeds, 8.0, rtol=0.01)


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def one_sentence(capsys: pytest.CaptureFixture[str]) -> str:
    """Return stderr of the command, which must be one line without traceback."""
    text = capsys.readouterr().err.strip()
    assert "\n" not in text
    assert "Traceback" not in text
    return text


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"--dataroot": "/nowhere"}, "/nowhere"),
        ({"--version": "v9"}, "v1.0-drive"),
        ({"--detections": "/nowhere"}, "'/nowhere' does not exist"),
        ({"--bag": "/nowhere"}, "'/nowhere' does not exist"),
    ],
)
def test_bad_input_gives_one_sentence_and_exit_code_2(
    recorded: RecordedDrive,
    detections: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, str],
    expected: str,
) -> None:
    options = {
        "--detections": detections,
        "--bag": recorded.sweeps,
        "--dataroot": recorded.dataroot,
        "--version": recorded.version,
        "--output": tmp_path / "out",
        **change,
    }
    assert run("evaluate", *(part for option in options.items() for part in option)) == 2
    assert expected in one_sentence(capsys)
    assert not (tmp_path / "out").exists()


def test_error_for_a_bag_without_detections_names_the_topic(
    recorded: RecordedDrive, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--dataroot", recorded.dataroot, "--version", recorded.version, "--output", tmp_path / "out")
    assert run("evaluate", "--detections", recorded.sweeps, "--bag", recorded.sweeps, *arguments) == 2
    assert "has no topic /detections;" in one_sentence(capsys)


def test_evaluate_and_report_commands_work_together(
    recorded: RecordedDrive, detections: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bags = ("--detections", detections, "--bag", recorded.sweeps)
    data = ("--dataroot", recorded.dataroot, "--version", recorded.version)
    assert run("evaluate", *bags, *data, "--output", tmp_path / "out") == 0
    assert "rounds in 25, detected 25, dropped 0" in capsys.readouterr().out
    metrics = (tmp_path / "out" / "metrics.json").read_bytes()
    assert run("evaluate", *bags, *data, "--output", tmp_path / "out") == 2
    assert "exists already" in one_sentence(capsys)
    assert (tmp_path / "out" / "metrics.json").read_bytes() == metrics

    assert run("report", *bags, "--results", tmp_path / "out", "--frames", 3) == 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count('<figure class="frame"') == 3
    assert "key frame 5 of 5" in page
    capsys.readouterr()
    assert run("report", *bags, "--results", tmp_path / "out") == 2
    assert "exists already" in one_sentence(capsys)
    assert run("report", *bags, "--results", tmp_path / "nowhere") == 2
    assert "ftkd evaluate" in one_sentence(capsys)
