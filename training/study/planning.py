# SPDX-License-Identifier: Apache-2.0
"""What an experiment is (its plan), how many steps fit into its time, and when the time is over.

What its parts cost is measured in timing.py; here are the sums.
"""

import argparse
import itertools
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final

from ftkd_core.errors import UserError
from training.study.matrix import OFFLINE, PAST

DEFAULT_MINUTES: Final = 25.0
LEAST_STEPS: Final = 20
"""Fewer say nothing, whatever they are of."""
_RESERVE: Final = 0.05  # of the time: what is measured before is not what it takes later
_SIDE_BY_SIDE: Final = 0.6


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What an experiment is; kept in plan.json, and the same for all its runs. Steps are of every student and
    of each teacher; teachers may be given instead of trained."""

    preset: str
    teacher_preset: str
    past_preset: str
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
    past_teacher: str
    keep_features: bool = False
    set_method: tuple[str, ...] = ()

    def preset_of(self, method: str) -> str:
        """Of a teacher, or of the students of a row."""
        return {OFFLINE: self.teacher_preset, PAST: self.past_preset}.get(method, self.preset)

    def given(self, teacher: str) -> str:
        """The weights file of a teacher that is not trained here; empty for one that is."""
        return self.past_teacher if teacher == PAST else self.teacher


def asked_plan(arguments: argparse.Namespace) -> Plan:
    """The plan of a command line; steps are 0 where it leaves them open."""
    a = arguments
    return Plan(
        preset=a.preset, teacher_preset=a.teacher_preset, past_preset=a.past_preset, seeds=a.seeds,
        scenes=a.scenes, held_out=a.held_out, streams=a.streams, steps=a.steps,
        teacher_steps=a.teacher_steps, share=a.share, lr=a.lr, init=_text(a.init),
        init_parts=a.init_parts, backbone_ratio=a.backbone_ratio,
        teacher=_text(a.teacher), past_teacher=_text(a.past_teacher), keep_features=a.keep_features,
        set_method=tuple(a.set_method),
    )  # fmt: skip


def _text(path: Path | None) -> str:
    return "" if path is None else str(path)


def read_plan(path: Path) -> Plan:
    """The plan of a file; one from before a setting existed has its default."""
    found = Plan(**json.loads(path.read_text(encoding="utf-8")))
    return replace(found, set_method=tuple(found.set_method))  # a list, in JSON


def go_on(path: Path, asked: Plan) -> Plan:
    """The plan of a file, with the seeds that are asked for: more may be run later. UserError where the
    command would train anything else."""
    found = replace(read_plan(path), seeds=asked.seeds)
    for name in asdict(asked):
        mine, yours = getattr(asked, name), getattr(found, name)
        if mine != yours and not (name.endswith("steps") and mine == 0):
            raise UserError(f"{str(path)!r} has {name} {yours!r}, the command {mine!r}; give another --out")
    return found


def together(parallel: int) -> float:
    """Of the time that runs take one after the other, what they take side by side (ours, roughly)."""
    return 1.0 if parallel == 1 else _SIDE_BY_SIDE


@dataclass(frozen=True, kw_only=True)
class Needs:
    """Seconds that a plan needs: of all that is no training step, by what it is; of a step of every teacher
    that is trained (0: none is), and of a step of every student."""

    beside: dict[str, float]
    teachers: float
    students: float


def choose_steps(plan: Plan, needs: Needs, minutes: float, spent: float) -> Plan:
    """The plan with the numbers of steps that fit where it leaves them open: `spent` seconds of the minutes
    are over, and of what is left for training teachers have a third. UserError where fewer than LEAST_STEPS
    fit, with the minutes that would do."""

    def fitting(minutes: float) -> Plan:
        free = (1 - _RESERVE) * (60 * minutes - spent) - sum(needs.beside.values())
        teacher_steps, steps = plan.teacher_steps, plan.steps
        if needs.teachers and not teacher_steps:
            theirs = min(free / 3, free - steps * needs.students)
            teacher_steps = max(0, int(theirs / needs.teachers))
        if not steps:
            steps = max(0, int((free - teacher_steps * needs.teachers) / needs.students))
        return replace(plan, teacher_steps=teacher_steps, steps=steps)

    def enough(chosen: Plan) -> bool:
        teachers = plan.teacher_steps or not needs.teachers or chosen.teacher_steps >= LEAST_STEPS
        return bool(teachers and (plan.steps or chosen.steps >= LEAST_STEPS))

    chosen = fitting(minutes)
    if enough(chosen):
        return chosen
    would_do = next(more for more in itertools.count(int(minutes) + 1) if enough(fitting(more)))
    beside = ", ".join(f"{what} {seconds / 60:.1f}" for what, seconds in needs.beside.items())
    trained = f"{chosen.teacher_steps} steps of a teacher and " if needs.teachers else ""
    raise UserError(
        f"{minutes:g} minutes allow {trained}{chosen.steps} steps of a student; expected at least "
        f"{LEAST_STEPS}. {spent / 60:.1f} minutes went by before (rendered scenes are kept), and training "
        f"needs beside it, in minutes: {beside}. Give --minutes {would_do}, or name fewer --rows, --seeds, "
        "--scenes or --held-out"
    )


class OutOfTime(Exception):  # noqa: N818  (not an error: the same command goes on)
    """The next part of an experiment would not end in time."""


class Clock:
    """The time of one call of the command, which may be unlimited (None). `moved` says whether the call has
    begun any part of its work."""

    def __init__(self, minutes: float | None) -> None:
        self.minutes, self.moved = minutes, False
        self._began = time.monotonic()

    def spent(self) -> float:
        """Seconds since the call began."""
        return time.monotonic() - self._began

    def need(self, what: str, seconds: Callable[[], float]) -> None:
        """To be called before a part that takes so many seconds, which are asked for only where time is
        limited. Errors: OutOfTime where the part would not end in time."""
        if self.minutes is None:
            return
        needed = seconds()  # may measure, which takes time itself
        left = max(0.0, 60 * self.minutes - self.spent())
        if needed > left:
            raise OutOfTime(
                f"{what} would take about {needed / 60:.1f} minutes, and --minutes {self.minutes:g} leave "
                f"{left / 60:.1f}"
            )
        self.moved = True
