# SPDX-License-Identifier: Apache-2.0
"""The experiment runner: order of the work, stopping at the deadline, resuming, damaged state files."""

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from ftkd_core.errors import UserError
from tests.core.helpers import small_sparse
from tests.training.study.helpers import PLAN, Clock, SimulatedWork, arguments
from training.study import experiments
from training.study.deadline import Deadline, OutOfTime
from training.study.plan import Plan
from training.study.runner import Runner
from training.study.work import Machine

ROWS = ("none", "ftkd")


def make_runner(
    out: Path, work: SimulatedWork, minutes: float | None = None, rows: Sequence[str] = ROWS
) -> Runner:
    return Runner(out, work.plan, rows, work, Deadline(minutes, work.clock))


def test_deadline_passes_after_its_minutes() -> None:
    clock = Clock(100.0)
    deadline = Deadline(2, clock)
    assert deadline.remaining() == 120
    clock.now += 119
    assert deadline.remaining() == 1
    clock.now += 1
    with pytest.raises(OutOfTime, match="--minutes 2 are over"):
        deadline.remaining()
    assert Deadline(None, clock).remaining() is None


def test_experiment_trains_each_row_with_each_seed_and_detects(tmp_path: Path) -> None:
    work = SimulatedWork(PLAN)
    runner = make_runner(tmp_path, work)
    assert runner.count_runs() == (5, 5)
    runner.run()
    assert work.trained == ["teacher", "none-0", "ftkd-0", "none-1", "ftkd-1"]
    assert sorted(work.detected) == ["ftkd-0", "ftkd-1", "none-0", "none-1", "teacher-0"]
    assert work.scenes_filled == {"cache_teacher_future": 2} and work.balanced == ["ftkd"]
    assert work.clock.now == 100 + 2 * 5 + 20 + 4 * 100 + 5 * 6
    assert runner.count_runs() == (0, 5)
    notes = [
        json.loads((tmp_path / "predictions" / f"{n}.json").read_text()) for n in ("teacher-0", "none-0")
    ]
    assert [note["preset"] for note in notes] == [small_sparse().config.preset, "tiny"]


def test_one_teacher_is_used_with_and_without_its_future(tmp_path: Path) -> None:
    work = SimulatedWork(replace(PLAN, seeds=1))
    runner = make_runner(tmp_path, work, rows=["ftkd", "ftkd_blind"])
    runner.run()
    assert work.trained == ["teacher", "ftkd-0", "ftkd_blind-0"]
    assert work.scenes_filled == {"cache_teacher_future": 2, "cache_teacher_blind_future": 2}
    assert work.balanced == ["ftkd", "ftkd_blind"]
    assert sorted(work.detected) == ["ftkd-0", "ftkd_blind-0", "teacher-0", "teacher_blind-0"]
    assert work.detected_without_future == ["teacher_blind-0"]
    assert runner.weights("teacher_blind-0") == runner.weights("teacher-0")
    assert "--hide-future" in work.commands["ftkd_blind-0"]
    assert "--hide-future" not in work.commands["ftkd-0"]
    caches = [
        command[command.index("--cache") + 1]
        for command in map(work.commands.get, ("ftkd-0", "ftkd_blind-0"))
    ]
    assert len(set(caches)) == 2
    assert runner.count_runs() == (0, 4)


def test_completed_parts_are_not_repeated_and_seeds_can_be_added(tmp_path: Path) -> None:
    make_runner(tmp_path, SimulatedWork(PLAN)).run()
    again = SimulatedWork(PLAN, scenes_filled={"cache_teacher_future": 2})
    make_runner(tmp_path, again).run()
    assert again.clock.now == 0 and not again.trained
    more = SimulatedWork(replace(PLAN, seeds=3), scenes_filled={"cache_teacher_future": 2})
    make_runner(tmp_path, more).run()
    assert more.trained == ["none-2", "ftkd-2"] and more.balanced == []


