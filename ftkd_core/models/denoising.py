# SPDX-License-Identifier: Apache-2.0
"""Denoising queries for training (DN-DETR, Li et al. 2022; the noise is that of StreamPETR's code).

Symbols: B batch, G ground-truth slots, R denoising queries = groups * G, Q other queries, M memory slots.
"""

import torch
from torch import Tensor

from ftkd_core.boxes import encode_boxes
from ftkd_core.classes import CLASS_NAMES
from ftkd_core.config import LossConfig
from ftkd_core.noise_scale import STREAM_PETR_NOISE, NoiseScale
from ftkd_core.types import DenoisingQueries, Targets

_LABEL_NOISE = 0.5  # fraction of labels replaced by random ones (SparseBEV code)


def make_denoising(
    targets: Targets, loss: LossConfig, range_m: Tensor, generator: torch.Generator,
    scale: NoiseScale = STREAM_PETR_NOISE,
) -> DenoisingQueries | None:  # fmt: skip
    """Return noisy copies of the ground truth; None without ground truth or without groups."""
    batch, slots = targets.labels.shape
    groups = loss.denoising_groups
    if slots == 0 or groups == 0:
        return None
    device = targets.boxes.device
    repeated = targets.boxes.repeat(1, groups, 1)  # (B, R, 9)
    noise = torch.rand(batch, groups * slots, 3, generator=generator).to(device) * 2 - 1
    points = repeated[..., :3] + noise * repeated[..., 3:6] / 2 * scale.centre
    points = points.clamp(-range_m, range_m)
    index = torch.arange(slots, device=device).repeat(groups)[None].expand(batch, -1)
    real = targets.mask.repeat(1, groups)
    positive = real & (noise.norm(dim=-1) <= scale.positive)
    drawn = torch.randint(len(CLASS_NAMES), real.shape, generator=generator).to(device)
    redrawn = (torch.rand(real.shape, generator=generator) < _LABEL_NOISE).to(device)
    labels = torch.where(redrawn, drawn, targets.labels.repeat(1, groups))
    codes = encode_boxes(repeated).nan_to_num()
    return DenoisingQueries(points, index, positive, real, groups, codes, labels)


def attention_mask(denoising: DenoisingQueries, num_queries: int, num_memory: int) -> Tensor:
    """Return the self-attention mask (R + Q, R + Q + M), True if allowed.

    A denoising group attends to itself, to other queries and to memory; no other query attends to a group.
    """
    count = denoising.points_ego.shape[1]
    group = torch.arange(count, device=denoising.points_ego.device) // (count // denoising.groups)
    allowed = torch.ones(
        count + num_queries, count + num_queries + num_memory, dtype=torch.bool, device=group.device
    )
    allowed[count:, :count] = False
    allowed[:count, :count] = group[:, None] == group[None]
    return allowed
