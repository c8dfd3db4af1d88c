# SPDX-License-Identifier: Apache-2.0
"""Train a student with FTKD: ground truth plus a frozen offline teacher that sees future frames.

    ftkd train --preset sparse_bev_tiny_offline --out runs/teacher --steps 20000
    ftkd distill --teacher runs/teacher/weights.safetensors --preset tiny --out runs/ftkd

The student is a streaming preset or a SparseBEV without future frames. The weights file holds only the
student, with the same parameters as without a teacher. `--method` selects a competing method or an ablation.
Settings of the distillation are set by `--set-method pv_weight=0`, all others as in `ftkd train`.

With `--cache DIR` a student reads the teacher's outputs from disk instead of running it. They are for
unaugmented scenes, so it needs `--set augment.flip=0 --set augment.rotation=0`, or for K augmentations of
each scene, with `--set augment.views=K`. `--fill-cache` first runs the teacher over the scenes that the cache
lacks; all processes share the work.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ftkd_core.config import override
from ftkd_core.distillation.methods import METHODS, method_config
from ftkd_core.errors import UserError
from ftkd_core.models.sparse_bev import SparseBEV, build_sparse_bev
from ftkd_core.weights import load_into, read_window_weights, weights_hash
from training import train
from training.preemption import EXIT_CODE, StoppedError
from training.teacher_source import TeacherSource


@dataclass(frozen=True, kw_only=True)
class DistillOptions(train.TrainOptions):
    """Options of `distill`, one per command-line option; see `make_parser` for their meaning."""

    teacher: Path
    method: str = "ftkd"
    method_overrides: Sequence[str] = ()
    cache: Path | None = None
    fill_cache: bool = False
    hide_future: bool = False


def make_parser(prog: str = "python -m training.distill") -> argparse.ArgumentParser:
    """Return the command-line parser."""
    parser = train.make_parser(prog, __doc__)
    add = parser.add_argument
    add("--teacher", type=Path, required=True, help="weights of the frozen SparseBEV teacher")
    add("--cache", type=Path, help="read the teacher's outputs from this folder")
    add("--fill-cache", action="store_true", help="first run the teacher over the scenes the cache lacks")
    add("--hide-future", action="store_true", help="hide the future frames from the teacher")
    add("--method", default="ftkd", help=f"distillation method: {', '.join(METHODS)} (default ftkd)")
    add(
        "--set-method", dest="method_overrides", action="append", default=[], metavar="KEY=VALUE",
        help="override a distillation setting",
    )  # fmt: skip
    return parser


def load_teacher(path: Path) -> SparseBEV:
    """Return the teacher of a weights file."""
    state, config, _ = read_window_weights(path)
    teacher = build_sparse_bev(config)
    load_into(teacher, state, str(path))
    return teacher


def distill(options: DistillOptions) -> Path:
    """Train a student with a teacher and return its weights file. Raise UserError for bad options,
    FloatingPointError if training diverges."""
    train.resolve_config(options)  # report bad settings before the teacher is read
    method = override(method_config(options.method), options.method_overrides)
    source = TeacherSource(
        load_teacher(options.teacher),
        method,
        weights_hash(options.teacher),
        options.cache,
        options.fill_cache,
        options.hide_future,
    )
    return train.train(options, source)


def main(argv: Sequence[str] | None = None, prog: str = "python -m training.distill") -> int:
    """Entry point. Bad input is reported in one sentence with exit code 2."""
    options = DistillOptions(**vars(make_parser(prog).parse_args(argv)))
    try:
        distill(options)
    except (UserError, FloatingPointError) as error:
        print(f"distillation: {error}", file=sys.stderr)
        return 2
    except StoppedError as stopped:
        print(f"distillation: {stopped}; the same command resumes it", file=sys.stderr)
        return EXIT_CODE
    return 0


if __name__ == "__main__":
    sys.exit(main())
