# SPDX-License-Identifier: Apache-2.0
"""Script of test_distributed.py, run by one process or under torchrun, on two streams in total.

Computes the gradients of one step, two steps of every method, or a run that is killed and resumed:
`python -m tests.training.distributed_gradients METHOD|every_method|killed OUTPUT`
"""

import os
import sys
from pathlib import Path

import torch
from lightning_fabric import Fabric
from torch import nn

from ftkd_core.data.augmentation import Augmentation, AugmentConfig
from ftkd_core.data.clips import StreamDataset, collate, make_sample
from ftkd_core.data.windows import PairedDataset, collate_windows, make_window
from ftkd_core.distillation.baselines import BaselineConfig
from ftkd_core.distillation.config import FTKDConfig
from ftkd_core.distillation.methods import METHODS
from ftkd_core.distillation.reconstruction import PerspectiveReconstruction, QueryReconstruction
from ftkd_core.models.build import build_stream_petr
from tests.core.helpers import make_clip, small_config
from tests.training.helpers import small_teacher
from training.config import OptimConfig
from training.distiller import make_distiller
from training.tasks import StreamingTask
from training.trainer import Trainer

OBJECTS = (2, 9)  # per stream; different numbers detect a mean of per-process means


def gradients(fabric: Fabric, method: str) -> dict[str, torch.Tensor]:
    """Return the gradient of every trained parameter after one backward pass."""
    torch.manual_seed(1)
    student = build_stream_petr(small_config("loss.denoising_groups=0"))
    config = FTKDConfig() if method == "ftkd" else BaselineConfig(name=method)
    own_streams = range(fabric.global_rank, 2, fabric.world_size)
    task = StreamingTask(student, len(own_streams), make_distiller(small_teacher(), student, config))
    for module in task.modules():
        if isinstance(module, PerspectiveReconstruction | QueryReconstruction):
            module.mask_ratio = 0.0  # masks of two processes differ from those of one
    model = fabric.setup(task)
    model.train()
    for module in student.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()  # processes do not share batch statistics
    clips = {stream: make_clip(seed=stream, objects=OBJECTS[stream]) for stream in own_streams}
    frames = collate([make_sample(clip, 1, Augmentation(), False) for clip in clips.values()])
    windows = collate_windows([make_window(clip, 1, Augmentation(), 1, 1) for clip in clips.values()])
    torch.manual_seed(2)
    terms, _ = model((frames, windows), task.start_state(), torch.Generator().manual_seed(2))
    fabric.backward(torch.stack(list(terms.values())).sum())
    return {name: p.grad for name, p in task.named_parameters() if p.grad is not None}


def make_trainer(fabric: Fabric, method: str, out: Path, steps: int) -> Trainer:
    torch.manual_seed(1)
    student = build_stream_petr(small_config("decoder.dropout=0.1"))
    distiller = make_distiller(small_teacher(), student, METHODS[method])
    optim = OptimConfig(lr=2e-3, warmup_steps=2, ema=0.9)
    return Trainer(fabric, StreamingTask(student, 1, distiller), optim, out, steps=steps, seed=3)


def make_data(fabric: Fabric) -> PairedDataset:
    clips = [make_clip(seed=stream, objects=OBJECTS[stream]) for stream in range(2)]
    streams = StreamDataset(
        clips.__getitem__, 2, num_streams=1, segment=4, augment=AugmentConfig(), seed=3,
        first_stream=fabric.global_rank, all_streams=fabric.world_size,
    )  # fmt: skip
    return PairedDataset(streams, 1, 1)


def every_method(fabric: Fabric, folder: Path) -> dict[str, torch.Tensor]:
    """Return the total loss of the second step of every method."""
    totals, data = {}, make_data(fabric)
    for method in METHODS:
        trainer = make_trainer(fabric, method, folder, 2)
        trainer.start_training()
        for step in range(2):  # DDP reports unused parameters of the first step in the second
            terms, _ = trainer.train_step(data[step])
            trainer.step += 1
        totals[method] = torch.stack(list(terms.values())).sum()
    return totals


def killed(fabric: Fabric, folder: Path) -> dict[str, torch.Tensor]:
    """Return the final weights of an uninterrupted run as `whole/...` and of one that was killed and resumed
    as `resumed/...`."""
    data, found = make_data(fabric), {}
    whole = make_trainer(fabric, "stxd", folder / "whole", 5)
    whole.run(data, workers=0, save_every=5)
    interrupted = make_trainer(fabric, "stxd", folder / "killed", 5)
    interrupted.start_training()
    for step in range(4):  # interrupted after step 4; the last checkpoint, of step 3, is within a segment
        interrupted.train_step(data[step])
        interrupted.step += 1
        if interrupted.step == 3:
            interrupted.save()
    fabric.barrier()
    resumed = make_trainer(fabric, "stxd", folder / "killed", 5)
    resumed.resume(folder / "killed" / "state.pt")
    resumed.run(data, workers=0, save_every=5)
    for name, trainer in (("whole", whole), ("resumed", resumed)):
        found |= {f"{name}/{key}": value for key, value in trainer.task.state_dict().items()}
    return found


def main() -> None:
    torch.set_num_threads(1)
    fabric = Fabric(accelerator="cpu", devices=int(os.environ.get("WORLD_SIZE", "1")))
    fabric.launch()
    what, output = sys.argv[1], Path(sys.argv[2])
    tasks = {"every_method": every_method, "killed": killed}
    found = tasks[what](fabric, output.parent) if what in tasks else gradients(fabric, what)
    if fabric.is_global_zero:
        torch.save(found, output)


if __name__ == "__main__":
    main()
