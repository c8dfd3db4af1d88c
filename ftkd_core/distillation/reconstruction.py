# SPDX-License-Identifier: Apache-2.0
"""FFR, future-aware feature reconstruction: masked student features are rebuilt into teacher features that
have already absorbed the future, with no strict frame alignment.

Two branches: perspective view (image feature maps) and BEV (query features). Source: FTKD, method.md
sections 1 and 3 [abs, note]; marked choices are ours. Nothing here lives on after training. Symbols: B batch,
J future frames, N cameras, C channels (s student, t teacher), H/W feature size, Q queries.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ftkd_core.losses.normalizer import shared_count


@torch.no_grad()
def future_aware_target(
    current: Tensor, future: Tensor, real: Tensor, mode: str = "mean_residual"
) -> tuple[Tensor, Tensor]:
    """The PV branch's target: the teacher's feature of a frame, enriched by what it attends to in its future.

    current (B, N, C, H, W) and future (B, J, N, C, H, W) teacher features; real (B, J) bool, False for frames
    that only repeat the scene's last. Mode `current` is the teacher's feature as it is. Attention is
    parameter-free, softmax(Q K^T / sqrt(C)) V, within one camera across time [ours: a learnt one, trained by
    this loss alone, can collapse to a constant]. Returns the target (B, N, C, H, W) and weight (B,): 0 where
    the mode leaves a frame without future nothing to say.
    """
    batch, frames = real.shape
    if mode == "current":
        return current, current.new_ones(batch)
    query = current.flatten(3).mT.unsqueeze(1)  # (B, 1, N, HW, C)
    value = future.flatten(4).mT  # (B, J, N, HW, C)
    if frames == 0:
        seen = torch.zeros_like(current)
        count = current.new_zeros(batch)
    else:
        attended = F.scaled_dot_product_attention(query.expand_as(value), value, value)  # (B, J, N, HW, C)
        weights = real.to(attended.dtype)
        seen = (attended * weights[:, :, None, None, None]).sum(1).mT.reshape(current.shape)
        count = weights.sum(1)
    if mode == "sum":
        return seen, (count > 0).to(current.dtype)
    mean = seen / count.clamp(min=1)[:, None, None, None, None]
    return current + mean, torch.ones(batch, dtype=current.dtype, device=current.device)


class PerspectiveReconstruction(nn.Module):
    """PV-FFR of one feature level: `loss = branch(student, target, weight, generator)`.

    Student maps (B, N, Cs, H, W) lose a share of their cells, all channels at once as in MGD (Yang et al.
    2022), and two 3x3 convolutions rebuild the target (B, N, Ct, H, W) [note]; the loss is the mean squared
    error over all cells.
    """

    def __init__(self, student_channels: int, teacher_channels: int, mask_ratio: float = 0.5) -> None:
        super().__init__()
        self.mask_ratio = mask_ratio
        self.generator = nn.Sequential(
            nn.Conv2d(student_channels, teacher_channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(teacher_channels, teacher_channels, 3, padding=1),
        )

    def forward(self, student: Tensor, target: Tensor, weight: Tensor, generator: torch.Generator) -> Tensor:
        if student.shape[-2:] != target.shape[-2:]:
            raise ValueError(
                f"student maps of {tuple(student.shape[-2:])} cells, teacher maps of "
                f"{tuple(target.shape[-2:])}; expected the same image size and stride"
            )
        rebuilt = self.rebuild(student, generator)
        error = (rebuilt.float() - target.detach().float()).square().mean(dim=(1, 2, 3, 4))
        loss: Tensor = (error * weight).sum() / shared_count(weight.sum())
        return loss

    def rebuild(self, student: Tensor, generator: torch.Generator) -> Tensor:
        """The target as student maps (B, N, Cs, H, W) tell it, masked: (B, N, Ct, H, W)."""
        cells = (*student.shape[:2], 1, *student.shape[-2:])
        kept = random_mask(cells, 1 - self.mask_ratio, generator, student)
        rebuilt: Tensor = self.generator((student * kept).flatten(0, 1))
        return torch.unflatten(rebuilt, 0, student.shape[:2])


class QueryReconstruction(nn.Module):
    """BEV-FFR: `loss = branch(student, teacher, teacher_of_student, generator, weight)`.

    Student query features (B, Qs, Cs) lose channels and, or, whole queries (`FTKDConfig.bev_mask`); an FFN
    with layer norm (`FTKDConfig.bev_norm`) rebuilds the features (B, Qt, Ct) of the teacher queries they are
    aligned with [note].
    teacher_of_student (B, Qs) int64, -1 where a query has no partner; weight (B, Qs), of each pair, 1 without
    it; the loss is the weighted mean of the pairs' mean squared errors.
    """

    def __init__(
        self, student_channels: int, teacher_channels: int, mask_ratio: float = 0.5,
        masking: str = "channel", norm: str = "first",
    ) -> None:  # fmt: skip
        super().__init__()
        self.mask_ratio, self.masking = mask_ratio, masking
        self.generator = nn.Sequential(
            *([nn.LayerNorm(student_channels)] if norm == "first" else []),
            nn.Linear(student_channels, 2 * teacher_channels),
            nn.ReLU(),
            nn.Linear(2 * teacher_channels, teacher_channels),
            *([nn.LayerNorm(teacher_channels)] if norm == "last" else []),
        )

    def forward(
        self, student: Tensor, teacher: Tensor, teacher_of_student: Tensor, generator: torch.Generator,
        weight: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        rebuilt = self.rebuild(student, generator)
        counts = (teacher_of_student >= 0).float()
        if weight is not None:
            counts = counts * weight
        index = teacher_of_student.clamp(min=0)[..., None].expand(-1, -1, teacher.shape[-1])
        target = teacher.detach().float().gather(1, index)
        error = (rebuilt.float() - target).square().mean(-1)  # (B, Qs)
        loss: Tensor = (error * counts).sum() / shared_count(counts.sum())
        return loss

    def rebuild(self, student: Tensor, generator: torch.Generator) -> Tensor:
        """Teacher features (B, Qs, Ct) as student features (B, Qs, Cs) tell them, masked."""
        kept = student.new_ones(1)
        if self.masking in ("channel", "both"):
            kept = kept * random_mask(tuple(student.shape), 1 - self.mask_ratio, generator, student)
        if self.masking in ("query", "both"):
            shape = (*student.shape[:2], 1)
            kept = kept * random_mask(shape, 1 - self.mask_ratio, generator, student)
        rebuilt: Tensor = self.generator(student * kept)
        return rebuilt


def random_mask(shape: Sequence[int], keep: float, generator: torch.Generator, like: Tensor) -> Tensor:
    """Zeros and ones of a shape, on the device and of the type of `like`: each kept with probability `keep`.
    Drawn by a generator of the CPU, so that a step draws the same on every device."""
    return (torch.rand(tuple(shape), generator=generator) < keep).to(like)
