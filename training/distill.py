# SPDX-License-Identifier: Apache-2.0
"""Train a student with FTKD: a frozen offline teacher, which sees the future, beside the ground truth.

    python -m training.train --preset sparse_bev_tiny_offline --out runs/teacher --steps 20000
    python -m training.distill --teacher runs/teacher/weights.safetensors --preset tiny --out runs/ftkd

The student is a streaming preset or a SparseBEV without future frames. What is trained beside it is thrown
away: the weights file is the student's, with the same parameters as without a teacher. `--method` chooses a
competing method or an ablation instead. Settings of the distillation are `--set-method pv_weight=0`, every
other as in training.train.

With `--cache DIR` a streaming student reads the teacher's answers from disk instead of running it; they are
for the world as it is, so it needs `--set augment.flip=0 --set augment.rotation=0`. `--fill-cache` runs the
teacher over the scenes that are missing there, and then trains.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from ftkd_core.config import override
from ftkd_core.distillation.methods import METHODS, method_config
from ftkd_core.errors import UserError
from ftkd_core.models.sparse_bev import SparseBEV, build_sparse_bev
from ftkd_core.weights import load_into, read_window_weights, weights_hash
from training import train


def make_parser() -> argparse.ArgumentParser:
    """Command line of `python -m training.distill`."""
    parser = train.make_parser("python -m training.distill", __doc__)
    parser.add_argument("--teacher", type=Path, required=True, help="weights of the frozen SparseBEV teacher")
    parser.add_argument("--cache", type=Path, help="folder with the teacher's answers to read")
    parser.add_argument(
        "--fill-cache", action="store_true", help="run the teacher over what the cache lacks first"
    )
    parser.add_argument(
        "--method", default="ftkd", help=f"what is distilled: {', '.join(METHODS)} (default ftkd)"
    )
    parser.add_argument(
        "--set-method",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a distillation setting",
    )
    return parser


def load_teacher(path: Path) -> SparseBEV:
    """The teacher of a weights file."""
    state, config, _ = read_window_weights(path)
    teacher = build_sparse_bev(config)
    load_into(teacher, state, str(path))
    return teacher


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; bad input is one sentence and exit code 2."""
    arguments = make_parser().parse_args(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    try:
        config = train.resolve(arguments)
        method = override(method_config(arguments.method), arguments.set_method)
        teacher = load_teacher(arguments.teacher)
        fabric = train.make_fabric(arguments)
        fabric.launch()
        autocast = train.autocast_type(arguments.precision, fabric)
        teaching = train.Teaching(
            teacher, method, weights_hash(arguments.teacher), arguments.cache, arguments.fill_cache
        )
        train.warn_of_random_backbone(arguments, config, fabric)
        weights = train.run(config, fabric, arguments.out, arguments.init, autocast, teaching)
    except (UserError, FloatingPointError) as error:
        print(f"distillation: {error}", file=sys.stderr)
        return 2
    fabric.print(f"wrote {weights}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
