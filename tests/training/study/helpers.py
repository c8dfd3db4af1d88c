# SPDX-License-Identifier: Apache-2.0
"""A small plan, command lines and simulated work for the tests of the study."""

from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ftkd_core.weights import save_weights
from tests.core.helpers import small_config, small_sparse
from training.study.deadline import OutOfTime
from training.study.matrix import OFFLINE, SCORES
from training.study.plan import Plan
from training.study.work import Machine, Work

PLAN = Plan(
    preset="tiny", teacher_preset="sparse_bev_tiny_offline", seeds=2, scenes=2, held_out=3, streams=2,
    steps=100, teacher_steps=100, share=0.1, lr=4e-4, init="", init_parts="", backbone_ratio=1.0, teacher="",
)  # fmt: skip


def arguments(out: Path, *more: str) -> list[str]:
    """Return a command line of `training.study.experiments` with tiny models."""
    return ["--out", str(out), "--preset", "tiny", "--teacher-preset", "sparse_bev_tiny_offline",
            "--accelerator", "cpu", *more]  # fmt: skip


def entry(method: str, seed: int, score: float, **more: object) -> dict[str, object]:
    """Return a matrix entry with the same value for every score."""
    return {"method": method, "seed": seed, **dict.fromkeys(SCORES, score), "steps": 100, **more}


@dataclass
class Clock:
    """A clock that advances only when `now` is set."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class SimulatedWork(Work):
    """Work that only takes simulated time: 1 s per training step, 5 s per scene of teacher outputs, 20 s per
    balance, 2 s per held-out scene. A stopped run keeps its steps. `trained` lists completed runs."""

    plan: Plan
    clock: Clock = field(default_factory=Clock)
    machine: Machine = field(default_factory=lambda: Machine(accelerator="cpu"))
    trained: list[str] = field(default_factory=list)
    commands: dict[str, list[str]] = field(default_factory=dict)
    scenes_filled: dict[str, int] = field(default_factory=dict)
    balanced: list[str] = field(default_factory=list)
    detected: list[str] = field(default_factory=list)
    detected_without_future: list[str] = field(default_factory=list)

    def render(self) -> None:
        pass

    def train(self, name: str, command: Sequence[str], log: Path, timeout: float | None) -> None:
        self.commands[name] = list(command)
        steps = int(command[command.index("--steps") + 1])
        log.parent.mkdir(parents=True, exist_ok=True)
        progress = log.with_name("progress.txt")
        left = steps - (int(progress.read_text()) if progress.exists() else 0)
        if timeout is not None and timeout < left:
            self.clock.now += timeout
            progress.write_text(str(steps - left + int(timeout)))
            raise OutOfTime(f"run {name} was stopped")
        self.clock.now += left
        self.trained.append(name)
        config = small_sparse(past=1).config if name == OFFLINE else small_config()
        weights = log.with_name("weights.safetensors")
        save_weights(weights, {"some": torch.zeros(1)}, config, notes={"steps": steps})

    def fill_cache(
        self, row_name: str, folder: Path, teacher: Path, before_scene: Callable[[], object]
    ) -> None:
        while self.scenes_filled.get(folder.name, 0) < self.plan.scenes:
            before_scene()
            self.scenes_filled[folder.name] = self.scenes_filled.get(folder.name, 0) + 1
            self.clock.now += 5

    def balance(self, row_name: str, cache: Path, teacher: Path) -> dict[str, Any]:
        self.balanced.append(row_name)
        self.clock.now += 20
        return {"settings": {"pv_weight": 2.0}, "terms": {}}

    def detect(
        self, weights: Path, output: Path, pool: ProcessPoolExecutor, *, hide_future: bool = False
    ) -> None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.touch()
        self.detected.append(output.stem)
        if hide_future:
            self.detected_without_future.append(output.stem)
        self.clock.now += 2 * self.plan.held_out
