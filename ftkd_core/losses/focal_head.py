# SPDX-License-Identifier: Apache-2.0
"""Losses of StreamPETR's 2-D head; cells are matched one-to-one with the objects of their camera.

Source: exiawsh/StreamPETR (`FocalHead.loss`, `HungarianAssigner2D`; weights of its R50 configurations),
re-implemented. Symbols: B batch, N cameras, P images (B N), L cells (H W), G object slots, K classes.
"""

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ftkd_core.losses.focal import heat_loss, quality_focal_loss
from ftkd_core.losses.matching import focal_cost
from ftkd_core.losses.normalizer import shared_count
from ftkd_core.models.predictions import FocalMaps
from ftkd_core.types import Targets

_CLASS, _BOX, _IOU, _CENTER = 2.0, 5.0, 2.0, 10.0  # weights of costs and terms


def focal_head_losses(maps: FocalMaps, targets: Targets, stride: int) -> dict[str, Tensor]:
    """Return weighted terms of the 2-D head, each divided by the number of visible objects.

    class (quality focal loss, target is the IoU), centerness (heat map without classes), box (L1), iou
    (GIoU), center (L1). An object counts in a camera if `targets.mask_2d` is set. stride of the maps in
    pixels.
    """
    height, width = maps.logits.shape[2:4]
    image = maps.boxes.new_tensor([width, height]) * stride
    target_boxes = (targets.boxes_2d.float() / image.repeat(2)).flatten(0, 1)  # (P, G, 4)
    target_centers = (targets.centers_2d.float() / image).clamp(0.0, 1.0).flatten(0, 1)
    cameras = maps.logits.shape[1]
    labels = targets.labels.repeat_interleave(cameras, dim=0)  # (P, G)
    visible = targets.mask_2d.flatten(0, 1)
    logits, boxes, centers = (
        value.flatten(2, 3).flatten(0, 1) for value in (maps.logits, maps.boxes, maps.centers)
    )  # (P, L, .)
    assigned = match_cells(logits, boxes, centers, labels, target_boxes, target_centers, visible)
    count = shared_count(visible.sum())

    place, cell = (assigned >= 0).nonzero(as_tuple=True)
    slot = assigned[place, cell]
    predicted, target = boxes[place, cell], target_boxes[place, slot]
    overlap, generalised = box_overlaps(predicted, target)
    quality = torch.zeros_like(logits)
    quality[place, cell, labels[place, slot]] = overlap.detach()
    heat = heat_targets(target_boxes, target_centers, visible, (height, width)).view_as(maps.centerness)
    return {
        "auxiliary/class": _CLASS * quality_focal_loss(logits, quality).sum() / count,
        "auxiliary/centerness": heat_loss(maps.centerness, heat) / count,
        "auxiliary/box": _BOX * (center_form(predicted) - center_form(target)).abs().sum() / count,
        "auxiliary/iou": _IOU * (1 - generalised).sum() / count,
        "auxiliary/center": _CENTER
        * (centers[place, cell] - target_centers[place, slot]).abs().sum()
        / count,
    }


@torch.no_grad()
def match_cells(
    logits: Tensor, boxes: Tensor, centers: Tensor, labels: Tensor, target_boxes: Tensor,
    target_centers: Tensor, visible: Tensor,
) -> Tensor:  # fmt: skip
    """Return the index (P, L) int64 of the object matched to each cell, -1 for none.

    logits (P, L, K), boxes (P, L, 4) and centers (P, L, 2) in 0..1; labels (P, G), target_boxes (P, G, 4),
    target_centers (P, G, 2), visible (P, G) bool. Raises FloatingPointError if a cost is not finite.
    """
    assigned = torch.full(logits.shape[:2], -1, dtype=torch.long)
    for image in range(len(logits)):
        objects = visible[image].nonzero()[:, 0]
        if len(objects) == 0:
            continue
        target = target_boxes[image, objects]
        cost = _CLASS * focal_cost(logits[image], labels[image, objects])
        cost = cost + _BOX * torch.cdist(center_form(boxes[image]), center_form(target), p=1)
        cost = cost - _IOU * box_overlaps(boxes[image, :, None], target[None])[1]
        cost = cost + _CENTER * torch.cdist(centers[image], target_centers[image, objects], p=1)
        if not torch.isfinite(cost).all():
            raise FloatingPointError(
                "2-D head: the cost is not finite because predictions or targets contain nan or inf"
            )
        rows, columns = linear_sum_assignment(cost.cpu().numpy())
        assigned[image, torch.as_tensor(rows)] = objects.cpu()[torch.as_tensor(columns)]
    return assigned.to(logits.device)


def center_form(boxes: Tensor) -> Tensor:
    """Convert boxes (..., 4) from `[x1, y1, x2, y2]` to `[centre x, centre y, width, height]`."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return torch.cat([(low + high) / 2, high - low], dim=-1)


def box_overlaps(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Return IoU and generalised IoU (Rezatofighi et al. 2019), each (...), of boxes (..., 4) `[x1, y1, x2,
    y2]` that broadcast."""
    low = torch.maximum(first[..., :2], second[..., :2])
    high = torch.minimum(first[..., 2:], second[..., 2:])
    hull_size = torch.maximum(first[..., 2:], second[..., 2:]) - torch.minimum(
        first[..., :2], second[..., :2]
    )
    intersection = (high - low).clamp(min=0).prod(-1)
    union = _area(first) + _area(second) - intersection
    overlap = intersection / union.clamp(min=1e-6)
    hull = hull_size.prod(-1)
    return overlap, overlap - (hull - union) / hull.clamp(min=1e-6)


def _area(boxes: Tensor) -> Tensor:
    return (boxes[..., 2:] - boxes[..., :2]).prod(-1)


def heat_targets(boxes: Tensor, centers: Tensor, visible: Tensor, size: tuple[int, int]) -> Tensor:
    """Return heat maps (P, H, W): 1 in the cell of each visible object's centre, around it a Gaussian that
    ends at the nearest edge of the box; the maximum over objects.

    boxes (P, G, 4) and centers (P, G, 2) in 0..1, visible (P, G), size (H, W).
    """
    height, width = size
    scale = boxes.new_tensor([width, height])
    edges = torch.cat([centers - boxes[..., :2], boxes[..., 2:] - centers], dim=-1) * scale.repeat(2)
    radius = edges.amin(-1).ceil().clamp(min=1.0)[..., None, None]  # (P, G, 1, 1) in cells
    middle = (centers * scale).floor()[..., None, None]
    x = torch.arange(width, device=boxes.device) - middle[..., 0, :, :]  # (P, G, 1, W)
    y = torch.arange(height, device=boxes.device)[:, None] - middle[..., 1, :, :]  # (P, G, H, 1)
    bumps = torch.exp(-(x**2 + y**2) / (2 * ((2 * radius + 1) / 6) ** 2))
    bumps = bumps * (x.abs() <= radius) * (y.abs() <= radius) * visible[..., None, None]
    return F.pad(bumps, (0, 0, 0, 0, 0, 1)).amax(1)  # one extra slot, for frames without slots
