# SPDX-License-Identifier: Apache-2.0
"""The distillation experiment: teachers, students with and without distillation, official scores, one table.

    python -m training.study.experiments --out runs/matrix --teacher-steps 10000 --steps 5000
    python -m training.study.experiments --out runs/matrix --phase score
    python -m training.study.experiments --table runs/matrix/matrix.json

Trains one teacher, whose future frames are hidden in a share of its windows; caches its outputs with and
without the future (`ftkd_blind`); scales every part of every method to the same share of the detection loss;
trains each row of the table with each seed, all for --steps steps (`none_long`: twice as many); detects on
held-out scenes; scores with the nuScenes devkit. Runs of the same seed are paired: they share initial weights
and data order. Students see the scenes unmirrored and unrotated, because the cached outputs belong to those
scenes.

The experiment can be stopped at any time: the same command resumes it. With --minutes, the call stops itself:
training processes are killed at that time and resume from their last checkpoint (at most 100 steps earlier),
and no other part is started. `--phase train` works without the devkit; `--phase score` can score on another
machine.
Exit codes: 0 done, 2 bad input, 3 stopped by --minutes.
"""

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from ftkd_core.config import override
from ftkd_core.errors import UserError
from ftkd_core.presets import preset, sparse_bev_preset
from training.config import DataConfig
from training.study.deadline import Deadline, OutOfTime
from training.study.json_files import write_json
from training.study.matrix import (
    ROWS,
    check_settings,
    choose_rows,
    read_matrix,
    subset_table,
    table,
    teachers_of,
)
from training.study.plan import Plan, check_steps, load_plan, resume_plan
from training.study.runner import Runner
from training.study.work import Machine, Work


