# SPDX-License-Identifier: Apache-2.0
"""Small tasks, trainers, data sets and command lines for the training tests."""

from dataclasses import replace
from pathlib import Path

import torch
from lightning_fabric import Fabric

from ftkd_core.data.augmentation import AugmentConfig
from ftkd_core.data.clips import Clip, StreamDataset
from ftkd_core.data.windows import PairedDataset, WindowDataset
from ftkd_core.distillation.methods import method_config
from ftkd_core.models.build import build_stream_petr
from ftkd_core.models.sparse_bev import SparseBEV
from tests.core.helpers import NO_AUGMENTATION, make_clip, small_config, small_sparse
from training import train
from training.config import OptimConfig
from training.distiller import Distiller, make_distiller
from training.tasks import StreamingTask, WindowTask
from training.trainer import Trainer

Task = StreamingTask | WindowTask


class NoiseClips:
    """A clip source of short noise clips, with the cache folder of a synthetic one."""

    def __init__(self, cache: Path = Path(), name: str = "noise") -> None:
        self.cache, self.name = cache, name

    def __call__(self, index: int) -> Clip:
        return make_clip(seed=index)

    def render_all(self, count: int) -> None:
        """Do nothing: noise needs no rendering."""


def cpu_fabric() -> Fabric:
    """Return Fabric for one CPU process."""
    return Fabric(accelerator="cpu", devices=1)


def small_teacher() -> SparseBEV:
    """Return a teacher with one past and one future frame."""
    return small_sparse(past=1, future=1)


def streaming_task(method: str = "ftkd", **settings: object) -> StreamingTask:
    """Return the task of a streaming student; without a teacher if the method is empty."""
    torch.manual_seed(1)
    student = build_stream_petr(small_config())
    if not method:
        return StreamingTask(student, 2)
    config = replace(method_config(method), **settings)  # type: ignore[arg-type]
    return StreamingTask(student, 2, make_distiller(small_teacher(), student, config))


def window_task(method: str = "ftkd", **settings: object) -> WindowTask:
    """Return the task of a window student; without a teacher if the method is empty."""
    student = small_sparse(past=1)
    if not method:
        return WindowTask(student)
    config = replace(method_config(method), **settings)  # type: ignore[arg-type]
    return WindowTask(student, make_distiller(small_teacher(), student, config))


def distiller_of(task: Task) -> Distiller:
    """Return the distiller of a task that has one."""
    assert task.distiller is not None
    return task.distiller


def stream_data(augment: AugmentConfig = NO_AUGMENTATION) -> StreamDataset:
    """Return frames of two streams of noise."""
    clips = [make_clip(seed=seed) for seed in range(2)]
    return StreamDataset(clips.__getitem__, 2, num_streams=2, segment=3, augment=augment, seed=3)


def paired_data(augment: AugmentConfig = NO_AUGMENTATION) -> PairedDataset:
    """Return the same frames with the windows of `small_teacher`."""
    return PairedDataset(stream_data(augment), 1, 1)


def window_data(future: int = 1) -> WindowDataset:
    """Return windows of noise with one past frame."""
    clips = [make_clip(seed=seed) for seed in range(2)]
    return WindowDataset(
        clips.__getitem__, 2, batch=2, num_past=1, num_future=future, augment=NO_AUGMENTATION, seed=3
    )


def make_trainer(out: Path, task: Task, steps: int, autocast: torch.dtype | None = None) -> Trainer:
    """Return a trainer of a task on the CPU."""
    out.mkdir(exist_ok=True)
    optim = OptimConfig(lr=2e-3, warmup_steps=2, ema=0.9)
    return Trainer(cpu_fabric(), task, optim, out, steps=steps, seed=3, autocast=autocast)


STREAM_OPTIM = OptimConfig(lr=1e-3, warmup_steps=2, ema=0.9)


def stream_trainer(out: Path, steps: int, *settings: str, optim: OptimConfig = STREAM_OPTIM) -> Trainer:
    """Return a trainer of a small StreamPETR with dropout, without a teacher."""
    fabric = cpu_fabric()
    fabric.seed_everything(3, verbose=False)
    model = build_stream_petr(small_config("decoder.dropout=0.1", *settings))
    out.mkdir(exist_ok=True)
    return Trainer(fabric, StreamingTask(model, 2), optim, out, steps=steps, seed=3)


def loss_history(trainer: Trainer, data: PairedDataset | WindowDataset, steps: int) -> dict[str, list[float]]:
    """Train some steps and return every loss term of each step."""
    trainer.model.train()
    history: dict[str, list[float]] = {}
    for step in range(steps):
        terms, _ = trainer.train_step(data[step])
        trainer.step += 1
        for name, value in terms.items():
            history.setdefault(name, []).append(float(value))
    return history


def small_arguments(out: Path, steps: int, *settings: str) -> list[str]:
    """Return arguments of `training.train` or `training.distill` for a small `tiny` on one short scene."""
    overrides = [
        f"steps={steps}", "streams=1", "data.scenes=1", "data.duration_s=3.0", "data.workers=0",
        f"data.cache={out.parent / 'clips'}", "save_every=1", "model.image.width=96", "model.image.height=32",
        "model.backbone.base_channels=8", "model.decoder.num_image_queries=24", *settings,
    ]  # fmt: skip
    return ["--out", str(out), "--accelerator", "cpu", *(f"--set={override}" for override in overrides)]


def train_small(out: Path, steps: int, *settings: str, more: tuple[str, ...] = ()) -> int:
    """Run `training.train` with `small_arguments` and return its exit code."""
    return train.main([*small_arguments(out, steps, *settings), *more])
