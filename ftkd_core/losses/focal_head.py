# SPDX-License-Identifier: Apache-2.0
"""Losses of StreamPETR's 2-D head: each camera's cells are matched with its objects, one to one.

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

_CLASS, _BOX, _IOU, _CENTER = 2.0, 5.0, 2.0, 10.0  # of costs and of terms


def focal_head_losses(maps: FocalMaps, targets: Targets, stride: int) -> dict[str, Tensor]:
    """Weighted terms of the 2-D head, each divided by the number of objects seen: class (quality focal loss
    towards the overlap reached), centerness (of heat maps without classes), box (L1), iou (GIoU), center
    (L1).

    An object counts in a camera where `targets.mask_2d` says so. stride, of the maps, in pixels.
    """
    height, width = maps.logits.shape[2:4]
    image = maps.boxes.new_tensor([width, height]) * stride
    goal_boxes = (targets.boxes_2d.float() / image.repeat(2)).flatten(0, 1)  # (P, G, 4)
    goal_centers = (targets.centers_2d.float() / image).clamp(0.0, 1.0).flatten(0, 1)
    cameras = maps.logits.shape[1]
    labels = targets.labels.repeat_interleave(cameras, dim=0)  # (P, G)
    seen = targets.mask_2d.flatten(0, 1)
    logits, boxes, centers = (
        value.flatten(2, 3).flatten(0, 1) for value in (maps.logits, maps.boxes, maps.centers)
    )  # (P, L, .)
    assigned = match_cells(logits, boxes, centers, labels, goal_boxes, goal_centers, seen)
    count = shared_count(seen.sum())

    place, cell = (assigned >= 0).nonzero(as_tuple=True)
    slot = assigned[place, cell]
    mine, goal = boxes[place, cell], goal_boxes[place, slot]
    overlap, generalised = box_overlaps(mine, goal)
    quality = torch.zeros_like(logits)
    quality[place, cell, labels[place, slot]] = overlap.detach()
    heat = heat_targets(goal_boxes, goal_centers, seen, (height, width)).view_as(maps.centerness)
    return {
        "auxiliary/class": _CLASS * quality_focal_loss(logits, quality).sum() / count,
        "auxiliary/centerness": heat_loss(maps.centerness, heat) / count,
        "auxiliary/box": _BOX * (middle_form(mine) - middle_form(goal)).abs().sum() / count,
        "auxiliary/iou": _IOU * (1 - generalised).sum() / count,
        "auxiliary/center": _CENTER * (centers[place, cell] - goal_centers[place, slot]).abs().sum() / count,
    }


@torch.no_grad()
def match_cells(
    logits: Tensor, boxes: Tensor, centers: Tensor, labels: Tensor, goal_boxes: Tensor, goal_centers: Tensor,
    seen: Tensor,
) -> Tensor:  # fmt: skip
    """Index (P, L) int64 of the object that each cell answers for, -1 for none.

    logits (P, L, K), boxes (P, L, 4) and centers (P, L, 2) in 0..1; labels (P, G), goal_boxes (P, G, 4),
    goal_centers (P, G, 2), seen (P, G) bool. Errors: FloatingPointError where a cost is not finite.
    """
    assigned = torch.full(logits.shape[:2], -1, dtype=torch.long)
    for image in range(len(logits)):
        objects = seen[image].nonzero()[:, 0]
        if len(objects) == 0:
            continue
        goal = goal_boxes[image, objects]
        cost = _CLASS * focal_cost(logits[image], labels[image, objects])
        cost = cost + _BOX * torch.cdist(middle_form(boxes[image]), middle_form(goal), p=1)
        cost = cost - _IOU * box_overlaps(boxes[image, :, None], goal[None])[1]
        cost = cost + _CENTER * torch.cdist(centers[image], goal_centers[image, objects], p=1)
        if not torch.isfinite(cost).all():
            raise FloatingPointError(
                "2-D head: the cost is not finite, for the predictions or the targets hold nan or inf"
            )
        rows, columns = linear_sum_assignment(cost.cpu().numpy())
        assigned[image, torch.as_tensor(rows)] = objects.cpu()[torch.as_tensor(columns)]
    return assigned.to(logits.device)


def middle_form(boxes: Tensor) -> Tensor:
    """Boxes (..., 4) `[x1, y1, x2, y2]` as `[centre x, centre y, width, height]`."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return torch.cat([(low + high) / 2, high - low], dim=-1)


def box_overlaps(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Intersection over union and the generalised one (Rezatofighi et al. 2019), (...) each, of boxes
    (..., 4) `[x1, y1, x2, y2]` that broadcast."""
    low = torch.maximum(first[..., :2], second[..., :2])
    high = torch.minimum(first[..., 2:], second[..., 2:])
    around = torch.maximum(first[..., 2:], second[..., 2:]) - torch.minimum(first[..., :2], second[..., :2])
    both = (high - low).clamp(min=0).prod(-1)
    union = _area(first) + _area(second) - both
    overlap = both / union.clamp(min=1e-6)
    hull = around.prod(-1)
    return overlap, overlap - (hull - union) / hull.clamp(min=1e-6)


def _area(boxes: Tensor) -> Tensor:
    return (boxes[..., 2:] - boxes[..., :2]).prod(-1)


def heat_targets(boxes: Tensor, centers: Tensor, seen: Tensor, size: tuple[int, int]) -> Tensor:
    """Heat maps (P, H, W): 1 in the cell of each seen object's centre, a Gaussian around it as far as the
    box's nearest edge, the highest of all objects.

    boxes (P, G, 4) and centers (P, G, 2) in 0..1, seen (P, G), size (H, W).
    """
    height, width = size
    scale = boxes.new_tensor([width, height])
    edges = torch.cat([centers - boxes[..., :2], boxes[..., 2:] - centers], dim=-1) * scale.repeat(2)
    radius = edges.amin(-1).ceil().clamp(min=1.0)[..., None, None]  # (P, G, 1, 1) in cells
    middle = (centers * scale).floor()[..., None, None]
    x = torch.arange(width, device=boxes.device) - middle[..., 0, :, :]  # (P, G, 1, W)
    y = torch.arange(height, device=boxes.device)[:, None] - middle[..., 1, :, :]  # (P, G, H, 1)
    bumps = torch.exp(-(x**2 + y**2) / (2 * ((2 * radius + 1) / 6) ** 2))
    bumps = bumps * (x.abs() <= radius) * (y.abs() <= radius) * seen[..., None, None]
    return F.pad(bumps, (0, 0, 0, 0, 0, 1)).amax(1)  # one slot more, for a frame without any
