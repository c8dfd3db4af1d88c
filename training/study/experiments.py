# SPDX-License-Identifier: Apache-2.0
"""The distillation experiment: teachers, students with and without them, official scores, one table.

    python -m training.study.experiments --minutes 25 --out runs/matrix
    python -m training.study.experiments --out runs/matrix --phase score
    python -m training.study.experiments --table benchmarks/results/ftkd_matrix.json

Trains an offline teacher, which sees the future, and one that sees only the past; stores their answers;
brings every part of every method to the same share of the detection loss; trains each row of the table with
each seed, all for the same number of steps; detects on held-out scenes; scores with the nuScenes devkit. Stop
it at any time: the same command goes on with what is missing. Without the devkit (`--phase train`), the
detections are kept, and `--phase score` scores them on another machine. All students see the world as it is,
not mirrored or turned, for the cached answers are about that world.

A new experiment gets the numbers of steps that fit into --minutes, as measured on this machine. Where
--minutes is given, each call also stops in time: it begins no run, no balancing and no scene of a teacher's
answers that would end later, says how many runs are left, and ends with exit code 3, without scoring. The
same command goes on, with as much time again. (Rendering, and extracting kept features, are not interrupted.)
Exit codes: 0 all is done, 2 bad input, 3 the time is over.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ftkd_core.data.synthetic_clips import SyntheticClips
from ftkd_core.errors import UserError
from ftkd_core.presets import preset, sparse_bev_preset
from training.study import stages
from training.study.balance import BATCHES
from training.study.matrix import (
    OFFLINE,
    PAST,
    ROWS,
    check_settings,
    choose_rows,
    chosen_settings,
    method_of,
    read_matrix,
    subset_table,
    table,
    teachers_of,
)
from training.study.planning import (
    DEFAULT_MINUTES,
    Clock,
    OutOfTime,
    Plan,
    asked_plan,
    choose_steps,
    go_on,
    read_plan,
)
from training.study.provenance import made_with
from training.study.timing import Costs, needs_of


def make_parser() -> argparse.ArgumentParser:
    """Command line of `python -m training.study.experiments`."""
    parser = argparse.ArgumentParser(
        prog="python -m training.study.experiments",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--table", type=Path, metavar="FILE", help="print a matrix file as Markdown, and nothing else")
    add("--out", type=Path, help="folder of the experiment; gone on with if it holds one")
    add(
        "--minutes",
        type=float,
        help="for everything but scoring: the numbers of steps are chosen for it (default 25), and a call "
        "that is given it stops in time, with exit code 3 where runs are left",
    )
    add("--phase", choices=("all", "train", "score"), default="all", help="train, score, or both (default)")
    add(
        "--subsets",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="score also by visibility, distance and time in view (default; takes several times as long)",
    )
    add("--preset", default="r18_352x128", help="streaming student (default r18_352x128)")
    add("--teacher-preset", default="sparse_bev_r18_352x128_offline", help="the teacher with a future")
    add("--past-preset", default="sparse_bev_r18_352x128", help="the teacher without")
    add("--rows", default="", help=f"comma-separated rows (default all: {','.join(ROWS)})")
    add("--seeds", type=int, default=3, help="runs of each row (default 3)")
    add("--scenes", type=int, default=200, help="training scenes, seeds from 0 (default 200)")
    add("--held-out", type=int, default=40, help="held-out scenes, seeds from 900000 (default 40)")
    add("--streams", type=int, default=4, help="batch size (default 4)")
    add("--steps", type=int, default=0, help="steps of every student (default: what --minutes allows)")
    add("--teacher-steps", type=int, default=0, help="steps of each teacher (default: likewise)")
    add("--share", type=float, default=0.1, help="of each part in the detection loss at start (default 0.1)")
    add(
        "--set-method",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a setting of FTKD, in all its rows (FTKDConfig; weights are balanced after)",
    )
    add("--lr", type=float, default=4e-4, help="highest learning rate (default 4e-4)")
    add("--init", type=Path, help="weights all students start from (default: random, by seed)")
    add("--init-parts", default="", help="parts of it to take, e.g. backbone,neck,auxiliary (default all)")
    add("--backbone-ratio", type=float, default=1.0, help="students' backbones learn at this share of --lr")
    add("--teacher", type=Path, help="weights of the offline teacher, instead of training one")
    add("--past-teacher", type=Path, help="weights of the past-only teacher, instead of training one")
    add(
        "--keep-features",
        action="store_true",
        help="read features of the frozen backbone of --init from disk; needs --backbone-ratio 0",
    )
    add("--parallel", type=int, default=1, help="student runs side by side (default 1)")
    add("--threads", type=int, default=0, help="CPU threads of each run (0: PyTorch's choice)")
    add("--accelerator", default="auto", help="auto, cpu or cuda")
    add("--clips", type=Path, default=Path("build/clips"), help="where rendered scenes are kept")
    add("--clips-version", default="", help="of the world they were rendered in (default: this one)")
    return parser


class Experiment:
    """The stages of one experiment folder; each does only what is missing."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        preset(arguments.preset)  # errors before any work
        sparse_bev_preset(arguments.teacher_preset), sparse_bev_preset(arguments.past_preset)
        if arguments.keep_features and (arguments.init is None or arguments.backbone_ratio):
            raise UserError("--keep-features needs a backbone that stays: give --init and --backbone-ratio 0")
        check_settings(arguments.set_method)
        if arguments.phase != "train":
            stages.require_devkit()
        self.arguments, self.out = arguments, Path(arguments.out)
        self.rows = choose_rows(arguments.rows)
        self.clock = Clock(arguments.minutes)
        self.device = torch.device(
            "cuda" if arguments.accelerator != "cpu" and torch.cuda.is_available() else "cpu"
        )
        self.out.mkdir(parents=True, exist_ok=True)
        self.costs = Costs(  # which do not depend on what a plan that is found may have otherwise
            asked_plan(arguments), self.clips(0), self.device, self.out / "costs.json",
            threads=arguments.threads, parallel=arguments.parallel,
        )  # fmt: skip

    def clips(self, first_seed: int) -> SyntheticClips:
        """Scenes of consecutive seeds at the student's resolution."""
        image = preset(self.arguments.preset).image
        return SyntheticClips(first_seed, image, self.arguments.clips, version=self.arguments.clips_version)

    def make_plan(self) -> Plan:
        """The plan of the folder, or a new one; UserError where the command would train another. Scoring
        takes the plan as it is."""
        path, scoring = self.out / "plan.json", self.arguments.phase == "score"
        if path.exists():
            return read_plan(path) if scoring else go_on(path, asked_plan(self.arguments))
        if scoring:
            raise UserError(
                f"{str(self.out)!r} holds no experiment; name the folder that --phase train wrote"
            )
        asked = asked_plan(self.arguments)
        self.render(asked)
        plan = self.fix_steps(asked)
        path.write_text(json.dumps(asdict(plan), indent=1) + "\n")
        self.clock.moved = True  # the next call need not render
        return plan

    def render(self, plan: Plan) -> None:
        """All scenes, on all cores."""
        stages.render(self.clips(0), plan.scenes)
        stages.render(self.clips(stages.HELD_OUT_SEED), plan.held_out)

    def fix_steps(self, plan: Plan) -> Plan:
        """The plan with the numbers of steps that fit into the time that is left."""
        trained = [name for name in teachers_of(self.rows) if not plan.given(name)]
        if plan.steps and (plan.teacher_steps or not trained):
            return plan
        minutes = DEFAULT_MINUTES if self.arguments.minutes is None else self.arguments.minutes
        needs = needs_of(plan, self.rows, self.costs)
        return choose_steps(plan, needs, minutes, self.clock.spent())

    def train_teacher(self, plan: Plan, name: str) -> Path:
        """Weights of a teacher: given, trained before, or trained now."""
        if plan.given(name):
            return Path(plan.given(name))
        return self.run(plan, name, ["training.train"], plan.teacher_steps, 0)

    def train_student(self, plan: Plan, row_name: str, seed: int, teachers: dict[str, Path]) -> Path:
        """Weights of one run of the table."""
        row = ROWS[row_name]
        command = ["training.train"]
        if row.method:
            settings = self.balance(plan, row_name, teachers[row.teacher])
            command = [
                "training.distill", "--teacher", str(teachers[row.teacher]), "--method", row.method,
                "--cache", str(self.cache(plan, row_name)[1]),
                *(f"--set-method={text}" for text in chosen_settings(row_name, plan.set_method)),
                *(f"--set-method={k}={v}" for k, v in settings.items()),
            ]  # fmt: skip
        if plan.init:
            command += ["--init", plan.init, "--init-parts", plan.init_parts]
        command += ["--set", "augment.flip=0", "--set", "augment.rotation=0"]
        command += ["--set", f"optim.backbone_ratio={plan.backbone_ratio}"]
        if plan.keep_features:
            command += ["--set", "data.cache_features=true", "--set", "augment.colour=0"]
        return self.run(plan, f"{row_name}-{seed}", command, plan.steps * row.longer, seed)

    def cache(self, plan: Plan, row_name: str) -> tuple[str, Path]:
        """What kind of a teacher's answers a row reads, and their folder."""
        kind = stages.cache_of(ROWS[row_name].method, plan.set_method)
        return kind, self.out / f"answers_{ROWS[row_name].teacher}_{kind}"

    def fill(self, plan: Plan, row_name: str, teacher: Path) -> None:
        """The answers of a row's teacher, scene by scene while there is time."""
        of, (kind, folder) = ROWS[row_name].teacher, self.cache(plan, row_name)

        def ready() -> None:
            self.clock.need("a scene of the teacher's answers", lambda: self.costs.answers(of, kind))

        stages.fill(
            folder, kind, teacher, plan.preset, self.clips(0), plan.scenes, self.device,
            keep=plan.keep_features, ready=ready,
        )  # fmt: skip

    def balance(self, plan: Plan, row_name: str, teacher: Path) -> dict[str, float]:
        """The settings that balance a row's method, measured once and kept."""
        path = self.out / "balance.json"
        found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        if row_name not in found:
            row = ROWS[row_name]
            self.clock.need(f"balancing {row_name}", lambda: BATCHES * self.costs.step(row_name))
            found[row_name] = stages.balance_method(
                row.method, teacher, plan.preset, (plan.init, plan.init_parts), self.clips(0), plan.scenes,
                cache=self.cache(plan, row_name)[1], streams=plan.streams, share=plan.share,
                device=self.device, keep=plan.keep_features, frozen_backbone=plan.backbone_ratio == 0,
                settings=chosen_settings(row_name, plan.set_method),
            )  # fmt: skip
            path.write_text(json.dumps(found, indent=1) + "\n")
        settings: dict[str, float] = found[row_name]["settings"]
        return settings

    def run(self, plan: Plan, name: str, command: list[str], steps: int, seed: int) -> Path:
        """A training process, unless its weights are there; its words go to a log beside them. OutOfTime
        where it would not end in time, a student's with its detections."""
        weights = self.weights(plan, name)
        folder, method, left = weights.parent, method_of(name), steps - stages.steps_of(weights)
        if left == 0:
            return weights
        self.clock.need(f"run {name}", lambda: self.costs.run(method, left))
        a = self.arguments
        folder.mkdir(parents=True, exist_ok=True)
        command = [
            sys.executable, "-m", *command, "--preset", plan.preset_of(method), "--out", str(folder),
            "--steps", str(steps), "--seed", str(seed),
            "--streams", str(plan.streams), "--accelerator", a.accelerator, "--threads", str(a.threads),
            "--set", f"data.scenes={plan.scenes}", "--set", f"data.cache={a.clips}",
            "--set", f"optim.lr={plan.lr}", "--set", f"optim.warmup_steps={min(200, 1 + steps // 10)}",
            *(["--set", f"data.version={a.clips_version}"] if a.clips_version else []),
        ]  # fmt: skip
        began = time.monotonic()
        with (folder / "log.txt").open("a", encoding="utf-8") as log:
            done = subprocess.run(command, stdout=log, stderr=log, check=False)
        if done.returncode:
            last = (folder / "log.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()
            raise UserError(f"run {name} ended with {done.returncode}: {last[-1] if last else ''}")
        if self.clock.minutes is not None:
            self.costs.learn(method, left, time.monotonic() - began)
        return weights

    def weights(self, plan: Plan, name: str) -> Path:
        """Where the weights of a run, a teacher's or a student's, are or will be."""
        method = method_of(name)
        if method not in (OFFLINE, PAST):
            return self.out / "runs" / name / "weights.safetensors"
        return Path(plan.given(method) or self.out / "runs" / method / "weights.safetensors")

    def train(self, plan: Plan) -> None:
        """Teachers, their answers, students, and the detections of all of them."""
        teachers = {name: self.train_teacher(plan, name) for name in teachers_of(self.rows)}
        for row_name in self.rows:
            row = ROWS[row_name]
            if row.method:
                self.fill(plan, row_name, teachers[row.teacher])
                self.balance(plan, row_name, teachers[row.teacher])
        if plan.keep_features:
            files = [Path(plan.init), *teachers.values()]
            stages.keep_held_out(files, self.clips(stages.HELD_OUT_SEED), plan.held_out, self.device)
        runs = [(row, seed) for seed in range(plan.seeds) for row in self.rows]
        parallel = self.arguments.parallel
        with (
            ThreadPoolExecutor(parallel) as pool,
            stages.processes(parallel) as detectors,
            tqdm(total=len(runs), unit="run") as bar,
        ):

            def one(run: tuple[str, int]) -> None:
                weights = self.train_student(plan, *run, teachers)
                self.detect(plan, f"{run[0]}-{run[1]}", weights, detectors)
                bar.update()

            work = [pool.submit(one, run) for run in runs]
            for name, weights in teachers.items():
                work.append(pool.submit(self.detect, plan, f"{name}-0", weights, detectors))
            _wait(work)

    def stop(self, plan: Plan, reason: OutOfTime) -> str:
        """What is said where the time is over; UserError where it will not do for anything that is left."""
        if not self.clock.moved:
            raise UserError(f"{reason}, and nothing else could begin; give more --minutes, or none")
        left, all_runs = self.left(plan)
        return f"{reason}. {left} of {all_runs} runs are left; the same command goes on"

    def left(self, plan: Plan) -> tuple[int, int]:
        """How many runs, teachers' and students', lack detections, and how many there are."""
        names = [f"{name}-0" for name in teachers_of(self.rows)]
        names += [f"{row}-{seed}" for row in self.rows for seed in range(plan.seeds)]
        done = [self.is_detected(name, self.weights(plan, name)) for name in names]
        return done.count(False), len(names)

    def is_detected(self, name: str, weights: Path) -> bool:
        """Whether the detections of these weights are there."""
        noted = self.noted(name)
        both = noted.exists() and weights.exists()
        return both and noted.stat().st_mtime >= weights.stat().st_mtime

    def noted(self, name: str) -> Path:
        """The notes beside the detections of a run; written last: a run that was killed before detects
        again."""
        return self.out / "predictions" / f"{name}.json"

    def detect(self, plan: Plan, name: str, weights: Path, detectors: Executor) -> None:
        """The detections of a run, unless they are there and of these weights; made in one of `detectors`.
        OutOfTime where they would not end in time."""
        if self.is_detected(name, weights):
            return
        self.clock.need(f"detection of {name}", lambda: self.costs.held_out(method_of(name)))
        noted, clips = self.noted(name), self.clips(stages.HELD_OUT_SEED)
        work = partial(stages.detect, keep=plan.keep_features)
        detectors.submit(
            work, weights, clips, plan.held_out, noted.with_suffix(".npz"), self.device,
            self.arguments.threads,
        ).result()  # fmt: skip
        notes = {"preset": stages.preset_of(weights), "steps": stages.steps_of(weights)}
        noted.write_text(json.dumps(notes | made_with(self.device), indent=1) + "\n")


def _wait(work: Sequence[Future[None]]) -> None:
    """For all to end. What went wrong comes before OutOfTime, after which those that still fit went on."""
    problems = [error for error in (future.exception() for future in work) if error is not None]
    for error in sorted(problems, key=lambda error: isinstance(error, OutOfTime)):
        raise error


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; bad input is one sentence and exit code 2, an end of the time one and 3."""
    arguments = make_parser().parse_args(argv)
    try:
        if arguments.table is not None:
            entries = read_matrix(arguments.table)
            parts = [table(entries), *(subset_table(entries, score) for score in ("AP", "AVE"))]
            print("\n\n".join(part for part in parts if part))
            return 0
        if arguments.out is None:
            raise UserError("no folder; name one with --out, or a matrix to print with --table")
        experiment = Experiment(arguments)
        plan = experiment.make_plan()
        if arguments.phase in ("all", "train"):
            try:
                experiment.train(plan)
            except OutOfTime as reason:
                print(experiment.stop(plan, reason))
                return 3
        if arguments.phase in ("all", "score"):
            path = stages.score_runs(experiment.out, plan, subsets=arguments.subsets)
            print(table(read_matrix(path)))
            print(f"wrote {path}")
    except UserError as error:
        print(f"experiments: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
