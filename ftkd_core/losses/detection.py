# SPDX-License-Identifier: Apache-2.0
"""Detection losses: what every decoder layer, the denoising queries and the 2-D head answer for.

Criteria return a dict of *weighted* terms; their sum is the loss. Source: StreamPETR (method.md section 4)
for the 3-D part; the dense 2-D part is ours (auxiliary2d.py). Symbols: B batch, N cameras, Q queries, G
slots, K classes, Y layers.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ftkd_core.boxes import encode_boxes
from ftkd_core.config import DetectorConfig
from ftkd_core.losses.matching import match
from ftkd_core.models.auxiliary2d import REFERENCE_FOCAL_PX, AuxiliaryMaps
from ftkd_core.models.denoising import DenoisingQueries
from ftkd_core.models.stream_petr import Predictions
from ftkd_core.types import CameraRig, Targets, pad_targets


def sigmoid_focal_loss(logits: Tensor, targets: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Elementwise focal loss (Lin et al. 2017) of logits against targets in {0, 1} of the same shape."""
    probability = logits.sigmoid()
    wrong = probability * (1 - targets) + (1 - probability) * targets
    weight = (alpha * targets + (1 - alpha) * (1 - targets)) * wrong**gamma
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="none") * weight


class DetectionCriterion(nn.Module):
    """`terms = criterion(predictions, targets, rig, denoising)`: a dict of weighted scalars."""

    code_weights: Tensor

    def __init__(self, config: DetectorConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("code_weights", torch.tensor(config.loss.code_weights), persistent=False)

    def forward(
        self,
        predictions: Predictions,
        targets: Targets,
        rig: CameraRig,
        denoising: DenoisingQueries | None = None,
    ) -> dict[str, Tensor]:
        loss = self.config.loss
        if targets.labels.shape[1] == 0:
            targets = pad_targets(targets, 1)
        terms: dict[str, Tensor] = {}
        layers = range(len(predictions.logits))
        for layer in layers:
            logits, codes = predictions.logits[layer].float(), predictions.codes[layer].float()
            assigned = match(logits, codes, targets, loss.classification, loss.box_l1)
            terms |= self._layer(f"layer{layer}", logits, codes, assigned, targets, None, 1.0)
        if denoising is not None and predictions.denoising_logits is not None:
            assert predictions.denoising_codes is not None
            assigned = torch.where(denoising.positive, denoising.target, -1)
            for layer in layers:
                logits, codes = (
                    predictions.denoising_logits[layer].float(),
                    predictions.denoising_codes[layer].float(),
                )
                name = f"denoising{layer}"
                terms |= self._layer(name, logits, codes, assigned, targets, denoising.real, loss.denoising)
        if predictions.auxiliary is not None:
            stride = self.config.backbone.auxiliary_stride
            auxiliary = auxiliary_losses(predictions.auxiliary, targets, rig, stride)
            terms |= {name: loss.auxiliary * value for name, value in auxiliary.items()}
        return terms

    def _layer(
        self,
        name: str,
        logits: Tensor,
        codes: Tensor,
        assigned: Tensor,
        targets: Targets,
        real: Tensor | None,
        weight: float,
    ) -> dict[str, Tensor]:
        """Classification and box terms of one layer: logits (B, Q, K), codes (B, Q, 10), assigned (B, Q),
        real (B, Q)."""
        positive = assigned >= 0
        count = positive.sum().clamp(min=1)
        index = assigned.clamp(min=0)
        labels = targets.labels.gather(1, index)
        one_hot = F.one_hot(labels, logits.shape[-1]).to(logits.dtype) * positive[..., None]
        classification = sigmoid_focal_loss(logits, one_hot)
        if real is not None:
            classification = classification * real[..., None]
        goal = encode_boxes(targets.boxes.float().gather(1, index[..., None].expand(-1, -1, 9)))
        known = torch.isfinite(goal) & positive[..., None]  # velocity may be unknown
        difference = (codes - torch.where(known, goal, codes.detach())).abs() * self.code_weights
        loss = self.config.loss
        return {
            f"{name}/class": weight * loss.classification * classification.sum() / count,
            f"{name}/box": weight * loss.box_l1 * difference.sum() / count,
        }


def auxiliary_losses(maps: AuxiliaryMaps, targets: Targets, rig: CameraRig, stride: int) -> dict[str, Tensor]:
    """Terms of the 2-D head: penalty-reduced focal loss on the heat map (CenterNet), L1 at the centres'
    cells.

    An object counts in a camera where `targets.mask_2d` says so and its projected 3-D centre lies in the
    image.
    """
    height, width = maps.heat.shape[-2:]
    cells = targets.centers_2d / stride - 0.5  # (B, N, G, 2) in cell centres
    column, row = cells[..., 0].round().long(), cells[..., 1].round().long()
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    batch, camera, slot = (targets.mask_2d & inside).nonzero(as_tuple=True)  # (P,) objects seen
    count = max(len(batch), 1)
    heat = _heat_targets(maps.heat, targets, (batch, camera, slot), cells, stride)
    terms = {"auxiliary/heat": _heat_loss(maps.heat.float(), heat) / count}

    column, row = column[batch, camera, slot], row[batch, camera, slot]
    center = cells[batch, camera, slot]  # (P, 2)
    box = targets.boxes_2d[batch, camera, slot] / stride - 0.5
    cell = torch.stack([column, row], dim=-1).to(center.dtype)
    edges_goal = torch.cat([cell - box[:, :2], box[:, 2:] - cell], dim=-1)
    focal = rig.intrinsics[batch, camera, 0, 0].float()
    depth_goal = (targets.depths[batch, camera, slot].clamp(min=0.5) * REFERENCE_FOCAL_PX / focal).log()
    edges = maps.edges[batch, camera, :, row, column].float()
    offset = maps.offset[batch, camera, :, row, column].float()
    log_depth = maps.log_depth[batch, camera, 0, row, column].float()
    terms["auxiliary/edges"] = 0.05 * (edges - edges_goal).abs().sum() / count
    terms["auxiliary/offset"] = 0.5 * (offset - (center - cell)).abs().sum() / count
    terms["auxiliary/depth"] = 2.0 * (log_depth - depth_goal).abs().sum() / count
    return terms


def _heat_targets(
    heat: Tensor, targets: Targets, seen: tuple[Tensor, Tensor, Tensor], cells: Tensor, stride: int
) -> Tensor:
    """Heat map (B, N, K, H, W): 1 at each centre's cell, a Gaussian as wide as a sixth of the box around
    it."""
    batch, camera, slot = seen
    batches, cameras, classes, height, width = heat.shape
    size = (targets.boxes_2d[batch, camera, slot, 2:] - targets.boxes_2d[batch, camera, slot, :2]) / stride
    sigma = (size / 6).clamp(min=0.4)  # (P, 2) in cells
    center = cells[batch, camera, slot].round()
    x = torch.arange(width, device=heat.device)[None] - center[:, :1]  # (P, W)
    y = torch.arange(height, device=heat.device)[None] - center[:, 1:]  # (P, H)
    bumps = (
        torch.exp(-(y**2) / (2 * sigma[:, 1:] ** 2))[:, :, None]
        * torch.exp(-(x**2) / (2 * sigma[:, :1] ** 2))[:, None]
    )
    plane = (batch * cameras + camera) * classes + targets.labels[batch, slot]  # (P,)
    goal = torch.zeros(batches * cameras * classes, height * width, device=heat.device)
    goal.scatter_reduce_(0, plane[:, None].expand(-1, height * width), bumps.flatten(1).float(), "amax")
    return goal.view(batches, cameras, classes, height, width)


def _heat_loss(logits: Tensor, goal: Tensor) -> Tensor:
    """Sum of CenterNet's penalty-reduced focal loss (alpha 2, beta 4)."""
    probability = logits.sigmoid()
    positive = F.logsigmoid(logits) * (1 - probability) ** 2 * (goal > 0.999)
    negative = F.logsigmoid(-logits) * probability**2 * (1 - goal) ** 4
    return -(positive + negative * (goal <= 0.999)).sum()
