# SPDX-License-Identifier: Apache-2.0
"""The plan of an experiment: stored once, resumed only with the same settings, damaged files refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from ftkd_core.errors import UserError
from tests.training.study.helpers import PLAN, arguments
from training.study.experiments import main, make_parser, make_plan
from training.study.plan import Plan, load_plan, resume_plan


def plan_of(out: Path, *more: str) -> Plan:
    return make_plan(make_parser().parse_args(arguments(out, *more)))


def test_plan_is_stored_and_resumed_with_more_seeds(tmp_path: Path) -> None:
    steps = ("--steps", "5", "--teacher-steps", "7")
    first = plan_of(tmp_path, *steps, "--seeds", "2", "--set-method", "pv_target=current")
    assert (first.steps, first.teacher_steps, first.set_method) == (5, 7, ("pv_target=current",))
    assert load_plan(tmp_path / "plan.json") == first
    same = ("--set-method", "pv_target=current")
    assert plan_of(tmp_path, "--seeds", "2", *same) == first, "steps need not be repeated"
    assert plan_of(tmp_path, "--seeds", "3", *same) == replace(first, seeds=3)
    assert plan_of(tmp_path, "--seeds", "9", "--phase", "score") == first, "scoring needs no settings"


def test_resuming_with_another_setting_is_refused(tmp_path: Path) -> None:
    plan_of(tmp_path, "--steps", "5", "--teacher-steps", "7")
    with pytest.raises(UserError, match="has scenes 200, the command 30; give another --out"):
        plan_of(tmp_path, "--scenes", "30")
    with pytest.raises(UserError, match="has steps 5, the command 6"):
        plan_of(tmp_path, "--steps", "6")
    with pytest.raises(UserError, match="has set_student"):
        plan_of(tmp_path, "--set-student", "decoder.learned_linking=true")
    with pytest.raises(UserError, match="has set_method"):
        plan_of(tmp_path, "--set-method", "pv_target=current")


def test_new_experiment_needs_the_steps_of_what_it_trains(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--steps 0: a new experiment needs"):
        plan_of(tmp_path)
    with pytest.raises(UserError, match="--teacher-steps 0: .*or weights with --teacher"):
        plan_of(tmp_path, "--steps", "5")
    given = ("--teacher", "a")
    assert plan_of(tmp_path / "given", "--steps", "5", *given).teacher_steps == 0
    assert plan_of(tmp_path / "none", "--steps", "5", "--rows", "none").teacher_steps == 0
    assert not (tmp_path / "plan.json").exists(), "a refused plan is not stored"
    with pytest.raises(UserError, match="--teacher-steps 0"):
        plan_of(tmp_path / "none")  # all rows now


@pytest.mark.parametrize("content", ["", '{"preset": "ti', "[]", '{"preset": "tiny"}'])
def test_damaged_or_foreign_plan_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    (tmp_path / "plan.json").write_text(content)
    for phase in ("train", "score"):
        assert main(arguments(tmp_path, "--phase", phase)) == 2
        error = capsys.readouterr().err
        assert error.startswith("experiments: ") and error.count("\n") == 1
        assert "plan.json' cannot be read" in error or "is not the plan of an experiment" in error


def test_unknown_setting_in_a_plan_is_refused(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(json.dumps(PLAN.as_json() | {"minutes": 25}))
    with pytest.raises(UserError, match="is not the plan of an experiment: expected backbone_ratio, "):
        resume_plan(tmp_path / "plan.json", PLAN)


def test_bad_options_are_refused_before_any_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for more, message in (
        (["--preset", "huge"], "unknown preset 'huge'"),
        (["--rows", "none,fgd"], "unknown row 'fgd'"),
        (["--set-method", "matching=half"], "matching"),
        (["--cache-features"], "give --init and --backbone-ratio 0"),
        (["--world", "rural"], "unknown world 'rural'"),
        (["--hide-future", "1.5"], "hide_future is 1.5; expected a value less than or equal to 1"),
        (["--teacher-preset", "sparse_bev_tiny"], "expected a preset with future frames"),
        (["--phase", "score"], "holds no experiment"),
    ):
        assert main(arguments(tmp_path / "out", *more)) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main([]) == 2
    assert "give one with --out" in capsys.readouterr().err
