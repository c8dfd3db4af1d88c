# SPDX-License-Identifier: Apache-2.0
"""Competing distillation methods on FTKD's footing: the same frozen teacher, student, batches and interface.

MGD and CWD learn the teacher's image features, STXD how they relate from frame to frame. (Distilling logits
alone, as DETRDistill does, is FTKD with its other parts left out: see methods.py.) Losses here are means, so
that they do not change with the size of the image. The sources' weights belong to their normalisers and are
not carried over: MGD 2e-5 on the sum over all elements of an image (yzd-v/MGD), CWD 50 for feature maps, as
others quote it; of STXD and of DETRDistill's logits none was found that is public. Set `weight`, or
let training/study/balance.py bring every method to the same share of the detection loss. Symbols: B batch, N
cameras, C channels (s student, t teacher), H/W feature size, L = H * W cells.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ftkd_core.distillation.reconstruction import PerspectiveReconstruction
from ftkd_core.distillation.teacher_output import PreviousMaps, TeacherAnswer
from ftkd_core.errors import UserError
from ftkd_core.losses.normalizer import shared_count
from ftkd_core.models.predictions import Predictions
from ftkd_core.types import Targets

_NAMES: Final = ("mgd", "cwd", "stxd")


@dataclass(frozen=True, kw_only=True)
class BaselineConfig:
    """A competing method and its settings.

    name: `mgd` (Yang et al. 2022: masked generative distillation), `cwd` (Shu et al. 2021: channel-wise
    distributions) or `stxd` (after Jang et al. 2023: temporal relations). weight multiplies the loss.
    mask_ratio: share of cells MGD hides, 0.65 in the authors' code. temperature: of CWD's softmax, 4 in the
    authors' command.
    """

    name: str
    weight: float = 1.0
    mask_ratio: float = 0.65
    temperature: float = 4.0

    def __post_init__(self) -> None:
        if self.name not in _NAMES:
            raise UserError(f"distillation method {self.name!r}: expected one of {', '.join(_NAMES)}")
        if not 0 <= self.weight < float("inf"):
            raise UserError(f"distillation weight {self.weight}: expected a number of at least 0")
        if not 0 <= self.mask_ratio < 1:
            raise UserError(f"distillation mask_ratio {self.mask_ratio}: expected 0 up to, not including, 1")
        if not 0 < self.temperature < float("inf"):
            raise UserError(f"distillation temperature {self.temperature}: expected a number above 0")


class Baseline(nn.Module):
    """`terms = baseline(student, student_maps, answer, targets, generator, previous)`, as `FTKD`: one
    weighted scalar a stride, named `mgd/16` and so on.

    map_channels {stride: (student, teacher)} are the widths of the feature maps; what adapts one to the other
    lives here and is thrown away after training.
    """

    map_target = map_frames = "current"

    def __init__(self, config: BaselineConfig, map_channels: Mapping[int, tuple[int, int]]) -> None:
        super().__init__()
        self.config = config
        self.strides = tuple(map_channels)
        self.needs_previous = config.name == "stxd"
        self.adapters = nn.ModuleDict(
            {str(stride): self._adapter(*channels) for stride, channels in map_channels.items()}
        )

    def _adapter(self, mine: int, yours: int) -> nn.Module:
        if self.config.name == "mgd":
            return PerspectiveReconstruction(mine, yours, self.config.mask_ratio)
        if self.config.name == "cwd":
            return nn.Conv2d(mine, yours, 1)
        return nn.Identity()  # relations have no width

    def forward(
        self,
        student: Predictions,
        student_maps: Mapping[int, Tensor],
        answer: TeacherAnswer,
        targets: Targets,
        generator: torch.Generator,
        previous: PreviousMaps | None = None,
    ) -> dict[str, Tensor]:
        terms = {}
        for stride in self.strides:
            adapter = self.adapters[str(stride)]
            mine, yours = student_maps[stride], answer.targets[stride]
            if self.config.name == "mgd":
                loss: Tensor = adapter(mine, yours, answer.target_weights[stride], generator)
            elif self.config.name == "cwd":
                adapted = adapter(mine.flatten(0, 1)).unflatten(0, mine.shape[:2])
                loss = channel_wise_loss(adapted, yours, self.config.temperature)
            else:
                if previous is None or answer.previous is None:
                    raise ValueError("STXD relates a frame to the one before; expected the maps of both")
                loss = relation_loss(
                    mine, previous.maps[stride], yours, answer.previous.maps[stride],
                    previous.known * answer.previous.known,
                )  # fmt: skip
            terms[f"{self.config.name}/{stride}"] = self.config.weight * loss
        return terms


def channel_wise_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """CWD: Kullback-Leibler divergence of the softmax over the cells of each channel, teacher to student,
    times the squared temperature, averaged over images and channels (as the authors' code). Maps (B, N, C, H,
    W)."""
    mine = (student.float().flatten(3) / temperature).log_softmax(-1)
    yours = (teacher.detach().float().flatten(3) / temperature).log_softmax(-1)
    divergence = F.kl_div(mine, yours, reduction="none", log_target=True).sum(-1)
    return divergence.mean() * temperature**2


def relation_loss(
    student: Tensor, student_before: Tensor, teacher: Tensor, teacher_before: Tensor, known: Tensor
) -> Tensor:
    """Mean squared difference of how student and teacher relate a frame to the one before: cosine similarity
    of every cell with every cell of the same camera, (B, N, L, L).

    Source: the temporal part of STXD, whose abstract names similarity maps over a sequence of frames; the
    distance and the pairing of neighbouring frames are ours. Maps (B, N, C, H, W) of the frame and the one
    before, known (B,) 0 where there is none.
    """
    mine = similarity(student.float(), student_before.detach().float())
    yours = similarity(teacher.detach().float(), teacher_before.detach().float())
    error = (mine - yours).square().mean(dim=(1, 2, 3))
    return (error * known).sum() / shared_count(known.sum())


def similarity(now: Tensor, before: Tensor) -> Tensor:
    """Cosine similarity (B, N, L, L) of the cells of two maps (B, N, C, H, W)."""
    now, before = (F.normalize(maps.flatten(3), dim=2) for maps in (now, before))
    return now.mT @ before
