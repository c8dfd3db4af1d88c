# SPDX-License-Identifier: Apache-2.0
"""The plan of an experiment: everything that defines its runs. It is stored in `plan.json`."""

from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Final

from ftkd_core.errors import UserError
from training.study.json_files import read_json
from training.study.matrix import OFFLINE

HELD_OUT_SEED: Final = 900_000
"""Seed of the first held-out scene."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Settings of all runs of an experiment. steps: of every student; teacher_steps: of the teacher, if it is
    trained; teacher: weights file that is used instead of training one; world: synthetic world of all scenes;
    hide_future: share of the teacher's training windows whose future is hidden."""

    preset: str
    teacher_preset: str
    seeds: int
    scenes: int
    held_out: int
    streams: int
    steps: int
    teacher_steps: int
    share: float
    lr: float
    init: str
    init_parts: str
    backbone_ratio: float
    teacher: str
    world: str = "ordinary"
    hide_future: float = 0.5
    cache_features: bool = False
    set_method: tuple[str, ...] = ()
    set_student: tuple[str, ...] = ()

    def preset_of(self, method: str) -> str:
        """Return the preset of the teacher, or of the students of a row."""
        return self.teacher_preset if method == OFFLINE else self.preset

    def as_json(self) -> dict[str, Any]:
        """Return the content of `plan.json`."""
        return asdict(self)


def load_plan(path: Path) -> Plan:
    """Return the plan of a file. Raise UserError if it is missing, damaged or not a plan."""
    found = read_json(path, "restore it, or give another --out")
    names = {field.name for field in fields(Plan)}
    if not isinstance(found, dict) or found.keys() != names:
        raise UserError(
            f"{str(path)!r} is not the plan of an experiment: expected {', '.join(sorted(names))}; give "
            "another --out"
        )
    lists = {name: tuple(found[name]) for name in ("set_method", "set_student")}  # lists in JSON
    return Plan(**(found | lists))


def resume_plan(path: Path, requested: Plan) -> Plan:
    """Return the plan of a file with the requested number of seeds, because runs may be added later.

    Raises UserError if another setting differs. Requested steps of 0 match any number.
    """
    found = replace(load_plan(path), seeds=requested.seeds)
    for name, wanted in requested.as_json().items():
        planned = getattr(found, name)
        if wanted != planned and not (name in ("steps", "teacher_steps") and wanted == 0):
            raise UserError(
                f"{str(path)!r} has {name} {planned!r}, the command {wanted!r}; give another --out"
            )
    return found


def check_steps(plan: Plan, teachers: list[str]) -> None:
    """Raise UserError if a new plan lacks the number of steps of students, or of a teacher to be trained."""
    if plan.steps < 1:
        raise UserError(
            f"--steps {plan.steps}: a new experiment needs the steps of each student; give --steps"
        )
    if plan.teacher_steps < 1 and teachers and not plan.teacher:
        raise UserError(
            f"--teacher-steps {plan.teacher_steps}: a new experiment needs the steps of the teacher; give "
            "--teacher-steps, or weights with --teacher"
        )
