# SPDX-License-Identifier: Apache-2.0
"""Train a detector: the streaming student, or a SparseBEV (teacher or student B), on the synthetic world or
on nuScenes.

    python -m training.train --preset tiny --out runs/tiny --steps 20000
    python -m training.train --preset sparse_bev_tiny_offline --out runs/teacher --steps 20000
    torchrun --nproc-per-node 8 -m training.train --recipe stream_petr_r50 --out runs/student \
        --set data.root=/data/nuscenes

Stop it at any time; the same command goes on from the last checkpoint. Any setting of the preset or of the
run can be overridden: `--set optim.lr=2e-4 --set model.decoder.num_layers=4`.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies import DDPStrategy

from ftkd_core.config import BackboneConfig, DetectorConfig, SparseBEVConfig, override, to_dict
from ftkd_core.data.clips import ClipSource
from ftkd_core.data.windows import PairedDataset, WindowDataset
from ftkd_core.distillation.cache import TeacherCache, fill_cache, refuse_augmentation
from ftkd_core.distillation.methods import METHODS, MethodConfig
from ftkd_core.errors import UserError
from ftkd_core.models.build import build_stream_petr
from ftkd_core.models.sparse_bev import SparseBEV, build_sparse_bev
from ftkd_core.models.stream_petr import StreamPETR
from ftkd_core.presets import PRESETS, SPARSE_BEV_PRESETS, preset, sparse_bev_preset
from ftkd_core.weights import read_config, start_from
from training.config import RunConfig, TrainConfig, WindowTrainConfig
from training.datasets import kept_clips, make_dataset, open_clips
from training.recipes import RECIPES
from training.sliding_window import SlidingDataset, SlidingLesson
from training.tasks import CachedDataset, Distiller, StreamLesson, WindowLesson, make_distiller
from training.trainer import Trainer

_FROM_FILE: Final = "init"  # instead of a preset's name
_PATIENCE: Final = timedelta(hours=12)
"""How long processes wait for each other. The first alone indexes a data set, runs a teacher over it or
extracts features, which may take hours; torch would end the others after 10 or 30 minutes. A process that
dies is noticed by what started it, not by this."""


def make_parser(
    prog: str = "python -m training.train", description: str | None = __doc__
) -> argparse.ArgumentParser:
    """Command line of `python -m training.train`, to which `training.distill` adds the teacher."""
    parser = argparse.ArgumentParser(
        prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ", ".join(sorted([*PRESETS, *SPARSE_BEV_PRESETS]))
    parser.add_argument(
        "--preset",
        help=f"model configuration: {names}; or {_FROM_FILE}, that of the --init file (default: the "
        "recipe's, or tiny)",
    )
    parser.add_argument(
        "--recipe",
        choices=sorted(RECIPES),
        help="settings of a published training on nuScenes; what the command line says comes after",
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="folder for checkpoints and TensorBoard; resumed if it holds a run",
    )
    parser.add_argument("--steps", type=int, help="optimiser steps of the whole run (default 20000)")
    parser.add_argument("--streams", type=int, help="scenes trained on side by side, per process (default 4)")
    parser.add_argument("--seed", type=int, help="seed of weights, order and augmentation (default 0)")
    parser.add_argument("--init", type=Path, help="start from this .safetensors file: a model or a backbone")
    parser.add_argument(
        "--init-parts",
        metavar="PARTS",
        help="take only these from it, of whatever kind its model is: e.g. backbone,neck,auxiliary",
    )
    parser.add_argument("--accelerator", default="auto", help="auto, cpu or cuda")
    parser.add_argument(
        "--devices", default="1", help="processes on this machine, when not started by torchrun"
    )
    parser.add_argument(
        "--precision", default="auto", help="auto (bf16 on a GPU, else 32 bit), 32-true or bf16-mixed"
    )
    parser.add_argument(
        "--threads", type=int, default=0, help="CPU threads of this process (0: PyTorch's choice)"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override any setting"
    )
    return parser


def resolve(arguments: argparse.Namespace) -> TrainConfig | WindowTrainConfig:
    """The run's configuration from the command line."""
    name, settings = arguments.preset or "tiny", []
    if arguments.recipe:
        recipe = RECIPES[arguments.recipe]
        name, settings = arguments.preset or recipe.preset, recipe.settings(_processes(arguments))
    settings = [*settings, *assignments(arguments)]
    model = _model(name, arguments.init)
    if isinstance(model, SparseBEVConfig):
        return override(WindowTrainConfig(model=model), settings)
    return override(TrainConfig(model=model), settings)


