# SPDX-License-Identifier: Apache-2.0
"""The demo: output folder, options, child processes and (slow) all steps on a short drive."""

import json
import os
import sys
import time
from pathlib import Path

import pytest

from ftkd_core.errors import UserError
from ftkd_ros import demo
from ftkd_ros.demo import MARKER_NAME, DemoOptions, prepare_output, ros_environment, run_demo
from ftkd_ros.processes import ProcessGroup
from tests.ros.driving_scene import VERSION, write_drive


def python(script: str) -> list[str]:
    return [sys.executable, "-c", script]


def test_output_of_an_earlier_demo_is_replaced(tmp_path: Path) -> None:
    output = tmp_path / "demo"
    prepare_output(output)
    (output / "old").mkdir()
    (output / "old" / "file").write_text("old")
    prepare_output(output)
    assert [path.name for path in output.iterdir()] == [MARKER_NAME]


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_other_output_is_refused_and_kept(tmp_path: Path, kind: str) -> None:
    output, user_folder = tmp_path / "demo", tmp_path / "elsewhere"
    user_folder.mkdir()
    (user_folder / MARKER_NAME).write_text("")
    (user_folder / "thesis.tex").write_text("user data")
    if kind == "folder":
        output.mkdir()
        (output / "thesis.tex").write_text("user data")
    elif kind == "file":
        output.write_text("user data")
    else:
        output.symlink_to(user_folder)
    with pytest.raises(UserError, match="demo"):
        prepare_output(output)
    assert (user_folder / "thesis.tex").read_text() == "user data"
    assert (output.read_text() if kind == "file" else (output / "thesis.tex").read_text()) == "user data"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"scene": "scene-0061"}, "give --dataroot"),
        ({"dataroot": Path("data")}, "needs --version"),
        ({"rate": 0.0}, "--rate"),
        ({"domain_id": 102}, "--domain-id"),
        ({"rig": "cart"}, "rig 'cart': expected one of nuscenes, .*truck"),
        ({"rig": "truck", "dataroot": Path("data"), "version": "v1.0-mini"}, "--rig 'truck' with --dataroot"),
        ({"runtime": "fastest"}, "--runtime 'fastest'; expected auto or fast or plain"),
    ],
)
def test_invalid_options_are_refused(options: dict[str, object], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        DemoOptions(**options)  # type: ignore[arg-type]


def test_node_parameters_follow_the_options_of_the_demo(tmp_path: Path) -> None:
    options = DemoOptions(output=tmp_path, runtime="plain", device="cpu", weights=tmp_path / "w.safetensors")
    parameters = demo.detector_parameters(options, ["a", "b", "c"], [0, None, 50_000_000])
    assert (parameters["runtime"], parameters["device"]) == ("plain", "cpu")
    assert parameters["weights"] == str(tmp_path / "w.safetensors")
    assert parameters["cameras"] == ["a", "b", "c"]
    assert parameters["camera_time_offsets_s"] == [0, 0, 0.05]
    assert "weights" not in demo.detector_parameters(DemoOptions(), [], []), "the node has its own default"


def test_ros_environment_is_limited_to_this_machine_and_one_domain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROS_AUTOMATIC_DISCOVERY_RANGE", "SUBNET")
    monkeypatch.setenv("ROS_DOMAIN_ID", "17")
    assert ros_environment(None)["ROS_DOMAIN_ID"] == "17"
    assert ros_environment(23)["ROS_DOMAIN_ID"] == "23"
    assert ros_environment(23)["ROS_AUTOMATIC_DISCOVERY_RANGE"] == "LOCALHOST"
    monkeypatch.delenv("ROS_DOMAIN_ID")
    assert 1 <= int(ros_environment(None)["ROS_DOMAIN_ID"]) <= 100


def test_unknown_scene_is_refused_before_any_output(tmp_path: Path) -> None:
    dataroot = write_drive(tmp_path / "data")
    with pytest.raises(UserError, match="scene-0001"):
        run_demo(
            DemoOptions(output=tmp_path / "demo", dataroot=dataroot, version=VERSION, scene="scene-0002")
        )
    assert not (tmp_path / "demo").exists()


def test_process_is_awaited_and_interrupted(tmp_path: Path) -> None:
    script = (
        "import time\nprint('ready', flush=True)\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('bye')"
    )
    with ProcessGroup(tmp_path, os.environ) as group:
        process = group.start("worker", python(script))
        process.wait_for("ready", 30)
        assert process.exit_code is None
        process.interrupt(30)
    assert (tmp_path / "worker.log").read_text() == "ready\nbye\n"


def test_error_of_a_failed_process_contains_its_output(tmp_path: Path) -> None:
    with ProcessGroup(tmp_path, os.environ) as group:
        process = group.start("worker", python("import sys\nprint('no camera')\nsys.exit(2)"))
        with pytest.raises(UserError, match=r"worker ended with exit code 2 .* last output: no camera"):
            process.wait_for("ready", 30)
        with pytest.raises(UserError, match="exit code 2; last output: no camera"):
            process.wait(30)


def test_process_that_times_out_is_reported_and_killed(tmp_path: Path) -> None:
    started = time.monotonic()
    with ProcessGroup(tmp_path, os.environ) as group:
        process = group.start("worker", python("import time\ntime.sleep(60)"))
        with pytest.raises(UserError, match=r"did not get ready within 0\.2 s"):
            process.wait_for("ready", 0.2)
        with pytest.raises(UserError, match=r"did not end within 0\.1 s"):
            process.wait(0.1)
    assert process.exit_code is not None
    assert time.monotonic() - started < 30


def test_synthetic_data_set_is_rendered_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "_SYNTHETIC_SECONDS", 1.0)
    monkeypatch.setattr(demo, "_SYNTHETIC_WIDTH", 96)
    first = demo.synthetic_dataset(tmp_path / "data", sweeps=False)
    stamp = (first / demo.SYNTHETIC_VERSION / "sample.json").stat().st_mtime_ns
    second = demo.synthetic_dataset(tmp_path / "data", sweeps=False)
    assert second == first
    assert (second / demo.SYNTHETIC_VERSION / "sample.json").stat().st_mtime_ns == stamp
    assert demo.synthetic_dataset(tmp_path / "data", sweeps=True) != first
    assert demo.synthetic_dataset(tmp_path / "data", sweeps=False, rig="five_cameras") != first


@pytest.mark.slow
@pytest.mark.ros
def test_demo_runs_all_steps_twice(tmp_path: Path) -> None:
    dataroot = write_drive(tmp_path / "data", sweeps=13)
    for _ in range(2):  # the second run replaces the output of the first
        metrics = run_demo(DemoOptions(output=tmp_path / "demo", dataroot=dataroot, version=VERSION))
    assert (metrics["rounds_in"], metrics["rounds_detected"], metrics["rounds_dropped"]) == (3, 3, 0)
    assert metrics["latency_ms"]["p50"] > 0
    assert metrics["device"] in ("cpu", "cuda")
    names = {path.name for path in (tmp_path / "demo").iterdir()}
    assert {"input", "detections", "metrics.json", "report.html", "bev.png", "surround.png"} <= names
    assert json.loads((tmp_path / "demo" / "metrics.json").read_text())["mAP"] == metrics["mAP"]
