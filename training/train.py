# SPDX-License-Identifier: Apache-2.0
"""Train a detector: the streaming student, or a SparseBEV (teacher or window student), on the synthetic world
or on nuScenes.

    ftkd train --preset tiny --out runs/tiny --steps 20000
    ftkd train --preset sparse_bev_tiny_offline --out runs/teacher --steps 20000
    torchrun --nproc-per-node 8 -m training.train --recipe stream_petr_r50 --out runs/student \
        --set data.root=/data/nuscenes

A run can be stopped at any time; the same command resumes it from the last checkpoint. Any setting of the
preset or of the run can be overridden: `--set optim.lr=2e-4 --set model.decoder.num_layers=4`.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from lightning_fabric import Fabric
from torch.utils.data import Dataset

from ftkd_core.config import BackboneConfig, DetectorConfig, SparseBEVConfig, override
from ftkd_core.data.clips import ClipSource
from ftkd_core.data.windows import PairedDataset
from ftkd_core.distillation.cache import TeacherCache
from ftkd_core.errors import UserError
from ftkd_core.models.build import build_stream_petr
from ftkd_core.models.recompute import set_recompute
from ftkd_core.models.sparse_bev import SparseBEV, build_sparse_bev
from ftkd_core.models.stream_petr import StreamPETR
from ftkd_core.presets import PRESETS, SPARSE_BEV_PRESETS, preset, sparse_bev_preset
from ftkd_core.weights import read_config, start_from
from training import checkpoint
from training.config import RunConfig, TrainConfig, WindowTrainConfig
from training.datasets import (
    CachedDataset,
    CachedWindows,
    StreamingDataset,
    make_streams,
    make_windows,
    open_clips,
    validation_clips,
    with_cached_features,
)
from training.devices import autocast_dtype, count_processes, cpu_has_bfloat16, make_fabric
from training.distiller import Distiller, make_distiller
from training.periodic_validation import ValidationPlan
from training.preemption import EXIT_CODE, StoppedError
from training.recipes import RECIPES
from training.run_log import LOGGERS, make_logger
from training.sliding_window import SlidingWindowDataset, SlidingWindowTask
from training.tasks import StreamingTask, WindowTask
from training.teacher_source import TeacherSource, open_cache
from training.trainer import WEIGHTS_NAME, Trainer

_PRESET_FROM_FILE: Final = "init"


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Options of `train`, one per command-line option; see `make_parser` for their meaning."""

    out: Path
    preset: str | None = None
    recipe: str | None = None
    steps: int | None = None
    streams: int | None = None
    seed: int | None = None
    init: Path | None = None
    init_parts: str | None = None
    accelerator: str = "auto"
    devices: str = "1"
    precision: str = "auto"
    threads: int = 0
    keep: int = 1
    loggers: Sequence[str] = ()
    validate_every: int = 0
    validate_split: str = "val"
    validate_root: str = ""
    validate_version: str = ""
    overrides: Sequence[str] = ()


