# SPDX-License-Identifier: Apache-2.0
"""The time-consuming parts of an experiment: render, train, fill caches, balance and detect."""

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from tqdm import tqdm

from ftkd_core.data.synthetic_clips import SyntheticClips
from ftkd_core.errors import UserError
from ftkd_core.presets import preset
from training.feature_cache import cache_features
from training.study import predicting
from training.study.balance import balance_row
from training.study.deadline import OutOfTime
from training.study.matrix import ROWS, row_settings
from training.study.model_files import load_model
from training.study.plan import HELD_OUT_SEED, Plan
from training.study.teacher_caches import cache_kind, fill_teacher_cache

_SAVE_EVERY: Final = 100  # steps; a run that is stopped by --minutes repeats fewer than these


@dataclass(frozen=True, kw_only=True)
class Machine:
    """How an experiment uses this machine; not part of its plan. threads: CPU threads per run (0: PyTorch's
    choice); parallel: student runs at the same time."""

    accelerator: str = "auto"
    threads: int = 0
    parallel: int = 1
    clips: Path = Path("build/clips")

    @property
    def device(self) -> torch.device:
        """The device of everything that is not a training process."""
        cuda = self.accelerator != "cpu" and torch.cuda.is_available()
        return torch.device("cuda" if cuda else "cpu")


class Work:
    """The work of one experiment on one machine. It does not track completed parts; `runner.Runner` does."""

    def __init__(self, plan: Plan, machine: Machine) -> None:
        self.plan, self.machine = plan, machine

    def clips(self, first_seed: int = 0) -> SyntheticClips:
        """Return scenes of consecutive seeds at the student's resolution."""
        image = preset(self.plan.preset).image
        return SyntheticClips(first_seed, image, self.machine.clips, world=self.plan.world)

    def render(self) -> None:
        """Render the missing scenes on all CPU cores."""
        for clips, count in (
            (self.clips(), self.plan.scenes),
            (self.clips(HELD_OUT_SEED), self.plan.held_out),
        ):
            with ProcessPoolExecutor(os.cpu_count()) as pool:
                work = pool.map(partial(_render, clips), range(count))
                list(tqdm(work, total=count, desc="render scenes", unit="scene"))

    def train(self, name: str, command: Sequence[str], log: Path, timeout: float | None) -> None:
        """Run a training command; append its output to a log. Raise OutOfTime if it is stopped after
        `timeout` seconds, UserError with its last line if it fails."""
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a", encoding="utf-8") as output:
            try:
                done = subprocess.run(
                    [sys.executable, "-m", *command], stdout=output, stderr=output, check=False,
                    timeout=timeout,
                )  # fmt: skip
            except subprocess.TimeoutExpired:
                raise OutOfTime(f"run {name} was stopped after {timeout:.0f} s") from None
        if done.returncode:
            lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            raise UserError(f"run {name} ended with {done.returncode}: {lines[-1] if lines else ''}")

    def fill_cache(
        self, row_name: str, folder: Path, teacher: Path, before_scene: Callable[[], object]
    ) -> None:
        """Fill the cache of a row's teacher scene by scene; before_scene is called before each."""
        kind = cache_kind(ROWS[row_name].method, self.plan.set_method)
        fill_teacher_cache(
            folder, kind, teacher, self.plan.preset, self.clips(), self.plan.scenes, self.machine.device,
            hide_future=ROWS[row_name].hide_future, cached_features=self.plan.cache_features,
            before_scene=before_scene,
        )  # fmt: skip

    def balance(self, row_name: str, cache: Path, teacher: Path) -> dict[str, Any]:
        """Return the balanced weights of a row's method, as `balance_row`."""
        row, settings = ROWS[row_name], row_settings(row_name, self.plan.set_method)
        return balance_row(
            self.plan, row.method, settings, teacher, cache, self.clips(), self.machine.device,
            hide_future=row.hide_future,
        )  # fmt: skip

    def cache_held_out_features(self, files: Sequence[Path]) -> None:
        """Extract the features of the held-out scenes for the backbones of weights files, so that parallel
        detections only read them."""
        clips, device = self.clips(HELD_OUT_SEED), self.machine.device
        for file in files:
            cache_features(load_model(file), clips, clips.cache.parent, self.plan.held_out, device)

    def detect(
        self, weights: Path, output: Path, pool: ProcessPoolExecutor, *, hide_future: bool = False
    ) -> None:
        """Write the detections of a weights file on the held-out scenes, in a process of the pool; with
        hide_future those of a teacher that sees no future frames."""
        pool.submit(
            _detect, weights, self.clips(HELD_OUT_SEED), self.plan.held_out, output, self.machine.device,
            self.machine.threads, self.plan.cache_features, hide_future,
        ).result()  # fmt: skip


def training_command(
    plan: Plan, machine: Machine, name: str, folder: Path, *, steps: int, seed: int,
    teacher: Path | None = None, cache: Path | None = None, balance: dict[str, float] | None = None,
) -> list[str]:  # fmt: skip
    """Return the module and arguments of a training run of a teacher, or of a student of the row `name`; with
    a teacher, its cache and the balanced weights, of a distillation."""
    settings = {
        "data.scenes": plan.scenes, "data.cache": machine.clips, "data.world": plan.world,
        "save_every": _SAVE_EVERY,
        "optim.lr": plan.lr, "optim.warmup_steps": min(200, 1 + steps // 10),
    }  # fmt: skip
    command = ["training.train"]
    if name in ROWS:
        changes_of_model = dict(change.split("=", 1) for change in plan.set_student)
        settings |= {f"model.{key}": value for key, value in changes_of_model.items()}
        settings |= {"augment.flip": 0, "augment.rotation": 0, "optim.backbone_ratio": plan.backbone_ratio}
        if plan.cache_features:
            settings |= {"data.cache_features": "true", "augment.colour": 0}
        if teacher is not None:
            changes = [
                *row_settings(name, plan.set_method),
                *(f"{k}={v}" for k, v in (balance or {}).items()),
            ]
            command = [
                "training.distill", "--teacher", str(teacher), "--method", ROWS[name].method, "--cache",
                str(cache), *(f"--set-method={change}" for change in changes),
                *(["--hide-future"] if ROWS[name].hide_future else []),
            ]  # fmt: skip
        if plan.init:
            command += ["--init", plan.init, "--init-parts", plan.init_parts]
    else:
        settings["data.hide_future"] = plan.hide_future
    return [
        *command, "--preset", plan.preset_of(name), "--out", str(folder), "--steps", str(steps),
        "--seed", str(seed), "--streams", str(plan.streams), "--accelerator", machine.accelerator,
        "--threads", str(machine.threads), *(f"--set={key}={value}" for key, value in settings.items()),
    ]  # fmt: skip


def spawn_pool(processes: int) -> ProcessPoolExecutor:
    """Return a pool of spawned processes: forked ones would inherit the locks of PyTorch's threads."""
    return ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn"))


def _render(clips: SyntheticClips, index: int) -> None:
    clips(index)


def _detect(
    weights: Path, clips: SyntheticClips, count: int, output: Path, device: torch.device, threads: int,
    cached_features: bool, hide_future: bool,
) -> None:  # fmt: skip
    if threads:
        torch.set_num_threads(threads)
    model = load_model(weights)
    inputs = cache_features(model, clips, clips.cache.parent, count, device) if cached_features else clips
    predicting.predict(model, inputs, count, output, device, hide_future=hide_future)
