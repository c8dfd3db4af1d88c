# SPDX-License-Identifier: Apache-2.0
"""The distillation experiment: teachers, students with and without them, official scores, one table.

    python -m training.experiments --minutes 25 --out runs/matrix
    python -m training.experiments --out runs/matrix --phase score
    python -m training.experiments --table benchmarks/results/ftkd_matrix.json

Trains an offline teacher, which sees the future, and one that sees only the past; stores their answers;
brings every part of every method to the same share of the detection loss; trains each row of the table with
each seed, all for the same number of steps; detects on held-out scenes; scores with the nuScenes devkit. Stop
it at any time: the same command goes on with what is missing. `--minutes` fixes the numbers of steps when the
run begins. Without the devkit (`--phase train`), the detections are kept, and `--phase score` scores them on
another machine. All students see the world as it is, not mirrored or turned, for the cached answers are about
that world.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ftkd_core.data.synthetic_clips import SyntheticClips
from ftkd_core.errors import UserError
from ftkd_core.presets import preset, sparse_bev_preset
from training import stages
from training.matrix import (
    OFFLINE,
    PAST,
    ROWS,
    SCORES,
    check_settings,
    choose_rows,
    chosen_settings,
    read_matrix,
    subset_table,
    table,
)


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


def make_parser() -> argparse.ArgumentParser:
    """Command line of `python -m training.experiments`."""
    parser = argparse.ArgumentParser(
        prog="python -m training.experiments",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--table", type=Path, metavar="FILE", help="print a matrix file as Markdown, and nothing else")
    add("--out", type=Path, help="folder of the experiment; gone on with if it holds one")
    add("--minutes", type=float, default=25.0, help="time for everything but scoring (default 25)")
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
        self.arguments, self.out = arguments, Path(arguments.out)
        self.rows = choose_rows(arguments.rows)
        self.began = time.monotonic()
        self.device = torch.device(
            "cuda" if arguments.accelerator != "cpu" and torch.cuda.is_available() else "cpu"
        )
        self.out.mkdir(parents=True, exist_ok=True)

    def clips(self, first_seed: int) -> SyntheticClips:
        """Scenes of consecutive seeds at the student's resolution."""
        image = preset(self.arguments.preset).image
        return SyntheticClips(first_seed, image, self.arguments.clips, version=self.arguments.clips_version)

    def make_plan(self) -> Plan:
        """The plan of the folder, or a new one; UserError where the command would train another. Scoring
        takes the plan as it is."""
        a = self.arguments
        asked = Plan(
            preset=a.preset, teacher_preset=a.teacher_preset, past_preset=a.past_preset, seeds=a.seeds,
            scenes=a.scenes, held_out=a.held_out, streams=a.streams, steps=a.steps,
            teacher_steps=a.teacher_steps, share=a.share, lr=a.lr, init=_text(a.init),
            init_parts=a.init_parts, backbone_ratio=a.backbone_ratio,
            teacher=_text(a.teacher), past_teacher=_text(a.past_teacher), keep_features=a.keep_features,
            set_method=tuple(a.set_method),
        )  # fmt: skip
        path = self.out / "plan.json"
        if path.exists():
            found = Plan(**json.loads(path.read_text()))
            found = replace(found, set_method=tuple(found.set_method))  # a list, in JSON
            if a.phase == "score":
                return found
            found = replace(found, seeds=a.seeds)  # more may be run later
            for name in asdict(asked):
                mine, yours = getattr(asked, name), getattr(found, name)
                if mine != yours and not (name.endswith("steps") and mine == 0):
                    raise UserError(
                        f"{str(path)!r} has {name} {yours!r}, the command {mine!r}; give another --out"
                    )
            return found
        if a.phase == "score":
            raise UserError(
                f"{str(self.out)!r} holds no experiment; name the folder that --phase train wrote"
            )
        self.render(asked)
        plan = self.fix_steps(asked)
        path.write_text(json.dumps(asdict(plan), indent=1) + "\n")
        return plan

    def render(self, plan: Plan) -> None:
        """All scenes, on all cores."""
        stages.render(self.clips(0), plan.scenes)
        stages.render(self.clips(stages.HELD_OUT_SEED), plan.held_out)

    def fix_steps(self, plan: Plan) -> Plan:
        """Numbers of steps that fit into the time that is left: a third for the teachers, if they are
        trained, and a tenth for everything beside training."""
        left = 60 * self.arguments.minutes - (time.monotonic() - self.began)
        both = ((plan.teacher_preset, plan.teacher, False), (plan.past_preset, plan.past_teacher, True))
        trained = [name for name, given, past in both if self.needs(past) and not given]
        for_teachers = left / 3 if trained else 0.0
        if trained and not plan.teacher_steps:
            step = sum(self.seconds_per_step(name) for name in trained)
            plan = replace(plan, teacher_steps=max(1, int(for_teachers / step)))
        if not plan.steps:
            units = plan.seeds * sum(ROWS[row].longer for row in self.rows)
            for_students = 0.9 * left - for_teachers
            step = self.seconds_per_step(plan.preset) * (1.0 if self.arguments.parallel == 1 else 0.6)
            plan = replace(plan, steps=max(1, int(for_students / (units * step))))
        return plan

    def needs(self, past: bool) -> bool:
        """Whether a row learns from the past-only teacher, or from the offline one."""
        return any(ROWS[row].method and (ROWS[row].teacher == PAST) == past for row in self.rows)

    def seconds_per_step(self, name: str) -> float:
        """Of a training step of that preset on this machine."""
        a = self.arguments
        return stages.seconds_per_step(name, a.streams, self.clips(0), a.scenes, self.device)

    def train_teacher(self, plan: Plan, past: bool) -> Path:
        """Weights of a teacher: given, trained before, or trained now."""
        given = plan.past_teacher if past else plan.teacher
        if given:
            return Path(given)
        name = PAST if past else OFFLINE
        command = ["training.train", "--preset", plan.past_preset if past else plan.teacher_preset]
        return self.run(plan, name, command, plan.teacher_steps, 0)

    def train_student(self, plan: Plan, row_name: str, seed: int, teachers: dict[str, Path]) -> Path:
        """Weights of one run of the table."""
        row = ROWS[row_name]
        command = ["training.train"]
        if row.method:
            settings = self.balance(plan, row_name, teachers[row.teacher])
            cache = self.cache(row_name)
            command = [
                "training.distill", "--teacher", str(teachers[row.teacher]), "--method", row.method,
                "--cache", str(cache),
                *(f"--set-method={text}" for text in chosen_settings(row_name, plan.set_method)),
                *(f"--set-method={k}={v}" for k, v in settings.items()),
            ]  # fmt: skip
        command += ["--preset", plan.preset]
        if plan.init:
            command += ["--init", plan.init, "--init-parts", plan.init_parts]
        command += ["--set", "augment.flip=0", "--set", "augment.rotation=0"]
        command += ["--set", f"optim.backbone_ratio={plan.backbone_ratio}"]
        if plan.keep_features:
            command += ["--set", "data.keep_features=true", "--set", "augment.colour=0"]
        return self.run(plan, f"{row_name}-{seed}", command, plan.steps * row.longer, seed)

    def cache(self, row_name: str) -> Path:
        """The folder of the teacher's answers that a row reads."""
        row = ROWS[row_name]
        return self.out / f"answers_{row.teacher}_{stages.cache_of(row.method)}"

    def balance(self, plan: Plan, row_name: str, teacher: Path) -> dict[str, float]:
        """The settings that balance a row's method, measured once and kept."""
        path = self.out / "balance.json"
        found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        if row_name not in found:
            row = ROWS[row_name]
            found[row_name] = stages.balance_method(
                row.method, teacher, plan.preset, (plan.init, plan.init_parts), self.clips(0), plan.scenes,
                cache=self.cache(row_name), streams=plan.streams, share=plan.share, device=self.device,
                keep=plan.keep_features, settings=chosen_settings(row_name, plan.set_method),
            )  # fmt: skip
            path.write_text(json.dumps(found, indent=1) + "\n")
        settings: dict[str, float] = found[row_name]["settings"]
        return settings

    def run(self, plan: Plan, name: str, command: list[str], steps: int, seed: int) -> Path:
        """A training process, unless its weights are there; its words go to a log beside them."""
        folder = self.out / "runs" / name
        weights = folder / "weights.safetensors"
        if stages.steps_of(weights) == steps:
            return weights
        a = self.arguments
        folder.mkdir(parents=True, exist_ok=True)
        command = [
            sys.executable, "-m", *command, "--out", str(folder), "--steps", str(steps), "--seed", str(seed),
            "--streams", str(plan.streams), "--accelerator", a.accelerator, "--threads", str(a.threads),
            "--set", f"data.scenes={plan.scenes}", "--set", f"data.cache={a.clips}",
            "--set", f"optim.lr={plan.lr}", "--set", f"optim.warmup_steps={min(200, 1 + steps // 10)}",
            *(["--set", f"data.version={a.clips_version}"] if a.clips_version else []),
        ]  # fmt: skip
        with (folder / "log.txt").open("a", encoding="utf-8") as log:
            done = subprocess.run(command, stdout=log, stderr=log, check=False)
        if done.returncode:
            last = (folder / "log.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()
            raise UserError(f"run {name} ended with {done.returncode}: {last[-1] if last else ''}")
        return weights

    def train(self, plan: Plan) -> None:
        """Teachers, their answers, students, and the detections of all of them."""
        teachers = {
            name: self.train_teacher(plan, name == PAST)
            for name in (OFFLINE, PAST)
            if self.needs(name == PAST)
        }
        for row_name in self.rows:
            row = ROWS[row_name]
            if row.method:
                stages.fill(
                    self.cache(row_name), row.method, teachers[row.teacher], plan.preset, self.clips(0),
                    plan.scenes, self.device, keep=plan.keep_features,
                )  # fmt: skip
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
            for future in work:
                future.result()

    def detect(self, plan: Plan, name: str, weights: Path, detectors: Executor) -> None:
        """The detections of a run, unless they are there and of these weights; made in one of `detectors`."""
        output = self.out / "predictions" / f"{name}.npz"
        noted = output.with_suffix(".json")  # written last: a run that was killed before detects again
        if not noted.exists() or noted.stat().st_mtime < weights.stat().st_mtime:
            clips = self.clips(stages.HELD_OUT_SEED)
            work = partial(stages.detect, keep=plan.keep_features)
            detectors.submit(
                work, weights, clips, plan.held_out, output, self.device, self.arguments.threads
            ).result()
            notes = {"steps": stages.steps_of(weights), **_machine(self.device)}
            noted.write_text(json.dumps(notes, indent=1) + "\n")

    def score(self, plan: Plan) -> Path:
        """matrix.json with an entry a run whose detections are there: first the scores of all of them, then
        those of part of the objects at a time, which take several times as long."""
        stages.write_held_out(self.out / "held_out", plan.held_out)
        path = self.out / "matrix.json"
        entries = {(e["method"], e["seed"]): e for e in (read_matrix(path) if path.exists() else [])}
        noted = sorted((self.out / "predictions").glob("*.json"))
        runs = {_run_of(file): file.with_suffix(".npz") for file in noted}
        if not runs:
            raise UserError(f"no detections in {str(self.out / 'predictions')!r}; train first")
        for subsets in (False, True) if self.arguments.subsets else (False,):
            missing = {
                run: file
                for run, file in runs.items()
                if run not in entries or (subsets and "subsets" not in entries[run])
            }
            scores = stages.score(list(missing.values()), self.out / "held_out", subsets=subsets)
            words = "score parts" if subsets else "score"
            for (run, file), found in tqdm(
                zip(missing.items(), scores, strict=True), words, len(missing), unit="run"
            ):
                if subsets:
                    entries[run]["subsets"] = found
                else:
                    entries[run] = _entry(run, found, plan, file)
                path.write_text(json.dumps(list(entries.values()), indent=1) + "\n")
        return path


def _entry(run: tuple[str, int], summary: dict[str, Any], plan: Plan, predictions: Path) -> dict[str, Any]:
    """A run's entry in the matrix."""
    entry: dict[str, Any] = {"method": run[0], "seed": run[1]}
    entry |= {name: summary[name] for name in SCORES}
    entry |= {"preset": plan.preset, **json.loads(predictions.with_suffix(".json").read_text())}
    return entry | {"samples": summary["samples"]}


def _run_of(predictions: Path) -> tuple[str, int]:
    method, _, seed = predictions.stem.rpartition("-")
    return method, int(seed)


def _machine(device: torch.device) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {os.cpu_count()} cores"
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "device": name, "commit": commit or "unknown", "torch": torch.__version__,
        "python": platform.python_version(), "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip


def _text(path: Path | None) -> str:
    return "" if path is None else str(path)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; bad input is one sentence and exit code 2."""
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
            experiment.train(plan)
        if arguments.phase in ("all", "score"):
            path = experiment.score(plan)
            print(table(read_matrix(path)))
            print(f"wrote {path}")
    except UserError as error:
        print(f"experiments: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