def make_parser() -> argparse.ArgumentParser:
    """Return the command-line parser."""
    parser = argparse.ArgumentParser(
        prog="python -m training.study.experiments",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--table", type=Path, metavar="FILE", help="only print a matrix file as Markdown")
    add("--out", type=Path, help="folder of the experiment; resumed if it holds one")
    add("--minutes", type=float, help="stop training after this time, with exit code 3 (default: no limit)")
    add("--phase", choices=("all", "train", "score"), default="all", help="train, score, or both (default)")
    add(
        "--subsets", action=argparse.BooleanOptionalAction, default=True,
        help="also score by visibility, distance and time in view (default; takes several times as long)",
    )  # fmt: skip
    add("--rows", default="", help=f"comma-separated rows (default all: {','.join(ROWS)})")
    _add_plan_options(parser.add_argument_group("plan", "settings that all calls of an experiment share"))
    machine = parser.add_argument_group("machine")
    add = machine.add_argument
    add("--parallel", type=int, default=1, help="student runs at the same time (default 1)")
    add("--threads", type=int, default=0, help="CPU threads of each run (0: PyTorch's choice)")
    add("--accelerator", default="auto", help="auto, cpu or cuda")
    add("--clips", type=Path, default=Path("build/clips"), help="folder of rendered scenes")
    return parser


def _add_plan_options(group: "argparse._ArgumentGroup") -> None:
    add = group.add_argument
    add("--preset", default="r18_352x128", help="streaming student (default r18_352x128)")
    add("--teacher-preset", default="sparse_bev_r18_352x128_offline", help="teacher with future frames")
    add("--world", default="ordinary", help="synthetic world of all scenes: ordinary (default) or traffic")
    add(
        "--hide-future", type=float, default=0.5, metavar="SHARE",
        help="share of the teacher's training windows whose future is hidden (default 0.5)",
    )  # fmt: skip
    add("--seeds", type=int, default=3, help="runs per row (default 3); may grow later")
    add("--scenes", type=int, default=200, help="training scenes, seeds from 0 (default 200)")
    add("--held-out", type=int, default=40, help="held-out scenes, seeds from 900000 (default 40)")
    add("--streams", type=int, default=4, help="batch size (default 4)")
    add("--steps", type=int, default=0, help="steps of each student; required for a new experiment")
    add("--teacher-steps", type=int, default=0, help="steps of the teacher; required if it is trained")
    add("--share", type=float, default=0.1, help="share of each part in the detection loss (default 0.1)")
    add(
        "--set-method", action="append", default=[], metavar="KEY=VALUE",
        help="override a setting of FTKD in all its rows; weights are balanced afterwards",
    )  # fmt: skip
    add(
        "--set-student", action="append", default=[], metavar="KEY=VALUE",
        help="override a setting of the students' preset, e.g. decoder.learned_linking=true",
    )  # fmt: skip
    add("--lr", type=float, default=4e-4, help="peak learning rate (default 4e-4)")
    add("--init", type=Path, help="initial weights of all students (default: random, by seed)")
    add("--init-parts", default="", help="parts of --init to load, e.g. backbone,neck (default all)")
    add("--backbone-ratio", type=float, default=1.0, help="share of --lr for the students' backbones")
    add("--teacher", type=Path, help="weights of the teacher, instead of training one")
    add(
        "--cache-features", action="store_true",
        help="read features of the frozen backbone of --init from disk; needs --backbone-ratio 0",
    )  # fmt: skip


def requested_plan(arguments: argparse.Namespace) -> Plan:
    """Return the plan of a command line; steps are 0 if they are not given."""
    a = arguments
    return Plan(
        preset=a.preset, teacher_preset=a.teacher_preset, seeds=a.seeds, scenes=a.scenes,
        held_out=a.held_out, streams=a.streams, steps=a.steps, teacher_steps=a.teacher_steps, share=a.share,
        lr=a.lr, init=str(a.init or ""), init_parts=a.init_parts, backbone_ratio=a.backbone_ratio,
        teacher=str(a.teacher or ""), world=a.world, hide_future=a.hide_future,
        cache_features=a.cache_features, set_method=tuple(a.set_method),
        set_student=tuple(a.set_student),
    )  # fmt: skip


def check_arguments(arguments: argparse.Namespace) -> None:
    """Raise UserError for bad options before any work starts."""
    if arguments.out is None:
        raise UserError("no folder; give one with --out, or a matrix to print with --table")
    override(preset(arguments.preset), arguments.set_student)
    teacher = sparse_bev_preset(arguments.teacher_preset)
    if not teacher.num_future:
        raise UserError(f"--teacher-preset {arguments.teacher_preset}: expected a preset with future frames")
    DataConfig(world=arguments.world, hide_future=arguments.hide_future)  # raises UserError for bad values
    if arguments.cache_features and (arguments.init is None or arguments.backbone_ratio):
        raise UserError("--cache-features needs a frozen backbone: give --init and --backbone-ratio 0")
    check_settings(arguments.set_method)
    if arguments.phase != "train" and find_spec("nuscenes") is None:
        raise UserError(
            "scoring needs the nuScenes devkit, which is not installed; install nuscenes-devkit, or give "
            "--phase train and score on another machine"
        )


def make_plan(arguments: argparse.Namespace) -> Plan:
    """Return the plan of the folder, or store a new one. Raise UserError if the command asks for another
    plan; scoring takes the stored plan as it is."""
    path, rows = arguments.out / "plan.json", choose_rows(arguments.rows)
    if arguments.phase == "score":
        if not path.exists():
            raise UserError(
                f"{str(arguments.out)!r} holds no experiment; give the folder that --phase train wrote"
            )
        return load_plan(path)
    requested = requested_plan(arguments)
    if path.exists():
        plan = resume_plan(path, requested)
        check_steps(plan, teachers_of(rows))
        return plan
    check_steps(requested, teachers_of(rows))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, requested.as_json())
    return requested


def run_experiment(arguments: argparse.Namespace) -> int:
    """Train and score as the arguments ask; return the exit code."""
    check_arguments(arguments)
    plan = make_plan(arguments)
    if arguments.phase in ("all", "train"):
        machine = Machine(
            accelerator=arguments.accelerator, threads=arguments.threads, parallel=arguments.parallel,
            clips=arguments.clips,
        )  # fmt: skip
        deadline, work = Deadline(arguments.minutes), Work(plan, machine)
        runner = Runner(arguments.out, plan, choose_rows(arguments.rows), work, deadline)
        try:
            work.render()
            runner.run()
        except OutOfTime as reason:
            left, total = runner.count_runs()
            print(f"{reason}. {left} of {total} runs are left; the same command resumes")
            return 3
    if arguments.phase in ("all", "score"):
        from training.study.scoring import score_runs  # imports the devkit, which --phase train does not need

        path = score_runs(arguments.out, plan, subsets=arguments.subsets)
        print(table(read_matrix(path)))
        print(f"wrote {path}")
    return 0


def print_table(path: Path) -> None:
    """Print a matrix file as Markdown."""
    entries = read_matrix(path)
    parts = [table(entries), *(subset_table(entries, score) for score in ("AP", "AVE"))]
    print("\n\n".join(part for part in parts if part))


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Bad input is reported in one sentence with exit code 2; --minutes ends with exit code
    3."""
    arguments = make_parser().parse_args(argv)
    try:
        if arguments.table is None:
            return run_experiment(arguments)
        print_table(arguments.table)
    except UserError as error:
        print(f"experiments: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
