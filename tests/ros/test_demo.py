# SPDX-License-Identifier: Apache-2.0
"""The demo's care for what is not its own, its processes, and (slow) the whole way on a short drive."""

import json
import os
import sys
import time
from pathlib import Path

import pytest
from driving_scene import VERSION, write_drive

from ftkd_core.errors import UserError
from ftkd_ros import demo
from ftkd_ros.demo import MARKER_NAME, DemoOptions, prepare_output, ros_environment, run_demo
from ftkd_ros.processes import ProcessGroup


def python(script: str) -> list[str]:
    return [sys.executable, "-c", script]


def test_the_output_of_an_earlier_demo_is_replaced(tmp_path: Path) -> None:
    output = tmp_path / "demo"
    prepare_output(output)
    (output / "old").mkdir()
    (output / "old" / "file").write_text("old")
    prepare_output(output)
    assert [path.name for path in output.iterdir()] == [MARKER_NAME]


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_the_output_of_others_is_refused_and_kept(tmp_path: Path, kind: str) -> None:
    output, precious = tmp_path / "demo", tmp_path / "elsewhere"
    precious.mkdir()
    (precious / MARKER_NAME).write_text("")
    (precious / "thesis.tex").write_text("years of work")
    if kind == "folder":
        output.mkdir()
        (output / "thesis.tex").write_text("years of work")
    elif kind == "file":
        output.write_text("years of work")
    else:
        output.symlink_to(precious)
    with pytest.raises(UserError, match="demo"):
        prepare_output(output)
    assert (precious / "thesis.tex").read_text() == "years of work"
    assert (output.read_text() if kind == "file" else (output / "thesis.tex").read_text()) == "years of work"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"scene": "scene-0061"}, "give --dataroot"),
        ({"dataroot": Path("data")}, "needs --version"),
        ({"rate": 0.0}, "--rate"),
        ({"domain_id": 102}, "--domain-id"),
        ({"runtime": "fastest"}, "--runtime 'fastest'; expected auto or fast or plain"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, object], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        DemoOptions(**options)  # type: ignore[arg-type]


def test_the_node_is_told_what_the_demo_was_asked_for(tmp_path: Path) -> None:
    options = DemoOptions(output=tmp_path, runtime="plain", device="cpu", weights=tmp_path / "w.safetensors")
    told = demo.detector_parameters(options, [0, None, 50_000_000])
    assert (told["runtime"], told["device"]) == ("plain", "cpu")
    assert told["weights"] == str(tmp_path / "w.safetensors")
    assert told["camera_time_offsets_s"] == [0, 0, 0.05]
    assert "weights" not in demo.detector_parameters(DemoOptions(), []), "the node has its own"


def test_ros_stays_on_this_machine_and_in_a_domain_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROS_AUTOMATIC_DISCOVERY_RANGE", "SUBNET")
    monkeypatch.setenv("ROS_DOMAIN_ID", "17")
    assert ros_environment(None)["ROS_DOMAIN_ID"] == "17"
    assert ros_environment(23)["ROS_DOMAIN_ID"] == "23"
    assert ros_environment(23)["ROS_AUTOMATIC_DISCOVERY_RANGE"] == "LOCALHOST"
    monkeypatch.delenv("ROS_DOMAIN_ID")
    assert 1 <= int(ros_environment(None)["ROS_DOMAIN_ID"]) <= 100


def test_a_missing_scene_is_told_before_anything_is_written(tmp_path: Path) -> None:
    dataroot = write_drive(tmp_path / "data")
    with pytest.raises(UserError, match="scene-0001"):
        run_demo(
            DemoOptions(output=tmp_path / "demo", dataroot=dataroot, version=VERSION, scene="scene-0002")
        )
    assert not (tmp_path / "demo").exists()


def test_a_process_is_waited_for_and_ends_with_ctrl_c(tmp_path: Path) -> None:
    script = (
        "import time\nprint('ready', flush=True)\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('bye')"
    )
    with ProcessGroup(tmp_path, os.environ) as group:
        process = group.start("worker", python(script))
        process.wait_for("ready", 30)
        assert process.exit_code is None
        process.interrupt(30)
    assert (tmp_path / "worker.log").read_text() == "ready\nbye\n"


def test_a_process_that_fails_is_quoted(tmp_path: Path) -> None:
    with ProcessGroup(tmp_path, os.environ) as group:
        process = group.start("worker", python("import sys\nprint('no camera')\nsys.exit(2)"))
        with pytest.raises(UserError, match=r"worker ended with exit code 2 .* last output: no camera"):
            process.wait_for("ready", 30)
        with pytest.raises(UserError, match="exit code 2; last output: no camera"):
            process.wait(30)


def test_a_process_that_takes_too_long_is_told_and_ended(tmp_path: Path) -> None:
    started = time.monotonic()
    with ProcessGroup(tmp_path, os.environ) as group:
        process = group.start("worker", python("import time\ntime.sleep(60)"))
        with pytest.raises(UserError, match=r"did not get ready within 0\.2 s"):
            process.wait_for("ready", 0.2)
        with pytest.raises(UserError, match=r"did not end within 0\.1 s"):
            process.wait(0.1)
    assert process.exit_code is not None
    assert time.monotonic() - started < 30


def test_synthetic_data_are_rendered_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "_SYNTHETIC_SECONDS", 1.0)
    monkeypatch.setattr(demo, "_SYNTHETIC_SIZE", (160, 90))
    first = demo.synthetic_dataset(tmp_path / "data", sweeps=False)
    stamp = (first / demo.SYNTHETIC_VERSION / "sample.json").stat().st_mtime_ns
    again = demo.synthetic_dataset(tmp_path / "data", sweeps=False)
    assert again == first
    assert (again / demo.SYNTHETIC_VERSION / "sample.json").stat().st_mtime_ns == stamp
    assert demo.synthetic_dataset(tmp_path / "data", sweeps=True) != first


@pytest.mark.slow
@pytest.mark.ros
def test_the_whole_way(tmp_path: Path) -> None:
    dataroot = write_drive(tmp_path / "data", sweeps=13)
    for _ in range(2):  # the second run replaces the first
        metrics = run_demo(DemoOptions(output=tmp_path / "demo", dataroot=dataroot, version=VERSION))
    assert (metrics["rounds_in"], metrics["rounds_detected"], metrics["rounds_dropped"]) == (3, 3, 0)
    assert metrics["latency_ms"]["p50"] > 0
    assert metrics["device"] in ("cpu", "cuda")
    names = {path.name for path in (tmp_path / "demo").iterdir()}
    assert {"input", "detections", "metrics.json", "report.html", "bev.png", "surround.png"} <= names
    assert json.loads((tmp_path / "demo" / "metrics.json").read_text())["mAP"] == metrics["mAP"]
