# SPDX-License-Identifier: Apache-2.0
"""Losses of the dense 2-D head (ours; models/dense_head.py).

Symbols: B batch, N cameras, G object slots, P objects or cells with an object, K classes, H/W feature size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ftkd_core.classes import CLASS_NAMES, HEADINGLESS
from ftkd_core.geometry import line_of_sight, rotate_2d_back
from ftkd_core.losses.focal import heat_loss
from ftkd_core.losses.headings import is_one_of, target_heading
from ftkd_core.losses.normalizer import shared_count
from ftkd_core.models.predictions import REFERENCE_FOCAL_PX, DenseMaps
from ftkd_core.types import CameraRig, Targets


def dense_head_losses(
    maps: DenseMaps, targets: Targets, rig: CameraRig, stride: int,
    class_names: tuple[str, ...] = CLASS_NAMES,
) -> dict[str, Tensor]:  # fmt: skip
    """Return the terms of the dense head: penalty-reduced focal loss of the heat map (CenterNet), L1 of the
    geometry.

    An object counts in a camera if `targets.mask_2d` is set and its projected 3-D centre lies in the image.
    Labels are indices into class_names.
    """
    height, width = maps.heat.shape[-2:]
    cells = targets.centers_2d / stride - 0.5  # (B, N, G, 2) in cells, centres at integers
    column, row = cells[..., 0].round().long(), cells[..., 1].round().long()
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    batch, camera, slot = (targets.mask_2d & inside).nonzero(as_tuple=True)  # (P,) visible objects
    count = shared_count(torch.tensor(len(batch), device=row.device))
    heat = _heat_targets(maps.heat, targets, (batch, camera, slot), cells, stride)
    terms = {"auxiliary/heat": heat_loss(maps.heat.float(), heat) / count}

    batch, camera, slot, row, column, share = _supervised_cells(
        (batch, camera, slot), targets.boxes_2d / stride - 0.5, row, column, (height, width)
    )
    predicted = DenseMaps(*(values[batch, camera, :, row, column].float() for values in maps))
    places = (batch, camera, slot, row, column)
    geometry = _geometry_targets(predicted, targets, rig, places, stride, class_names)
    share = share / shared_count(share.sum())
    direction = _direction_loss(predicted.heading, geometry.pop("heading")[0])
    terms["auxiliary/heading"] = (direction * share).sum()
    for name, (target, weight) in geometry.items():
        difference = getattr(predicted, name) - target
        known = torch.isfinite(difference)
        difference = torch.where(known, difference, 0.0).abs().sum(-1)
        terms[f"auxiliary/{name.removeprefix('log_')}"] = weight * (difference * share).sum()
    return terms


def _supervised_cells(
    visible: tuple[Tensor, Tensor, Tensor],
    boxes: Tensor,
    row: Tensor,
    column: Tensor,
    size: tuple[int, int],
    neighbour_share: float = 0.5,
) -> tuple[Tensor, ...]:
    """Return the cells that learn the geometry of the visible objects.

    These are the centre's cell and, with a smaller weight, those around it that lie in the object's 2-D box
    (as in FCOS). boxes (B, N, G, 4), row and column (B, N, G) in cells. Returns batch, camera, slot, row,
    column, share, each (P,).
    """
    batch, camera, slot = visible
    steps = torch.tensor([-1, 0, 1], device=row.device)
    down, across = (grid.flatten() for grid in torch.meshgrid(steps, steps, indexing="ij"))
    rows = row[visible][:, None] + down  # (objects, 9)
    columns = column[visible][:, None] + across
    box = boxes[visible][:, None]
    own = (down == 0) & (across == 0)
    inside = (rows >= 0) & (rows < size[0]) & (columns >= 0) & (columns < size[1])
    covered = (
        (columns >= box[..., 0]) & (columns <= box[..., 2]) & (rows >= box[..., 1]) & (rows <= box[..., 3])
    )
    supervised = inside & (own | covered)
    share = torch.where(own, 1.0, neighbour_share).expand(supervised.shape)
    repeated = (value[:, None].expand(supervised.shape)[supervised] for value in (batch, camera, slot))
    return (*repeated, rows[supervised], columns[supervised], share[supervised])


def _geometry_targets(
    predicted: DenseMaps, targets: Targets, rig: CameraRig, cells: tuple[Tensor, ...], stride: int,
    class_names: tuple[str, ...],
) -> dict[str, tuple[Tensor, float]]:  # fmt: skip
    """Return target and weight of each geometry map at P cells, targets (P, channels) with nan for undefined
    values."""
    batch, camera, slot, row, column = cells
    cell = torch.stack([column, row], dim=-1).to(targets.boxes_2d.dtype)
    box = targets.boxes_2d[batch, camera, slot] / stride - 0.5
    focal = rig.intrinsics[batch, camera, 0, 0].float()
    depth = targets.depths[batch, camera, slot].clamp(min=0.5) * REFERENCE_FOCAL_PX / focal
    boxes = targets.boxes[batch, slot].float()  # (P, 9)
    direction = line_of_sight(boxes[:, :3] - rig.ego_from_camera[batch, camera, :3, 3].float())
    yaw = boxes[:, 6:7]
    heading = rotate_2d_back(torch.cat([yaw.cos(), yaw.sin()], dim=-1), direction)
    (cos, sin), labels = heading.unbind(-1), targets.labels[batch, slot]
    axis = torch.stack([cos**2 - sin**2, 2 * sin * cos], dim=-1)
    return {
        "edges": (torch.cat([cell - box[:, :2], box[:, 2:] - cell], dim=-1), 0.1),
        "offset": (targets.centers_2d[batch, camera, slot] / stride - 0.5 - cell, 0.5),
        "log_depth": (depth.log()[:, None], 4.0),
        "log_size": (boxes[:, [4, 3, 5]].log(), 0.5),  # width, length, height, as in box codes
        "heading": (target_heading(heading, predicted.heading, labels, class_names), 0.5),
        "axis": (torch.where(is_one_of(HEADINGLESS, labels, class_names)[:, None], torch.nan, axis), 0.5),
    }


def _direction_loss(predicted: Tensor, heading: Tensor) -> Tensor:
    """Return the logistic loss (P,) of pointing to the wrong side of the true heading (P, 2), 0 if it is nan.

    Front or rear is a binary question (see SECOND's direction classifier, Yan et al. 2018); with an L1 loss
    the prediction collapses to the likelier side.
    """
    known = torch.isfinite(heading).all(-1)
    agreement = (predicted * torch.where(known[:, None], heading, 0.0)).sum(-1)
    return torch.where(known, F.softplus(-2 * agreement), 0.0)


def _heat_targets(
    heat: Tensor, targets: Targets, visible: tuple[Tensor, Tensor, Tensor], cells: Tensor, stride: int
) -> Tensor:
    """Return heat maps (B, N, K, H, W): 1 at the cell of each centre, around it a Gaussian with a standard
    deviation of a sixth of the box."""
    batch, camera, slot = visible
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
    target = torch.zeros(batches * cameras * classes, height * width, device=heat.device)
    target.scatter_reduce_(0, plane[:, None].expand(-1, height * width), bumps.flatten(1).float(), "amax")
    return target.view(batches, cameras, classes, height, width)
