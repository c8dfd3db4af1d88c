# SPDX-License-Identifier: Apache-2.0
"""A call of the experiment that is given minutes: what it begins, when it stops, and how the next goes on."""

import json
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ftkd_core.weights import save_weights
from tests.core.helpers import small_config
from tests.core.test_sparse_bev import small_sparse
from tests.training.test_experiments import arguments, pretend_costs
from training.study import experiments, planning, stages
from training.study.experiments import Experiment, main, make_parser


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """An experiment whose parts only take time, on a clock of its own: 1 s a step, 5 s a scene of answers,
    20 s to balance, 2 s to detect a scene. `trained` lists its runs."""
    world = SimpleNamespace(now=0.0, trained=[])
    pretend_costs(monkeypatch, answers=5.0, detection=2.0)

    def train(command: list[str], **_: object) -> object:
        if command[0] == "git":
            return SimpleNamespace(stdout="")
        out, steps = (command[command.index(name) + 1] for name in ("--out", "--steps"))
        config = small_sparse(past=1).config if "sparse" in command[command.index("--preset") + 1] else None
        config = config or small_config()
        save_weights(
            Path(out, "weights.safetensors"), {"some": torch.zeros(1)}, config, notes={"steps": int(steps)}
        )
        world.now += int(steps)
        world.trained.append(Path(out).name)
        return SimpleNamespace(returncode=0)

    def detect(weights: Path, clips: object, count: int, output: Path, *_: object, **__: object) -> None:
        output.parent.mkdir(exist_ok=True)
        output.touch()
        world.now += 2 * count

    def fill(*_: object, ready: object, **__: object) -> None:
        ready()  # type: ignore[operator]
        world.now += 5

    def balance_method(*_: object, **__: object) -> dict[str, object]:
        world.now += 20
        return {"settings": {}}

    for module in (experiments, planning):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: world.now))
    monkeypatch.setattr(Experiment, "render", lambda self, plan: None)
    monkeypatch.setattr(subprocess, "run", train)
    monkeypatch.setattr(stages, "processes", ThreadPoolExecutor)
    for replacement in (detect, fill, balance_method):
        monkeypatch.setattr(stages, replacement.__name__, replacement)
    return world


def test_a_call_stops_in_time_and_the_next_goes_on(
    tmp_path: Path, pretended: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    command = arguments(
        tmp_path, "--phase", "train", "--rows", "none,ftkd", "--seeds", "2", "--steps", "100",
        "--teacher-steps", "100", "--held-out", "3", "--minutes", "7",
    )  # fmt: skip
    assert main(command) == 3
    assert pretended.trained == ["teacher", "none-0", "ftkd-0"]
    assert pretended.now == 100 + 5 + 20 + 2 * 106 + 6 <= 7 * 60  # the teacher's detections still fitted
    said = capsys.readouterr().out
    assert "would take about 1.8 minutes" in said
    assert "2 of 5 runs are left; the same command goes on" in said
    assert main(command) == 0
    assert pretended.trained[3:] == ["none-1", "ftkd-1"]
    notes = [
        json.loads((tmp_path / "predictions" / f"{n}.json").read_text()) for n in ("teacher-0", "none-0")
    ]
    assert [note["preset"] for note in notes] == [small_sparse().config.preset, "tiny"]
    assert main([*command[:-2], "--seeds", "3"]) == 0  # without --minutes nothing stops
    assert pretended.trained[5:] == ["none-2", "ftkd-2"]


def test_a_call_that_could_begin_nothing_says_so(
    tmp_path: Path, pretended: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    command = arguments(
        tmp_path, "--phase", "train", "--rows", "none,ftkd", "--seeds", "1", "--steps", "100",
        "--teacher-steps", "100", "--minutes", "1",
    )  # fmt: skip
    assert main(command) == 3  # the first has rendered
    assert "3 of 3 runs are left" in capsys.readouterr().out
    assert main(command) == 2
    assert "run teacher would take about 1.7 minutes" in capsys.readouterr().err
    assert pretended.trained == []


def test_runs_of_this_call_say_what_the_next_will_take(tmp_path: Path, pretended: SimpleNamespace) -> None:
    command = arguments(tmp_path, "--phase", "train", "--minutes", "9", "--parallel", "2", "--held-out", "3")
    costs = Experiment(make_parser().parse_args(command)).costs
    assert costs.run("none", 100) == pytest.approx(1.2 * 106)  # two at a time take 0.6 of one by one
    assert costs.run("teacher", 100) == pytest.approx(100)
    costs.learn("none", 100, 240.0)
    assert costs.run("mgd", 50) == pytest.approx(120 + 1.2 * 6)
    assert costs.run("teacher", 100) == pytest.approx(100)
