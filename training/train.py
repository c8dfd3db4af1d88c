# SPDX-License-Identifier: Apache-2.0
"""Train a detector on the synthetic world: the streaming student, or a SparseBEV (teacher or student B).

    python -m training.train --preset tiny --out runs/tiny --steps 20000
    python -m training.train --preset sparse_bev_tiny_offline --out runs/teacher --steps 20000
    torchrun --nproc-per-node 8 -m training.train --preset tiny --out runs/tiny --steps 20000

Stop it at any time; the same command goes on from the last checkpoint. Any setting of the preset or of the
run can be overridden: `--set optim.lr=2e-4 --set model.decoder.num_layers=4`.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch.utils.data import Dataset

from ftkd_core.config import DetectorConfig, SparseBEVConfig, override
from ftkd_core.data.clips import AugmentConfig, StreamDataset
from ftkd_core.data.synthetic_clips import SyntheticClips
from ftkd_core.data.windows import PairedDataset, WindowDataset
from ftkd_core.distillation.cache import TeacherCache, describe, fill_cache, refuse_augmentation
from ftkd_core.distillation.methods import MethodConfig
from ftkd_core.errors import UserError
from ftkd_core.models.sparse_bev import SparseBEV, build_sparse_bev
from ftkd_core.models.stream_petr import StreamPETR, build_stream_petr
from ftkd_core.presets import PRESETS, SPARSE_BEV_PRESETS, preset, sparse_bev_preset
from ftkd_core.weights import load_into, read_weights, read_window_weights
from training.lessons import CachedDataset, Distiller, StreamLesson, WindowLesson, make_distiller
from training.loop import OptimConfig, Trainer


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Training scenes are seeds first_seed .. first_seed + scenes - 1, rendered once into `cache`; segments
    of `segment` key frames are trained on as one stream. Held-out scenes of the project start at seed
    900000."""

    scenes: int = 200
    first_seed: int = 0
    duration_s: float = 20.0
    segment: int = 10
    cache: str = "build/clips"
    version: str = ""
    workers: int = 1


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What surrounds a model in one run; `streams` is the batch size of each process."""

    steps: int = 20000
    streams: int = 4
    seed: int = 0
    save_every: int = 500
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)


@dataclass(frozen=True, kw_only=True)
class TrainConfig(RunConfig):
    """A run of the streaming student."""

    model: DetectorConfig


@dataclass(frozen=True, kw_only=True)
class WindowTrainConfig(RunConfig):
    """A run of a SparseBEV."""

    model: SparseBEVConfig


def make_parser(
    prog: str = "python -m training.train", description: str | None = __doc__
) -> argparse.ArgumentParser:
    """Command line of `python -m training.train`, to which `training.distill` adds the teacher."""
    parser = argparse.ArgumentParser(
        prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ", ".join(sorted([*PRESETS, *SPARSE_BEV_PRESETS]))
    parser.add_argument("--preset", default="tiny", help=f"model configuration: {names}")
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="folder for checkpoints and TensorBoard; resumed if it holds a run",
    )
    parser.add_argument("--steps", type=int, help="optimiser steps of the whole run (default 20000)")
    parser.add_argument("--streams", type=int, help="scenes trained on side by side, per process (default 4)")
    parser.add_argument("--seed", type=int, help="seed of weights, order and augmentation (default 0)")
    parser.add_argument("--init", type=Path, help="start from the weights of this .safetensors file")
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
    if arguments.preset in SPARSE_BEV_PRESETS:
        return override(WindowTrainConfig(model=sparse_bev_preset(arguments.preset)), assignments(arguments))
    return override(TrainConfig(model=preset(arguments.preset)), assignments(arguments))


def assignments(arguments: argparse.Namespace) -> list[str]:
    """The settings that the command line changes."""
    named = [
        f"{name}={getattr(arguments, name)}"
        for name in ("steps", "streams", "seed")
        if getattr(arguments, name) is not None
    ]
    return [*named, *arguments.set]


def make_fabric(arguments: argparse.Namespace) -> Fabric:
    """Fabric for the chosen devices; under torchrun it joins the processes that were started."""
    devices = os.environ.get("LOCAL_WORLD_SIZE") or arguments.devices
    nodes = int(os.environ.get("WORLD_SIZE", "1")) // max(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)
    return Fabric(accelerator=arguments.accelerator, devices=devices, num_nodes=max(nodes, 1))


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


def run(
    config: TrainConfig | WindowTrainConfig,
    fabric: Fabric,
    out: Path,
    init: Path | None,
    autocast: torch.dtype | None = None,
    teaching: Teaching | None = None,
) -> Path:
    """Train (or go on training) into `out`, with a teacher where one is given; returns the weights file."""
    fabric.seed_everything(config.seed, verbose=False)
    model: StreamPETR | SparseBEV
    if isinstance(config, TrainConfig):
        model = build_stream_petr(config.model)
    else:
        model = build_sparse_bev(config.model)
    if init is not None:
        state, _, _ = read_weights(init) if isinstance(model, StreamPETR) else read_window_weights(init)
        load_into(model, state, str(init))
    distiller = None if teaching is None else make_distiller(teaching.teacher, model, teaching.method)
    out.mkdir(parents=True, exist_ok=True)
    data = config.data
    clips = SyntheticClips(
        data.first_seed, config.model.image, Path(data.cache), data.duration_s, data.version
    )
    if fabric.is_global_zero:
        clips.render_all(data.scenes)
    fabric.barrier()
    lesson: StreamLesson | WindowLesson
    if isinstance(model, StreamPETR):
        lesson = StreamLesson(model, config.streams, distiller)
    else:
        lesson = WindowLesson(model, distiller)
    trainer = Trainer(
        fabric, lesson, config.optim, out, steps=config.steps, seed=config.seed, autocast=autocast
    )
    if (out / "state.pt").exists():
        trainer.resume(out / "state.pt")
        fabric.print(f"resumed at step {trainer.step} of {config.steps}")
    dataset = _dataset(
        config, clips, fabric.global_rank, None if teaching is None else teaching.teacher.config
    )
    if teaching is not None and teaching.cache is not None:
        if not isinstance(dataset, PairedDataset) or distiller is None:
            raise UserError("--cache serves streaming students; a SparseBEV student runs its teacher")
        cache = _open_cache(config, teaching, distiller, clips, fabric)
        dataset = CachedDataset(dataset.streams, cache)
    trainer.run(dataset, workers=data.workers, save_every=config.save_every)
    return out / "weights.safetensors"


def _dataset(
    config: TrainConfig | WindowTrainConfig, clips: SyntheticClips, rank: int, teacher: SparseBEVConfig | None
) -> Dataset[Any]:
    """What the run's lesson is served: frames of streams or windows, and the teacher's windows with them."""
    if isinstance(config, WindowTrainConfig):
        return WindowDataset(
            clips,
            config.data.scenes,
            batch=config.streams,
            num_past=config.model.num_past,
            num_future=config.model.num_future if teacher is None else teacher.num_future,
            augment=config.augment,
            seed=config.seed,
            rank=rank,
        )
    streams = StreamDataset(
        clips,
        config.data.scenes,
        num_streams=config.streams,
        segment=config.data.segment,
        augment=config.augment,
        seed=config.seed,
        first_stream=config.streams * rank,
    )
    return streams if teacher is None else PairedDataset(streams, teacher.num_past, teacher.num_future)


def _open_cache(
    config: RunConfig, teaching: Teaching, distiller: Distiller, clips: SyntheticClips, fabric: Fabric
) -> TeacherCache:
    """The cache of a run, filled first where that was asked for."""
    assert teaching.cache is not None
    refuse_augmentation(config.augment)
    description = describe(
        teacher=teaching.weights_hash,
        data=f"{clips.cache.name} from seed {clips.first_seed}",
        map_target=distiller.method.map_target,
        strides=distiller.method.strides,
        with_previous=distiller.method.needs_previous,
    )
    if teaching.fill_cache and fabric.is_global_zero:
        fill_cache(teaching.cache, description, distiller.answer_clip, clips, config.data.scenes)
    fabric.barrier()
    return TeacherCache(teaching.cache, description, config.data.scenes)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; bad input is one sentence and exit code 2."""
    arguments = make_parser().parse_args(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    try:
        fabric = make_fabric(arguments)
        fabric.launch()
        autocast = autocast_type(arguments.precision, fabric)
        weights = run(resolve(arguments), fabric, arguments.out, arguments.init, autocast)
    except (UserError, FloatingPointError) as error:
        print(f"training: {error}", file=sys.stderr)
        return 2
    fabric.print(f"wrote {weights}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