def _model(name: str, init: Path | None) -> DetectorConfig | SparseBEVConfig:
    """The configuration of a preset, or of the file that a run starts from."""
    if name != _FROM_FILE:
        return sparse_bev_preset(name) if name in SPARSE_BEV_PRESETS else preset(name)
    if init is None:
        raise UserError(f"--preset {_FROM_FILE} without a file; give one with --init")
    found = read_config(init)
    if isinstance(found, BackboneConfig):
        raise UserError(
            f"--preset {_FROM_FILE}: {str(init)!r} holds a backbone alone; give the preset of a detector"
        )
    return found


def split_parts(names: str) -> list[str]:
    """The parts of `--init-parts`."""
    return [name for name in names.split(",") if name]


def _processes(arguments: argparse.Namespace) -> int:
    """How many processes share a step."""
    started = os.environ.get("WORLD_SIZE")
    if started is None and not str(arguments.devices).isdigit():
        raise UserError(f"devices {arguments.devices!r} with a recipe: expected a number")
    return int(started or arguments.devices)


def assignments(arguments: argparse.Namespace) -> list[str]:
    """The settings that the command line changes."""
    named = [
        f"{name}={getattr(arguments, name)}"
        for name in ("steps", "streams", "seed", "init_parts")
        if getattr(arguments, name) not in (None, "")
    ]
    return [*named, *arguments.set]


def make_fabric(arguments: argparse.Namespace) -> Fabric:
    """Fabric for the chosen devices; under torchrun it joins the processes that were started."""
    devices = os.environ.get("LOCAL_WORLD_SIZE") or arguments.devices
    nodes = int(os.environ.get("WORLD_SIZE", "1")) // max(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)
    make = partial(Fabric, accelerator=arguments.accelerator, devices=devices, num_nodes=max(nodes, 1))
    fabric = make()
    several = isinstance(fabric.strategy, DDPStrategy)  # what devices=auto means only Fabric knows
    return make(strategy=DDPStrategy(timeout=_PATIENCE)) if several else fabric


def warn_of_random_backbone(
    arguments: argparse.Namespace, config: TrainConfig | WindowTrainConfig, fabric: Fabric
) -> None:
    """Say on stderr, once, where a recipe for a trained backbone is about to start from a random one."""
    begins = arguments.init is None and not (arguments.out / "state.pt").exists()
    if arguments.recipe and config.data.root and begins and fabric.is_global_zero:
        print(
            f"warning: recipe {arguments.recipe} without --init: the backbone starts at random, but the "
            "recipe is for a trained one, whose norms (and more) it keeps as they are; give --init with a "
            "file of ftkd import-weights (docs/training.md)",
            file=sys.stderr,
        )


def autocast_type(precision: str, fabric: Fabric) -> torch.dtype | None:
    """What the network computes in where it may: None for float32 throughout."""
    if precision == "auto":
        precision = "bf16-mixed" if fabric.device.type == "cuda" else "32-true"
    if precision not in ("32-true", "bf16-mixed"):
        raise UserError(f"precision {precision!r}; expected auto, 32-true or bf16-mixed")
    return torch.bfloat16 if precision == "bf16-mixed" else None


@dataclass(frozen=True)
class Teaching:
    """The teacher of a run: its settings, the hash of its weights, and where its answers are cached."""

    teacher: SparseBEV
    method: MethodConfig
    weights_hash: str = ""
    cache: Path | None = None
    fill_cache: bool = False

    @property
    def notes(self) -> dict[str, Any]:
        """What the student's weights file says of it: the method, by its name or else its settings, and
        the hash of the teacher's weights."""
        names = [name for name, config in METHODS.items() if config == self.method]
        return {"method": names[0] if names else to_dict(self.method), "teacher": self.weights_hash}


