# SPDX-License-Identifier: Apache-2.0
"""How many steps fit into an experiment's time, what its parts cost, and when its time is over."""

import contextlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ftkd_core.data.clips import Clip
from ftkd_core.errors import UserError
from ftkd_core.weights import save_weights
from tests.core.helpers import make_clip, small_config
from tests.core.test_sparse_bev import small_sparse
from training.study import stages, timing
from training.study.matrix import OFFLINE, PAST
from training.study.planning import Clock, Needs, OutOfTime, Plan, choose_steps
from training.study.timing import Costs, needs_of

PLAN = Plan(
    preset="tiny", teacher_preset="sparse_bev_tiny_offline", past_preset="sparse_bev_tiny", seeds=2, scenes=3,
    held_out=5, streams=2, steps=0, teacher_steps=0, share=0.1, lr=4e-4, init="", init_parts="",
    backbone_ratio=1.0, teacher="", past_teacher="",
)  # fmt: skip


class Clips:
    """Two short clips of noise."""

    name = "noise"

    def __init__(self, cache: Path = Path()) -> None:
        self.cache = cache

    def __call__(self, index: int) -> Clip:
        return make_clip(seed=index)


def make_costs(plan: Plan, kept: Path, parallel: int = 1) -> Costs:
    clips, cpu = Clips(), torch.device("cpu")
    return Costs(plan, clips, cpu, kept, threads=1, parallel=parallel)  # type: ignore[arg-type]


def test_all_that_is_no_training_is_taken_out_of_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Costs, "step", lambda self, method: {OFFLINE: 4.0, PAST: 2.0}.get(method, 1.0))
    monkeypatch.setattr(Costs, "answers", lambda self, teacher, kind: 10.0 if kind == "future" else 1.0)
    monkeypatch.setattr(Costs, "detection", lambda self, method: 3.0 if method in (OFFLINE, PAST) else 2.0)
    monkeypatch.setattr(Costs, "start", lambda self: 7.0)
    rows = ["none", "none_long", "ftkd", "ftkd_no_pv", "mgd", "cwd", "ftkd_past_teacher"]
    needs = needs_of(PLAN, rows, make_costs(PLAN, tmp_path / "costs.json"))
    assert needs.beside == {
        "the teachers' answers": 3 * (10 + 1 + 10),  # two kinds of the offline teacher, one of the other
        "balancing": 20 * 5,
        "detection": 5 * (14 * 2 + 2 * 3),
        "starting processes": 7 * (14 + 2),
    }
    assert (needs.teachers, needs.students) == (6.0, 2 * 8 * 1.0)
    side_by_side = needs_of(PLAN, rows, make_costs(PLAN, tmp_path / "costs.json", parallel=2))
    assert side_by_side.students == pytest.approx(0.6 * needs.students)
    assert side_by_side.beside["detection"] == pytest.approx(5 * (0.6 * 14 * 2 + 2 * 3))
    given = needs_of(replace(PLAN, teacher="a"), ["ftkd"], make_costs(PLAN, tmp_path / "costs.json"))
    assert given.teachers == 0 and given.beside["starting processes"] == 7 * 2


def test_steps_fill_the_time_that_is_left() -> None:
    needs = Needs(beside={"balancing": 100.0, "detection": 200.0}, teachers=5.0, students=10.0)
    chosen = choose_steps(PLAN, needs, minutes=60, spent=400)
    free = 0.95 * (3600 - 400) - 300
    assert chosen.teacher_steps == int(free / 3 / 5)
    assert chosen.steps == int((free - 5 * chosen.teacher_steps) / 10)
    known = choose_steps(replace(PLAN, teacher_steps=30), needs, minutes=60, spent=400)
    assert (known.teacher_steps, known.steps) == (30, int((free - 150) / 10))
    known = choose_steps(replace(PLAN, steps=200), needs, minutes=60, spent=400)
    assert (known.teacher_steps, known.steps) == (int((free - 2000) / 5), 200)  # less than a third is left


def test_where_nothing_sensible_fits_the_numbers_are_said() -> None:
    needs = Needs(beside={"detection": 1200.0}, teachers=5.0, students=10.0)
    with pytest.raises(UserError, match="0 steps of a student") as refused:
        choose_steps(PLAN, needs, minutes=25, spent=26 * 60)  # rendering alone took longer
    assert "26.0 minutes went by before" in str(refused.value)
    assert "detection 20.0" in str(refused.value)
    minutes = int(str(refused.value).split("--minutes ")[1].split(",")[0])
    assert choose_steps(PLAN, needs, minutes, spent=26 * 60).steps >= 20
    with pytest.raises(UserError):
        choose_steps(PLAN, needs, minutes - 1, spent=26 * 60)
    taught = replace(PLAN, teacher_steps=500)
    with pytest.raises(UserError, match="500 steps of a teacher and 0 steps"):
        choose_steps(taught, needs, minutes=60, spent=0)


def test_parts_are_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "preset", lambda name: small_config())
    monkeypatch.setattr(timing, "sparse_bev_preset", lambda name: small_sparse(past=1, future=1).config)
    monkeypatch.setattr(timing.subprocess, "run", lambda *_, **__: None)
    given = small_sparse(past=1)
    save_weights(tmp_path / "given.safetensors", given.state_dict(), given.config)
    plan, kept = replace(PLAN, past_teacher=str(tmp_path / "given.safetensors")), tmp_path / "costs.json"
    threads = torch.get_num_threads()

    def all_of(costs: Costs) -> list[float]:
        return [
            costs.step("none"), costs.step(OFFLINE), costs.answers(OFFLINE, "future"),
            costs.answers(PAST, "relations"), costs.detection("none"), costs.detection(PAST), costs.start(),
        ]  # fmt: skip

    first = all_of(make_costs(plan, kept))
    assert all(seconds > 0 for seconds in first)
    assert torch.get_num_threads() == threads
    assert list(json.loads(kept.read_text()).values()) == first
    assert any("given.safetensors" in what for what in json.loads(kept.read_text()))
    for name in ("seconds_per_step", "fill_cache", "predict"):
        monkeypatch.setattr(timing, name, None)
    assert all_of(make_costs(plan, kept)) == first


def test_a_clock_lets_begin_what_ends_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def unasked() -> float:
        raise AssertionError("measured, though time is not limited")

    Clock(None).need("a run", unasked)
    clock = Clock(10)
    monkeypatch.setattr(clock, "spent", lambda: 540.0)
    with pytest.raises(OutOfTime, match=r"a run would take about 1.5 minutes, and --minutes 10 leave 1.0"):
        clock.need("a run", lambda: 90.0)
    assert not clock.moved
    clock.need("a short run", lambda: 59.0)
    assert clock.moved


def test_answers_stop_between_two_scenes_and_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "preset", lambda name: small_config())
    model = small_sparse(past=1, future=1)
    save_weights(tmp_path / "teacher.safetensors", model.state_dict(), model.config)
    begun = 0

    def ready() -> None:
        nonlocal begun
        if begun == 1:
            raise OutOfTime
        begun += 1

    def fill(ready: Callable[[], None]) -> int:
        with contextlib.suppress(OutOfTime):
            stages.fill(
                tmp_path / "answers", "future", tmp_path / "teacher.safetensors", "tiny",
                Clips(tmp_path), 2, torch.device("cpu"), ready=ready,  # type: ignore[arg-type]
            )  # fmt: skip
        return len(json.loads((tmp_path / "answers" / "manifest.json").read_text())["shards"])

    assert fill(ready) == 1
    assert fill(lambda: None) == 2