def test_run_stops_at_the_deadline_and_the_next_resumes_it(tmp_path: Path) -> None:
    clock, work = Clock(), SimulatedWork(PLAN)
    for minutes, trained, left in ((1, [], 5), (1, ["teacher"], 5), (5, ["teacher", "none-0", "ftkd-0"], 3)):
        work = replace(work, clock=clock)
        began = clock.now
        runner = make_runner(tmp_path, work, minutes)
        with pytest.raises(OutOfTime):
            runner.run()
        assert clock.now - began <= 60 * minutes + 20, "only a balance that has started exceeds the limit"
        assert work.trained == trained
        assert runner.count_runs() == (left, 5)
    make_runner(tmp_path, work).run()
    assert work.trained == ["teacher", "none-0", "ftkd-0", "none-1", "ftkd-1"]


def test_cache_filling_stops_between_two_scenes(tmp_path: Path) -> None:
    work = SimulatedWork(replace(PLAN, scenes=40))
    with pytest.raises(OutOfTime):
        make_runner(tmp_path, work, 2).run()
    assert work.scenes_filled == {"cache_teacher_future": 4}  # 20 s were left after the teacher


def test_newer_weights_are_detected_again(tmp_path: Path) -> None:
    work = SimulatedWork(replace(PLAN, seeds=1))
    runner = make_runner(tmp_path, work, rows=["none"])
    runner.run()
    newer = runner.notes_file("none-0").stat().st_mtime + 10
    os.utime(runner.weights("none-0"), (newer, newer))
    assert not runner.is_detected("none-0")
    runner.run()
    assert work.trained == ["none-0"] and work.detected == ["none-0", "none-0"]


@pytest.mark.parametrize("content", ["", '{"ftkd": {"sett', "[1]", '{"ftkd": {}}', '{"ftkd": 1}'])
def test_damaged_or_foreign_balance_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "balance.json").write_text(content)
    work = SimulatedWork(PLAN)
    with pytest.raises(UserError, match=r"balance.json' .*delete it to balance again"):
        make_runner(tmp_path, work).run()
    assert work.trained == ["teacher"], "no student is trained with an unknown balance"


def test_damaged_weights_are_refused(tmp_path: Path) -> None:
    work = SimulatedWork(PLAN)
    runner = make_runner(tmp_path, work)
    runner.run()
    for name in ("none-1", "teacher-0"):
        content = runner.weights(name).read_bytes()
        runner.weights(name).write_bytes(content[:20])
        with pytest.raises(UserError, match="weights.safetensors"):
            make_runner(tmp_path, work).run()
        runner.weights(name).write_bytes(content)


def test_error_of_a_run_comes_before_the_end_of_time(tmp_path: Path) -> None:
    class Failing(SimulatedWork):
        def train(self, name: str, command: Sequence[str], log: Path, timeout: float | None) -> None:
            if name == "none-1":
                raise OutOfTime("over")
            if name == "ftkd-1":
                raise UserError("run ftkd-1 ended with 2")
            super().train(name, command, log, timeout)

    with pytest.raises(UserError, match="ftkd-1 ended with 2"):
        make_runner(tmp_path, Failing(PLAN)).run()


def test_stopped_command_reports_the_runs_that_are_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Stopping(SimulatedWork):
        def __init__(self, plan: Plan, machine: Machine) -> None:
            super().__init__(plan, machine=machine)

        def train(self, name: str, command: Sequence[str], log: Path, timeout: float | None) -> None:
            if name == "ftkd-0":
                raise OutOfTime("run ftkd-0 was stopped after 60 s")
            super().train(name, command, log, timeout)

    monkeypatch.setattr(experiments, "Work", Stopping)
    command = arguments(
        tmp_path, "--phase", "train", "--rows", "none,ftkd", "--seeds", "1", "--steps", "3",
        "--teacher-steps", "3",
    )  # fmt: skip
    assert experiments.main(command) == 3
    assert "stopped after 60 s. 1 of 3 runs are left; the same command resumes" in capsys.readouterr().out
    monkeypatch.setattr(experiments, "Work", lambda plan, machine: SimulatedWork(plan, machine=machine))
    assert experiments.main(command) == 0