def run(
    config: TrainConfig | WindowTrainConfig,
    fabric: Fabric,
    out: Path,
    init: Path | None,
    autocast: torch.dtype | None = None,
    teaching: Teaching | None = None,
) -> Path:
    """Train (or go on training) into `out`, with a teacher where one is given; returns the weights file."""
    if config.data.cache_features and teaching is not None and teaching.cache is None:
        raise UserError(
            "data.cache_features with a teacher that runs: it needs the images, in whose place the features "
            "are; give --cache (and --fill-cache) to read its answers, or leave data.cache_features out"
        )
    fabric.seed_everything(config.seed, verbose=False)
    model: StreamPETR | SparseBEV
    if isinstance(config, TrainConfig):
        model = build_stream_petr(config.model)
    else:
        model = build_sparse_bev(config.model)
    if init is not None:
        lacking = start_from(init, model, config.model, split_parts(config.init_parts))
        if lacking:
            fabric.print(f"{init} lacks {', '.join(lacking)}: these start as in a new model")
    elif config.init_parts:
        raise UserError(f"init_parts {config.init_parts!r} without a file; give one with --init")
    distiller = None if teaching is None else make_distiller(teaching.teacher, model, teaching.method)
    out.mkdir(parents=True, exist_ok=True)
    clips, scenes = open_clips(config, fabric)
    shown = kept_clips(config, model, clips, scenes, fabric)
    lesson: StreamLesson | WindowLesson
    if isinstance(model, StreamPETR):
        lesson = stream_lesson(config, model, distiller)
    elif config.data.window:
        raise UserError(f"data.window {config.data.window}: a SparseBEV always sees windows; leave it out")
    else:
        lesson = WindowLesson(model, distiller, config.augment.grid_mask)
    trainer = Trainer(
        fabric, lesson, config.optim, out, steps=config.steps, seed=config.seed, autocast=autocast,
        notes={} if teaching is None else teaching.notes,
    )  # fmt: skip
    if (out / "state.pt").exists():
        trainer.resume(out / "state.pt")
        fabric.print(f"resumed at step {trainer.step} of {config.steps}")
    seen_by = None if teaching is None else teaching.teacher.config
    dataset = make_dataset(config, shown, scenes, fabric, seen_by)
    if teaching is not None and teaching.cache is not None:
        if not isinstance(dataset, PairedDataset) or distiller is None:
            raise UserError("--cache serves streaming students; a SparseBEV student runs its teacher")
        cache = _open_cache(config, teaching, distiller, clips, scenes, fabric)
        dataset = CachedDataset(dataset.streams, cache)
    if config.data.window and isinstance(lesson, SlidingLesson):
        assert not isinstance(dataset, WindowDataset)
        dataset = SlidingDataset(dataset, config.data.window, config.data.graded)
    trainer.run(dataset, workers=config.data.workers, save_every=config.save_every)
    return out / "weights.safetensors"


def stream_lesson(config: RunConfig, model: StreamPETR, distiller: Distiller | None) -> StreamLesson:
    """What a step teaches the streaming student: a frame of each stream, or with `data.window` a window of
    each."""
    data = config.data
    if not data.window:
        return StreamLesson(model, config.streams, distiller, config.augment.grid_mask)
    if not 1 <= data.graded <= data.window:
        raise UserError(f"data.graded {data.graded}: expected 1 .. data.window {data.window}")
    return SlidingLesson(model, config.streams, distiller, data.graded, config.augment.grid_mask)


def _open_cache(
    config: RunConfig, teaching: Teaching, distiller: Distiller, clips: ClipSource, scenes: int,
    fabric: Fabric,
) -> TeacherCache:  # fmt: skip
    """The cache of a run, filled first where that was asked for."""
    assert teaching.cache is not None
    refuse_augmentation(config.augment)
    description = distiller.describe(teaching.weights_hash, clips.name)
    if teaching.fill_cache and fabric.is_global_zero:
        fill_cache(teaching.cache, description, distiller.answer_clip, clips, scenes)
    fabric.barrier()
    return TeacherCache(teaching.cache, description, scenes)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; bad input is one sentence and exit code 2."""
    arguments = make_parser().parse_args(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    try:
        fabric = make_fabric(arguments)
        fabric.launch()
        autocast = autocast_type(arguments.precision, fabric)
        config = resolve(arguments)
        warn_of_random_backbone(arguments, config, fabric)
        weights = run(config, fabric, arguments.out, arguments.init, autocast)
    except (UserError, FloatingPointError) as error:
        print(f"training: {error}", file=sys.stderr)
        return 2
    fabric.print(f"wrote {weights}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
