# SPDX-License-Identifier: Apache-2.0
"""Train the streaming student on the synthetic world.

    python -m training.train --preset tiny --out runs/tiny --steps 20000
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

import torch
from lightning_fabric import Fabric

from ftkd_core.config import DetectorConfig, override
from ftkd_core.data.clips import AugmentConfig, StreamDataset
from ftkd_core.data.synthetic_clips import SyntheticClips
from ftkd_core.errors import UserError
from ftkd_core.models.stream_petr import build_stream_petr
from ftkd_core.presets import PRESETS, preset
from ftkd_core.weights import load_into, read_weights
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
class TrainConfig:
    """One run: the model's configuration and everything around it; `streams` is the batch size of each
    process."""

    model: DetectorConfig
    steps: int = 20000
    streams: int = 4
    seed: int = 0
    save_every: int = 500
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)


def make_parser() -> argparse.ArgumentParser:
    """Command line of `python -m training.train`."""
    parser = argparse.ArgumentParser(
        prog="python -m training.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--preset", default="tiny", help=f"model configuration: {', '.join(sorted(PRESETS))}")
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


def resolve(arguments: argparse.Namespace) -> TrainConfig:
    """The run's configuration from the command line."""
    config = TrainConfig(model=preset(arguments.preset))
    named = [
        f"{name}={getattr(arguments, name)}"
        for name in ("steps", "streams", "seed")
        if getattr(arguments, name) is not None
    ]
    return override(config, named + arguments.set)


def make_fabric(arguments: argparse.Namespace) -> Fabric:
    """Fabric for the chosen devices; under torchrun it joins the processes that were started."""
    precision = arguments.precision
    on_gpu = arguments.accelerator in ("auto", "cuda", "gpu") and torch.cuda.is_available()
    if precision == "auto":
        precision = "bf16-mixed" if on_gpu else "32-true"
    devices = os.environ.get("LOCAL_WORLD_SIZE") or arguments.devices
    nodes = int(os.environ.get("WORLD_SIZE", "1")) // max(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)
    return Fabric(
        accelerator=arguments.accelerator, devices=devices, num_nodes=max(nodes, 1), precision=precision
    )


def run(config: TrainConfig, fabric: Fabric, out: Path, init: Path | None) -> Path:
    """Train (or go on training) into `out`; returns the weights file."""
    fabric.seed_everything(config.seed, verbose=False)
    model = build_stream_petr(config.model)
    if init is not None:
        state, _, _ = read_weights(init)
        load_into(model, state, str(init))
    out.mkdir(parents=True, exist_ok=True)
    data = config.data
    clips = SyntheticClips(
        data.first_seed, config.model.image, Path(data.cache), data.duration_s, data.version
    )
    if fabric.is_global_zero:
        clips.render_all(data.scenes)
    fabric.barrier()
    trainer = Trainer(
        fabric, model, config.optim, out, steps=config.steps, seed=config.seed, streams=config.streams
    )
    if (out / "state.pt").exists():
        trainer.resume(out / "state.pt")
        fabric.print(f"resumed at step {trainer.step} of {config.steps}")
    dataset = StreamDataset(
        clips,
        data.scenes,
        num_streams=config.streams,
        segment=data.segment,
        augment=config.augment,
        seed=config.seed,
        first_stream=config.streams * fabric.global_rank,
    )
    trainer.run(dataset, workers=data.workers, save_every=config.save_every)
    return out / "weights.safetensors"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; bad input is one sentence and exit code 2."""
    arguments = make_parser().parse_args(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    try:
        fabric = make_fabric(arguments)
        fabric.launch()
        weights = run(resolve(arguments), fabric, arguments.out, arguments.init)
    except (UserError, FloatingPointError) as error:
        print(f"training: {error}", file=sys.stderr)
        return 2
    fabric.print(f"wrote {weights}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
