# SPDX-License-Identifier: Apache-2.0
"""Run an experiment: train teachers and students, and detect with all of them. Parts that are done are
skipped, so an experiment that was stopped resumes."""

from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ftkd_core.errors import UserError
from training.study.deadline import Deadline, OutOfTime
from training.study.json_files import read_json, write_json
from training.study.matrix import BLIND, OFFLINE, ROWS, method_of, teachers_of
from training.study.model_files import model_preset, trained_steps
from training.study.plan import Plan
from training.study.provenance import made_with
from training.study.teacher_caches import cache_kind
from training.study.work import Work, spawn_pool, training_command


class Runner:
    """Runs the rows of an experiment in a folder. Raises OutOfTime when the deadline passes."""

    def __init__(self, out: Path, plan: Plan, rows: Sequence[str], work: Work, deadline: Deadline) -> None:
        self.out, self.plan, self.rows, self.work, self.deadline = out, plan, list(rows), work, deadline

    def run(self) -> None:
        """Train the teacher, fill its caches, balance the methods, then train all students; detect with each
        model, and with the teacher without its future if a row hides it."""
        teachers = teachers_of(self.rows)
        weights_of_teacher = self.train_teacher() if teachers else None
        if weights_of_teacher is not None:
            for row_name in self.rows:
                self._prepare_row(row_name, weights_of_teacher)
        if self.plan.cache_features:
            files = [] if weights_of_teacher is None else [weights_of_teacher]
            self.work.cache_held_out_features([Path(self.plan.init), *files])
        runs = [(row, seed) for seed in range(self.plan.seeds) for row in self.rows]
        parallel = self.work.machine.parallel
        with (
            ThreadPoolExecutor(parallel) as pool,
            spawn_pool(parallel) as detectors,
            tqdm(total=len(runs), unit="run") as bar,
        ):

            def train_and_detect(row_name: str, seed: int) -> None:
                weights = self.train_student(row_name, seed, weights_of_teacher)
                self.detect(f"{row_name}-{seed}", weights, detectors)
                bar.update()

            futures = [pool.submit(train_and_detect, *run) for run in runs]
            for name in teachers:
                futures.append(pool.submit(self.detect, f"{name}-0", self.weights(name), detectors))
            _wait(futures)

    def train_teacher(self) -> Path:
        """Return the weights of the teacher: given, or trained if necessary."""
        given = self.plan.teacher
        return Path(given) if given else self._train(OFFLINE, steps=self.plan.teacher_steps, seed=0)

    def _prepare_row(self, row_name: str, teacher: Path) -> None:
        """Fill the cache of a row's teacher and balance its method, if it has one."""
        if ROWS[row_name].method:
            cache = self.cache_folder(row_name)
            self.work.fill_cache(row_name, cache, teacher, self.deadline.remaining)
            self.balance(row_name, teacher)

    def train_student(self, row_name: str, seed: int, teacher: Path | None) -> Path:
        """Return the weights of a student run, trained if necessary."""
        row, distillation = ROWS[row_name], {}
        if row.method:
            assert teacher is not None
            distillation = {
                "teacher": teacher,
                "cache": self.cache_folder(row_name),
                "balance": self.balance(row_name, teacher),
            }
        steps = self.plan.steps * row.step_factor
        return self._train(f"{row_name}-{seed}", steps=steps, seed=seed, **distillation)

    def _train(self, name: str, *, steps: int, seed: int, **distillation: Any) -> Path:
        weights = self.weights(name)
        if trained_steps(weights) < steps:
            timeout = self.deadline.remaining()
            command = training_command(
                self.plan, self.work.machine, method_of(name), weights.parent, steps=steps, seed=seed,
                **distillation,
            )  # fmt: skip
            self.work.train(name, command, weights.parent / "log.txt", timeout)
        return weights

    def cache_folder(self, row_name: str) -> Path:
        """Return the folder of the teacher outputs that a row reads."""
        kind = cache_kind(ROWS[row_name].method, self.plan.set_method)
        return self.out / f"cache_{ROWS[row_name].teacher}_{kind}"

    def balance(self, row_name: str, teacher: Path) -> dict[str, float]:
        """Return the balanced weights of a row's method; measured once and stored in `balance.json`."""
        path = self.out / "balance.json"
        found = read_json(path, "delete it to balance again") if path.exists() else {}
        if not isinstance(found, dict):
            raise UserError(f"{str(path)!r} does not hold the balance of rows; delete it to balance again")
        if row_name not in found:
            self.deadline.remaining()
            found[row_name] = self.work.balance(row_name, self.cache_folder(row_name), teacher)
            write_json(path, found)
        try:
            settings: dict[str, float] = dict(found[row_name]["settings"])
        except (KeyError, TypeError, ValueError):
            raise UserError(
                f"{str(path)!r} has no settings for row {row_name}; delete it to balance again"
            ) from None
        return settings

    def detect(self, name: str, weights: Path, detectors: ProcessPoolExecutor) -> None:
        """Write a run's detections if they are missing or outdated."""
        if self.is_detected(name):
            return
        self.deadline.remaining()
        notes_file = self.notes_file(name)
        hidden = method_of(name) == BLIND
        self.work.detect(weights, notes_file.with_suffix(".npz"), detectors, hide_future=hidden)
        notes = {"preset": model_preset(weights), "steps": trained_steps(weights)}
        write_json(notes_file, notes | made_with(self.work.machine.device))

    def weights(self, name: str) -> Path:
        """Return the path of a run's weights, of a teacher or a student."""
        method = method_of(name)
        if method not in (OFFLINE, BLIND):
            return self.out / "runs" / name / "weights.safetensors"
        return Path(self.plan.teacher or self.out / "runs" / OFFLINE / "weights.safetensors")

    def notes_file(self, name: str) -> Path:
        """Return the path of the notes on a run's detections. They are written last: a run that was killed
        before detects again."""
        return self.out / "predictions" / f"{name}.json"

    def is_detected(self, name: str) -> bool:
        """Return whether a run's detections exist and are newer than its weights."""
        notes, weights = self.notes_file(name), self.weights(name)
        if not notes.exists() or not weights.exists():
            return False
        return notes.stat().st_mtime >= weights.stat().st_mtime

    def count_runs(self) -> tuple[int, int]:
        """Return the number of runs without detections and of all runs, teachers included."""
        names = [f"{name}-0" for name in teachers_of(self.rows)]
        names += [f"{row}-{seed}" for row in self.rows for seed in range(self.plan.seeds)]
        return sum(not self.is_detected(name) for name in names), len(names)


def _wait(futures: Sequence[Future[None]]) -> None:
    """Wait for all futures, then raise their first error; OutOfTime only if there is no other error."""
    errors = [error for error in (future.exception() for future in futures) if error is not None]
    for error in sorted(errors, key=lambda error: isinstance(error, OutOfTime)):
        raise error
