# SPDX-License-Identifier: Apache-2.0
"""FFR, future-aware feature reconstruction: masked student features are reconstructed into teacher features
that contain future frames, without strict alignment of frames.

Two branches: perspective view (image feature maps) and BEV (query features). Source: FTKD (arXiv 2512.08247)
[abs, note]; our choices are marked [ours]. All parameters here are discarded after training. Symbols: B
batch, J future frames, N cameras, C channels (s student, t teacher), H/W feature size, Q queries.
"""

from collections.abc import Sequence
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ftkd_core.distillation.config import MASK_RATIO
from ftkd_core.losses.normalizer import shared_count

_COSINE_TEMPERATURE: Final = 0.1


@torch.no_grad()
def future_aware_target(
    current: Tensor, future: Tensor, real: Tensor, mode: str = "mean_residual"
) -> tuple[Tensor, Tensor]:
    """Return the target of the PV branch and its weight (`FTKDConfig.pv_target`).

    `mean_residual`: the teacher's feature plus its attention to future frames, averaged over them; `cosine`:
    the same with normalised queries and keys and a temperature of 0.1, because keys of large norm attract
    most queries otherwise; `current`: the teacher's feature. Attention has no parameters,
    softmax(Q K^T / sqrt(C)) V, between the frames of one camera [ours: a learned one that is trained by this
    loss alone can collapse to a constant].

    Args: current (B, N, C, H, W) and future (B, J, N, C, H, W) teacher features; real (B, J) bool, False for
    frames that repeat the last frame of the scene. Returns the target (B, N, C, H, W) and its weight (B,), 1;
    without future frames the target is the teacher's feature.
    """
    batch, frames = real.shape
    weight = torch.ones(batch, dtype=current.dtype, device=current.device)
    if mode == "current" or frames == 0:
        return current, weight
    query = current.flatten(3).mT.unsqueeze(1)  # (B, 1, N, HW, C)
    value = future.flatten(4).mT  # (B, J, N, HW, C)
    key, scale = value, None
    if mode == "cosine":
        query, key, scale = F.normalize(query, dim=-1), F.normalize(value, dim=-1), 1 / _COSINE_TEMPERATURE
    attended = F.scaled_dot_product_attention(query.expand_as(key), key, value, scale=scale)
    is_real = real.to(attended.dtype)
    total = (attended * is_real[:, :, None, None, None]).sum(1).mT.reshape(current.shape)
    mean = total / is_real.sum(1).clamp(min=1)[:, None, None, None, None]
    return current + mean, weight


class PerspectiveReconstruction(nn.Module):
    """PV-FFR of one feature level: `loss = branch(student, target, weight, generator)`.

    Student maps (B, N, Cs, H, W) lose a share of their cells, all channels at once as in MGD (Yang et al.
    2022); two 3x3 convolutions reconstruct the target (B, N, Ct, H, W) [note]. The loss is the mean squared
    error over all cells; weight (B,) is that of each sample. Errors: ValueError if the maps differ in size.
    """

    def __init__(self, student_channels: int, teacher_channels: int, mask_ratio: float = MASK_RATIO) -> None:
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
        """Return the reconstruction (B, N, Ct, H, W) from masked student maps (B, N, Cs, H, W)."""
        cells = (*student.shape[:2], 1, *student.shape[-2:])
        kept = random_mask(cells, 1 - self.mask_ratio, generator, student)
        rebuilt: Tensor = self.generator((student * kept).flatten(0, 1))
        return torch.unflatten(rebuilt, 0, student.shape[:2])


class QueryReconstruction(nn.Module):
    """BEV-FFR: `loss = branch(student, teacher, teacher_of_student, generator)`.

    Student query features (B, Qs, Cs) lose a share of their channels (MASK_RATIO); a layer
    norm and an FFN reconstruct the features (B, Qt, Ct) of their paired teacher queries [note: an FFN with
    layer norm; ours: the norm first, because a norm at the end fixes the size of the output even if the
    input does not determine it]. teacher_of_student (B, Qs) int64 is the index of the paired teacher query,
    -1 for none. The loss is the mean squared error over all pairs.
    """

    def __init__(self, student_channels: int, teacher_channels: int, mask_ratio: float = MASK_RATIO) -> None:
        super().__init__()
        self.mask_ratio = mask_ratio
        self.generator = nn.Sequential(
            nn.LayerNorm(student_channels),
            nn.Linear(student_channels, 2 * teacher_channels),
            nn.ReLU(),
            nn.Linear(2 * teacher_channels, teacher_channels),
        )

    def forward(
        self, student: Tensor, teacher: Tensor, teacher_of_student: Tensor, generator: torch.Generator
    ) -> Tensor:
        rebuilt = self.rebuild(student, generator)
        is_paired = (teacher_of_student >= 0).float()
        index = teacher_of_student.clamp(min=0)[..., None].expand(-1, -1, teacher.shape[-1])
        target = teacher.detach().float().gather(1, index)
        error = (rebuilt.float() - target).square().mean(-1)  # (B, Qs)
        loss: Tensor = (error * is_paired).sum() / shared_count(is_paired.sum())
        return loss

    def rebuild(self, student: Tensor, generator: torch.Generator) -> Tensor:
        """Return the reconstruction (B, Qs, Ct) from masked student features (B, Qs, Cs)."""
        kept = random_mask(tuple(student.shape), 1 - self.mask_ratio, generator, student)
        rebuilt: Tensor = self.generator(student * kept)
        return rebuilt


def random_mask(shape: Sequence[int], keep: float, generator: torch.Generator, like: Tensor) -> Tensor:
    """Return a random mask with the device and dtype of `like`: 1 with probability `keep`, else 0.

    The generator is on the CPU, so that a step draws the same mask on every device.
    """
    return (torch.rand(tuple(shape), generator=generator) < keep).to(like)
