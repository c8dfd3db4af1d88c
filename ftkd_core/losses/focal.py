# SPDX-License-Identifier: Apache-2.0
"""Focal losses: of classes, of soft quality targets, and of heat maps."""

import torch.nn.functional as F
from torch import Tensor


def sigmoid_focal_loss(logits: Tensor, targets: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Return the elementwise focal loss (Lin et al. 2017) of logits against targets in {0, 1} of the same
    shape."""
    probability = logits.sigmoid()
    error = probability * (1 - targets) + (1 - probability) * targets
    weight = (alpha * targets + (1 - alpha) * (1 - targets)) * error**gamma
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="none") * weight


def quality_focal_loss(logits: Tensor, quality: Tensor, beta: float = 2.0) -> Tensor:
    """Return the elementwise quality focal loss (Li et al. 2020) of logits against soft targets in 0..1."""
    error = (logits.sigmoid() - quality).abs() ** beta
    return error * F.binary_cross_entropy_with_logits(logits, quality, reduction="none")


def heat_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Return the sum of CenterNet's penalty-reduced focal loss (Zhou et al. 2019; alpha 2, beta 4) of heat
    maps, whose targets are 1 at an object and decrease around it."""
    probability = logits.sigmoid()
    positive = F.logsigmoid(logits) * (1 - probability) ** 2 * (target > 0.999)
    negative = F.logsigmoid(-logits) * probability**2 * (1 - target) ** 4
    return -(positive + negative * (target <= 0.999)).sum()
