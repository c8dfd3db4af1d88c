# SPDX-License-Identifier: Apache-2.0
"""Run by test_distributed.py, alone or under torchrun: the gradients of one step on two streams, one a
process where there are two. `python -m tests.training.distributed_gradients METHOD OUTPUT`"""

import os
import sys
from pathlib import Path

import torch
from lightning_fabric import Fabric
from torch import nn

from ftkd_core.data.clips import Augmentation, collate, make_sample
from ftkd_core.data.windows import collate_windows, make_window
from ftkd_core.distillation.baselines import BaselineConfig
from ftkd_core.distillation.config import FTKDConfig
from ftkd_core.models.stream_petr import build_stream_petr
from tests.core.helpers import make_clip, small_config
from tests.core.test_sparse_bev import small_sparse
from training.lessons import StreamLesson, make_distiller

OBJECTS = (2, 9)  # of the two streams: a mean of means would weigh them alike


def gradients(fabric: Fabric, method: str) -> dict[str, torch.Tensor]:
    """Of every parameter that learns, after the backward pass of one step."""
    torch.manual_seed(1)
    student = build_stream_petr(small_config("loss.denoising_groups=0"))
    config = (
        FTKDConfig(pv_mask_ratio=0.0, bev_mask="none") if method == "ftkd" else BaselineConfig(name=method)
    )
    mine = range(fabric.global_rank, 2, fabric.world_size)
    lesson = StreamLesson(student, len(mine), make_distiller(small_sparse(past=1, future=1), student, config))
    model = fabric.setup(lesson)
    model.train()
    for module in student.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()  # its statistics are each process's own
    clips = {stream: make_clip(seed=stream, objects=OBJECTS[stream]) for stream in mine}
    frames = collate([make_sample(clip, 1, Augmentation(), False) for clip in clips.values()])
    windows = collate_windows([make_window(clip, 1, Augmentation(), 1, 1) for clip in clips.values()])
    torch.manual_seed(2)
    terms, _ = model((frames, windows), lesson.start_state(), torch.Generator().manual_seed(2))
    fabric.backward(torch.stack(list(terms.values())).sum())
    return {name: p.grad for name, p in lesson.named_parameters() if p.grad is not None}


def main() -> None:
    torch.set_num_threads(1)
    fabric = Fabric(accelerator="cpu", devices=int(os.environ.get("WORLD_SIZE", "1")))
    fabric.launch()
    found = gradients(fabric, sys.argv[1])
    if fabric.is_global_zero:
        torch.save(found, Path(sys.argv[2]))


if __name__ == "__main__":
    main()
