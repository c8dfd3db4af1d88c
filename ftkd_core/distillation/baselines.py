# SPDX-License-Identifier: Apache-2.0
"""Baseline distillation methods with FTKD's interface: the same frozen teacher, student and batches.

MGD and CWD distill image features, STXD their similarity from frame to frame. (Distillation of logits alone,
as in DETRDistill, is FTKD without its other parts: methods.py.) Losses here are means, so that they do not
depend on the image size. The weights of the sources do not apply, because they belong to other normalizers:
MGD 2e-5 on the sum over all elements of an image (yzd-v/MGD), CWD 50 for feature maps as quoted by others;
none is public for STXD. Set `weight`, or let training/study/balance.py scale every method to the same share
of the detection loss.

Symbols: B batch, N cameras, C channels (s student, t teacher), H/W feature size, L = H * W cells.
"""

from collections.abc import Mapping
from typing import Final, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ftkd_core.config_class import NotNegative, config_class
from ftkd_core.distillation.reconstruction import PerspectiveReconstruction
from ftkd_core.distillation.teacher_output import PreviousMaps, TeacherOutput
from ftkd_core.losses.normalizer import shared_count
from ftkd_core.models.predictions import Predictions
from ftkd_core.types import Targets

MGD_MASK_RATIO: Final = 0.65
"""Share of cells that MGD masks [code]."""
CWD_TEMPERATURE: Final = 4.0
"""Temperature of CWD's softmax [code]."""


@config_class
class BaselineConfig:
    """Settings of a baseline method."""

    name: Literal["mgd", "cwd", "stxd"]
    """`mgd`: masked generative distillation, Yang et al. 2022. `cwd`: channel-wise distributions, Shu et al.
    2021. `stxd`: temporal similarity, after Jang et al. 2023."""
    weight: NotNegative = 1.0
    """Factor of the loss."""


class Baseline(nn.Module):
    """A baseline method: `terms = baseline(student, student_maps, output, targets, generator, previous)`.

    Arguments as in `FTKD`. Returns one weighted scalar per stride, named `mgd/16` and so on. map_channels is
    {stride: (student, teacher)}, the channels of the feature maps. The adapters between them are trained with
    the student and discarded afterwards.
    """

    map_target = "current"

    def __init__(self, config: BaselineConfig, map_channels: Mapping[int, tuple[int, int]]) -> None:
        super().__init__()
        self.config = config
        self.strides = tuple(map_channels)
        self.needs_previous = config.name == "stxd"
        self.adapters = nn.ModuleDict(
            {str(stride): self._adapter(*channels) for stride, channels in map_channels.items()}
        )

    def _adapter(self, student_channels: int, teacher_channels: int) -> nn.Module:
        match self.config.name:
            case "mgd":
                return PerspectiveReconstruction(student_channels, teacher_channels, MGD_MASK_RATIO)
            case "cwd":
                return nn.Conv2d(student_channels, teacher_channels, 1)
        return nn.Identity()  # similarities have no channels

    def forward(
        self,
        student: Predictions,
        student_maps: Mapping[int, Tensor],
        output: TeacherOutput,
        targets: Targets,
        generator: torch.Generator,
        previous: PreviousMaps | None = None,
    ) -> dict[str, Tensor]:
        terms = {}
        for stride in self.strides:
            adapter = self.adapters[str(stride)]
            student_map, teacher_map = student_maps[stride], output.targets[stride]
            if self.config.name == "mgd":
                loss: Tensor = adapter(student_map, teacher_map, output.target_weights[stride], generator)
            elif self.config.name == "cwd":
                adapted = adapter(student_map.flatten(0, 1)).unflatten(0, student_map.shape[:2])
                loss = channel_wise_loss(adapted, teacher_map, CWD_TEMPERATURE)
            else:
                if previous is None or output.previous is None:
                    raise ValueError("STXD compares two frames; expected the previous maps of both models")
                loss = relation_loss(
                    student_map, previous.maps[stride], teacher_map, output.previous.maps[stride],
                    previous.known * output.previous.known,
                )  # fmt: skip
            terms[f"{self.config.name}/{stride}"] = self.config.weight * loss
        return terms


def channel_wise_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return CWD's loss for maps (B, N, C, H, W).

    Kullback-Leibler divergence of the softmax over the cells of each channel, teacher to student, times the
    squared temperature, averaged over images and channels [code].
    """
    student_log = (student.float().flatten(3) / temperature).log_softmax(-1)
    teacher_log = (teacher.detach().float().flatten(3) / temperature).log_softmax(-1)
    divergence = F.kl_div(student_log, teacher_log, reduction="none", log_target=True).sum(-1)
    return divergence.mean() * temperature**2


def relation_loss(
    student: Tensor, student_before: Tensor, teacher: Tensor, teacher_before: Tensor, known: Tensor
) -> Tensor:
    """Return STXD's temporal loss: mean squared difference of the similarities of student and teacher.

    A similarity is the cosine of a cell and a cell of the previous frame of the same camera, (B, N, L, L).
    Maps are (B, N, C, H, W) of a frame and its previous frame; known (B,) is 0 without a previous frame.
    Source: STXD, whose abstract names similarity maps over a sequence of frames; the distance and the pairs
    of consecutive frames are [ours].
    """
    student_relations = similarity(student.float(), student_before.detach().float())
    teacher_relations = similarity(teacher.detach().float(), teacher_before.detach().float())
    error = (student_relations - teacher_relations).square().mean(dim=(1, 2, 3))
    return (error * known).sum() / shared_count(known.sum())


def similarity(now: Tensor, before: Tensor) -> Tensor:
    """Return the cosine similarity (B, N, L, L) of the cells of two maps (B, N, C, H, W)."""
    now, before = (F.normalize(maps.flatten(3), dim=2) for maps in (now, before))
    return now.mT @ before
