# SPDX-License-Identifier: Apache-2.0
"""Several scenes or bags at once: failures are reported at the end, finished work is kept, lost work is run
again."""

import importlib.util
import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from ftkd_core.errors import UserError
from ftkd_ros.bag.fleet import Outcome, Workers, check_outcomes, run_tasks
from ftkd_ros.cli import main
from tests.ros.driving_scene import SCENE, VERSION
from tests.ros.recorded_drive import RecordedDrive, record_drive

RAY = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="the optional package ray is not installed"
)


def work(name: str) -> str:
    if name == "bad":
        raise UserError("cannot be read")
    return f"{name} done"


def killed(name: str) -> str:
    if name == "bad":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.5)
    return name


@pytest.mark.parametrize("jobs", [1, 3])
def test_one_bad_task_does_not_stop_the_others(jobs: int) -> None:
    outcomes = sorted(run_tasks(work, ["a", "bad", "c"], Workers(jobs=jobs)))
    assert outcomes == [
        Outcome("a", "a done", False), Outcome("bad", "cannot be read", True), Outcome("c", "c done", False)
    ]  # fmt: skip
    with pytest.raises(UserError, match="1 of 3 bags failed: bad: cannot be read"):
        check_outcomes(outcomes, "bags")


def test_killed_process_is_a_failed_task() -> None:
    outcomes = list(run_tasks(killed, ["a", "bad"], Workers(jobs=2)))
    assert {outcome.name for outcome in outcomes} == {"a", "bad"}
    assert Outcome("bad", "its process was killed; run again", True) in outcomes


def test_missing_ray_and_missing_cluster_are_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("ray") is None:
        with pytest.raises(UserError, match="pip install 'ray>=2.9'"):
            list(run_tasks(work, ["a"], Workers(ray="auto")))
    else:
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        with pytest.raises(UserError, match="no Ray cluster at 'auto'"):
            list(run_tasks(work, ["a"], Workers(ray="auto")))


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> RecordedDrive:
    return record_drive(tmp_path_factory.mktemp("fleet"))


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def test_several_bags_are_detected_kept_and_scored_together(
    recorded: RecordedDrive, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(recorded.key_frames, damaged)
    (mcap,) = damaged.glob("*.mcap")
    mcap.write_bytes(mcap.read_bytes()[:5000])
    bags = [part for bag in (recorded.key_frames, damaged) for part in ("--bag", bag)]
    assert run("detect", *bags, "--output", tmp_path / "found", "--runtime", "fast") == 2
    printed = capsys.readouterr()
    assert "in 5 of 5 rounds" in printed.out and "1 of 2 bags failed: " in printed.err
    assert (
        printed.err.strip().count("\n") == 0 or "1 of 2 bags failed" in printed.err.strip().splitlines()[-1]
    )
    assert [path.name for path in (tmp_path / "found").iterdir()] == ["key_frames"]
    assert run("detect", *bags, "--output", tmp_path / "found", "--runtime", "fast") == 2
    assert f"{tmp_path / 'found' / 'key_frames'}: kept" in capsys.readouterr().out
    other = ("--output", tmp_path / "found", "-p", "min_cameras:=2")
    assert run("detect", *bags, *other) == 2
    assert "was not made with these parameters" in capsys.readouterr().err
    same = ("--bag", recorded.key_frames, "--bag", recorded.key_frames, "--output", tmp_path / "same")
    assert run("detect", *same) == 2
    assert "2 bags would share the output" in capsys.readouterr().err


# -- Ray: two nodes on this machine -----------------------------------------------------------------------


@pytest.fixture
def cluster() -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    yield made
    made.shutdown()


def slow(folder: str, name: str) -> str:
    """Write a mark per attempt and take a second."""
    marks = Path(folder)
    (marks / f"{name}-{time.time_ns()}").touch()
    time.sleep(1.0)
    return name


@RAY
@pytest.mark.slow
def test_work_of_a_lost_node_runs_again(cluster: Any, tmp_path: Path) -> None:
    lost = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    names = [f"bag{number}" for number in range(6)]
    outcomes = []
    for outcome in run_tasks(partial(slow, str(tmp_path)), names, Workers(ray=cluster.address)):
        outcomes.append(outcome)
        if len(outcomes) == 1:
            cluster.remove_node(lost, allow_graceful=False)
    assert sorted(outcome.value for outcome in outcomes) == names
    assert not any(outcome.failed for outcome in outcomes)


@RAY
@pytest.mark.slow
def test_scenes_and_bags_run_on_ray(
    cluster: Any, recorded: RecordedDrive, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ray = ("--ray", cluster.address)
    data = ("--dataroot", recorded.dataroot, "--version", VERSION)
    assert run("convert", *data, "--output", tmp_path / "bags", *ray) == 0
    assert run("convert", *data, "--output", tmp_path / "bags", *ray) == 0
    assert "1 kept" in capsys.readouterr().out
    bag = tmp_path / "bags" / SCENE
    assert run("detect", "--bag", bag, "--output", tmp_path / "found", "--runtime", "fast", *ray) == 0
    assert run("detect", "--bag", bag, "--output", tmp_path / "local", "--runtime", "fast") == 0
    summary = json.loads((tmp_path / "found" / SCENE / "detector.json").read_text())
    assert summary["rounds_detected"] == 5
    pairs = ("--detections", tmp_path / "found" / SCENE, "--bag", bag)
    assert run("evaluate", *pairs, *data, "--output", tmp_path / "results", *ray) == 0