def make_parser(
    prog: str = "python -m training.train", description: str | None = __doc__
) -> argparse.ArgumentParser:
    """Return the command-line parser, to which `training.distill` adds the teacher's options."""
    parser = argparse.ArgumentParser(
        prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ", ".join(sorted([*PRESETS, *SPARSE_BEV_PRESETS]))
    add = parser.add_argument
    add(
        "--preset",
        help=f"model configuration: {names}; or {_PRESET_FROM_FILE}, that of the --init file (default: the "
        "recipe's, or tiny)",
    )
    add(
        "--recipe",
        choices=sorted(RECIPES),
        help="settings of a published training on nuScenes; other options override them",
    )
    add(
        "--out",
        type=Path,
        required=True,
        help="folder for checkpoints and TensorBoard; resumed if it has a run",
    )
    add("--steps", type=int, help="optimiser steps of the whole run (default 20000)")
    add("--streams", type=int, help="batch size of each process: streams or windows (default 4)")
    add("--seed", type=int, help="seed of weights, order and augmentation (default 0)")
    add("--init", type=Path, help="start from this .safetensors file: a model or a backbone")
    add(
        "--init-parts",
        metavar="PARTS",
        help="load only these parts of --init, of any kind of model: e.g. backbone,neck,auxiliary",
    )
    add(
        "--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE",
        help="override any setting",
    )  # fmt: skip
    _add_machine_options(parser)
    _add_monitor_options(parser)
    return parser


def _add_machine_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--accelerator", default="auto", help="auto, cpu or cuda")
    add("--devices", default="1", help="processes on this machine, if not started by torchrun")
    add(
        "--precision",
        default="auto",
        help="auto (bf16 on a GPU, else 32 bit), 32-true, or bf16-mixed (faster on a CPU with bfloat16)",
    )
    add("--threads", type=int, default=0, help="CPU threads of this process (0: PyTorch's choice)")


def _add_monitor_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--keep", type=int, default=1, help="number of checkpoints to keep (default 1, the last)")
    add(
        "--logger", dest="loggers", action="append", default=[], choices=LOGGERS,
        help="log to this service too (repeatable)",
    )  # fmt: skip
    add(
        "--validate-every", type=int, default=0, metavar="EPOCHS",
        help="compute the official metrics every so many epochs and keep the best weights (default 0: never)",
    )  # fmt: skip
    add("--validate-split", default="val", help="split to score (default val)")
    add("--validate-root", default="", help="data set to score (default: that of data.root)")
    add("--validate-version", default="", help="its version (default: data.nuscenes)")


def resolve_config(options: TrainOptions) -> TrainConfig | WindowTrainConfig:
    """Return the run's configuration: preset, then recipe, then options, then overrides."""
    recipe = RECIPES[options.recipe] if options.recipe else None
    settings = recipe.settings(count_processes(options.devices)) if recipe else []
    for key in ("steps", "streams", "seed", "init_parts"):
        if getattr(options, key) not in (None, ""):
            settings.append(f"{key}={getattr(options, key)}")
    settings += options.overrides
    if recipe is not None and options.preset is None:
        model: DetectorConfig | SparseBEVConfig = recipe.model()
    else:
        model = _model_config(options.preset or "tiny", options.init)
    if isinstance(model, SparseBEVConfig):
        return override(WindowTrainConfig(model=model), settings)
    return override(TrainConfig(model=model), settings)


def _model_config(name: str, init: Path | None) -> DetectorConfig | SparseBEVConfig:
    """Return the configuration of a preset, or of the --init file if the preset is `init`."""
    if name != _PRESET_FROM_FILE:
        return sparse_bev_preset(name) if name in SPARSE_BEV_PRESETS else preset(name)
    if init is None:
        raise UserError(f"--preset {_PRESET_FROM_FILE} without a file; give one with --init")
    found = read_config(init)
    if isinstance(found, BackboneConfig):
        raise UserError(
            f"--preset {_PRESET_FROM_FILE}: {str(init)!r} is only a backbone; give the preset of a detector"
        )
    return found


def split_parts(names: str) -> list[str]:
    """Return the parts of `--init-parts`."""
    return [name for name in names.split(",") if name]


def warn_of_random_backbone(options: TrainOptions, config: RunConfig, fabric: Fabric) -> None:
    """Print a warning if a recipe for a pretrained backbone is about to start from a random one."""
    starts = options.init is None and not (options.out / checkpoint.FILE_NAME).exists()
    if options.recipe and config.data.root and starts and fabric.is_global_zero:
        print(
            f"warning: recipe {options.recipe} without --init: the backbone starts at random, but the recipe "
            "is for a pretrained one and freezes parts of it; give --init with a file of ftkd import-weights",
            file=sys.stderr,
        )


def run_training(
    config: TrainConfig | WindowTrainConfig,
    fabric: Fabric,
    out: Path,
    init: Path | None,
    autocast: torch.dtype | None = None,
    source: TeacherSource | None = None,
    monitor: TrainOptions | None = None,
) -> Path:
    """Train, or resume training, into `out`; with a teacher if `source` is given. monitor: options of logging
    and validation. Return the weights file. Raise StoppedError after SIGTERM."""
    if config.data.cache_features and source is not None and source.cache is None:
        raise UserError(
            "data.cache_features with a teacher that runs: it needs the images, which the features replace; "
            "give --cache (and --fill-cache) to read its outputs, or leave data.cache_features out"
        )
    fabric.seed_everything(config.seed, verbose=False)
    model = _build_model(config, init, fabric)
    distiller = None
    if source is not None:
        distiller = make_distiller(source.teacher, model, source.method, hide_future=source.hide_future)
    out.mkdir(parents=True, exist_ok=True)
    clips, scenes = open_clips(config, fabric)
    options, batch = monitor or TrainOptions(out=out), config.streams * fabric.world_size
    plan = _validation_plan(options, config, clips, scenes, fabric)
    inputs = with_cached_features(config, model, clips, scenes, fabric)
    task = make_task(config, model, distiller)
    trainer = Trainer(
        fabric, task, config.optim, out, steps=config.steps, seed=config.seed, autocast=autocast,
        accumulate=config.accumulate, notes={} if source is None else source.notes,
    )  # fmt: skip
    if (out / checkpoint.FILE_NAME).exists():
        trainer.resume(out / checkpoint.FILE_NAME)
        fabric.print(f"resumed at step {trainer.step} of {config.steps}")
    cache = None
    if source is not None and distiller is not None and source.cache is not None:
        cache = open_cache(config, source, source.cache, distiller, clips, scenes, fabric)
    dataset = _make_dataset(config, inputs, scenes, fabric, source, cache)
    loggers = [make_logger(name, out) for name in options.loggers] if fabric.is_global_zero else []
    trainer.run(
        dataset, workers=config.data.workers, save_every=config.save_every, keep=options.keep,
        samples_per_step=batch, loggers=loggers, plan=plan,
    )  # fmt: skip
    return out / WEIGHTS_NAME


def _validation_plan(
    options: TrainOptions, config: TrainConfig | WindowTrainConfig, clips: ClipSource, scenes: int,
    fabric: Fabric,
) -> ValidationPlan | None:  # fmt: skip
    """Return the plan of --validate-every; an epoch is one pass over the key frames of all scenes."""
    if options.validate_every < 0 or options.keep < 1:
        raise UserError(
            f"--validate-every {options.validate_every}, --keep {options.keep}: expected at least 0 and 1"
        )
    if not options.validate_every:
        return None
    batch = config.streams * fabric.world_size
    steps = max(1, sum(clips(index).num_keys for index in range(scenes)) // batch)
    scored = validation_clips(
        config, options.validate_root, options.validate_version, options.validate_split, fabric
    )
    return ValidationPlan(clips=scored, every=options.validate_every * steps)


def _build_model(
    config: TrainConfig | WindowTrainConfig, init: Path | None, fabric: Fabric
) -> StreamPETR | SparseBEV:
    """Return the model of a run, with the weights of the --init file if one is given."""
    model: StreamPETR | SparseBEV
    if isinstance(config, TrainConfig):
        model = build_stream_petr(config.model)
    else:
        model = build_sparse_bev(config.model)
    if init is not None:
        missing = start_from(init, model, config.model, split_parts(config.init_parts))
        if missing:
            fabric.print(f"{init} lacks {', '.join(missing)}: these are initialised at random")
    elif config.init_parts:
        raise UserError(f"init_parts {config.init_parts!r} without a file; give one with --init")
    set_recompute(model, config.recompute)
    return model


def make_task(
    config: RunConfig, model: StreamPETR | SparseBEV, distiller: Distiller | None
) -> StreamingTask | WindowTask:
    """Return the task of a run: windows for a SparseBEV; for a StreamPETR one frame per stream or, with
    `data.window`, a window per stream."""
    data = config.data
    if isinstance(model, SparseBEV):
        if data.window:
            raise UserError(f"data.window {data.window}: a SparseBEV always sees windows; leave it out")
        return WindowTask(model, distiller, config.augment.grid_mask, config.gradient_frames)
    if config.gradient_frames:
        raise UserError(
            f"gradient_frames {config.gradient_frames}: only the last frame of a StreamPETR has gradients "
            "already; leave it out"
        )
    if not data.window:
        return StreamingTask(model, config.streams, distiller, config.augment.grid_mask)
    return SlidingWindowTask(model, config.streams, distiller, config.augment.grid_mask)


def _make_dataset(
    config: TrainConfig | WindowTrainConfig, clips: ClipSource, scenes: int, fabric: Fabric,
    source: TeacherSource | None, cache: TeacherCache | None,
) -> Dataset[Any]:  # fmt: skip
    """Return the data set of a run, with the teacher's windows or its cached outputs."""
    teacher = None if source is None else source.teacher.config
    if isinstance(config, WindowTrainConfig):
        windows = make_windows(config, clips, scenes, fabric, None if cache is not None else teacher)
        return windows if cache is None else CachedWindows(windows, cache)
    streams = make_streams(config, clips, scenes, fabric)
    items: StreamingDataset = streams
    if cache is not None:
        items = CachedDataset(streams, cache)
    elif teacher is not None:
        items = PairedDataset(streams, teacher.num_past, teacher.num_future)
    if config.data.window:
        return SlidingWindowDataset(items, config.data.window)
    return items


def train(options: TrainOptions, source: TeacherSource | None = None) -> Path:
    """Train a detector and return its weights file. Raise UserError for bad options, FloatingPointError if
    training diverges."""
    if options.threads:
        torch.set_num_threads(options.threads)
    fabric = make_fabric(options.accelerator, options.devices)
    fabric.launch()
    autocast = autocast_dtype(options.precision, fabric.device)
    if autocast is not None and fabric.device.type == "cpu" and not cpu_has_bfloat16():
        fabric.print(
            "warning: this processor has no bfloat16 instructions; bf16-mixed is slower than 32-true"
        )
    config = resolve_config(options)
    warn_of_random_backbone(options, config, fabric)
    weights = run_training(config, fabric, options.out, options.init, autocast, source, options)
    fabric.print(f"wrote {weights}")
    return weights


def main(argv: Sequence[str] | None = None, prog: str = "python -m training.train") -> int:
    """Entry point. Bad input is reported in one sentence with exit code 2."""
    options = TrainOptions(**vars(make_parser(prog).parse_args(argv)))
    try:
        train(options)
    except (UserError, FloatingPointError) as error:
        print(f"training: {error}", file=sys.stderr)
        return 2
    except StoppedError as stopped:
        print(f"training: {stopped}; the same command resumes it", file=sys.stderr)
        return EXIT_CODE
    return 0


if __name__ == "__main__":
    sys.exit(main())
