# SPDX-License-Identifier: Apache-2.0
"""Spatio-temporal sampling: points of moving boxes, projected into the cameras of many frames, read from
feature maps.

Source: SparseBEV (MCG-NJU/SparseBEV, MIT; method.md section 5), re-implemented; marked differences are ours.
Symbols: B batch, T frames, N cameras, Q queries, G groups, P points a group and frame, L pyramid levels, C
channels, H/W feature size.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ftkd_core.geometry import full_precision, invert_rigid
from ftkd_core.types import CameraRig

_NEAREST_M = 1e-5


class ViewPoints(NamedTuple):
    """Where points are seen: uv (B, T, Q, R, 2) in 0..1 of the chosen view's image, view (B, T, Q, R) int64,
    seen (B, T, Q, R) bool, False where no camera sees the point (its uv and view mean nothing then)."""

    uv: Tensor
    view: Tensor
    seen: Tensor


def box_points(boxes: Tensor, offsets: Tensor) -> Tensor:
    """Points (B, Q, R, 3) at offsets (B, Q, R, 3), in units of length, width and height along the axes of
    boxes (B, Q, 9), from their centres."""
    along, across, up = (offsets * boxes[..., None, 3:6]).unbind(-1)
    cos, sin = boxes[..., 6:7].cos(), boxes[..., 6:7].sin()
    turned = torch.stack([along * cos - across * sin, along * sin + across * cos, up], dim=-1)
    return boxes[..., None, :3] + turned


def move_points(points: Tensor, velocity: Tensor, time: Tensor) -> Tensor:
    """Points (B, Q, R, 3) of objects with velocity (B, Q, 2) at times (B, T) relative to the current frame,
    past negative, future positive: (B, T, Q, R, 3)."""
    moved = velocity[:, None] * time[:, :, None, None]  # (B, T, Q, 2)
    shift = F.pad(moved, (0, 1))[..., None, :]
    return points[:, None] + shift


@full_precision
def project_to_views(
    points_ego: Tensor, rig: CameraRig, image_size: tuple[int, int], *, keep_unseen: bool = False
) -> ViewPoints:
    """Points (B, T, Q, R, 3) in the current ego frame, each in the first camera of its frame that sees it.

    rig (B, T, N, ...); image_size (height, width) in pixels. At most one view a point, as upstream; a masked
    camera sees nothing (ours). keep_unseen: a point no camera sees keeps its place in the first camera, so
    that just outside the image it reads part of the edge (upstream).
    """
    height, width = image_size
    image_from_ego = rig.intrinsics.float() @ invert_rigid(rig.ego_from_camera.float())[..., :3, :]
    rotation, translation = image_from_ego[..., :3].mT, image_from_ego[..., 3]
    flat = points_ego.flatten(2, 3)[:, :, None]  # (B, T, 1, Q R, 3)
    x, y, depth = (flat @ rotation + translation[..., None, :]).unbind(-1)  # each (B, T, N, Q R)
    near = depth.clamp(min=_NEAREST_M)
    # Divided by numbers: a tensor of them would be copied from the host, for which a GPU is waited for.
    uv = torch.stack([x / near / width, y / near / height], dim=-1)
    inside = (depth > _NEAREST_M) & (uv > 0).all(-1) & (uv < 1).all(-1) & rig.mask[..., None]
    view = inside.byte().argmax(dim=2)  # (B, T, Q R), the first that sees it
    chosen = uv.gather(2, view[:, :, None, :, None].expand(-1, -1, 1, -1, 2))[:, :, 0]
    shape = points_ego.shape[2:4]
    seen = torch.unflatten(inside.any(dim=2), 2, shape)
    kept = seen | rig.mask[:, :, :1, None] if keep_unseen else seen
    uv = torch.where(kept[..., None], torch.unflatten(chosen, 2, shape), -2.0)  # outside: nothing can leak in
    return ViewPoints(uv, torch.unflatten(view, 2, shape), seen)


@full_precision
def sample_pyramid(
    pyramid: Sequence[Tensor], points: ViewPoints, scale_weights: Tensor, *, keep_unseen: bool = False
) -> Tensor:
    """Features (B, Q, G, T P, C / G) at points (R = G P) of the pyramid's levels (B, T, N, C, H, W), blended
    by scale_weights (B, Q, G, P, L), or (B, Q, T, G, P, L) where they differ between frames.

    Corners are aligned as upstream. Zero where a point is not seen; with keep_unseen, as `project_to_views`
    was told, it may lie just outside of its camera. Maps of half precision are read in float32: in bfloat16 a
    place among the rows of six stacked cameras is good to a third of a row (stride 4, images of 256 rows).
    Plain twin: `sample_pyramid_plainly`.
    """
    groups, count = scale_weights.shape[-3:-1]
    batch, frames, cameras = pyramid[0].shape[:3]
    if scale_weights.ndim == 5:
        scale_weights = scale_weights[:, :, None]
    shape = (groups, count)
    uv = torch.unflatten(points.uv.float(), 3, shape).movedim(3, 2).flatten(0, 2)  # (BTG, Q, P, 2)
    view = torch.unflatten(points.view, 3, shape).movedim(3, 2).flatten(0, 2)[..., None].to(uv.dtype)
    read_views = _read_as_volume if keep_unseen else _read_stacked
    result: Tensor | None = None
    for level, features in enumerate(pyramid):
        maps = (
            torch.unflatten(features.float(), 3, (groups, -1)).permute(0, 1, 3, 4, 2, 5, 6).flatten(0, 2)
        )  # (BTG,C,N,H,W)
        read = torch.unflatten(read_views(maps, uv, view, cameras), 0, (batch, frames, groups))
        weight = scale_weights[..., level].permute(0, 2, 3, 1, 4)[:, :, :, None]  # (B, 1 or T, G, 1, Q, P)
        result = read * weight if result is None else result + read * weight
    assert result is not None
    return result.permute(0, 4, 2, 1, 5, 3).flatten(3, 4)  # (B, Q, G, T P, C / G)


def _read_stacked(maps: Tensor, uv: Tensor, view: Tensor, cameras: int) -> Tensor:
    """maps (X, C, N, H, W) at uv (X, Q, P, 2) of view (X, Q, P, 1) -> (X, C, Q, P): the cameras' maps stacked
    to one image, in which a point that lies between the outer cells of its camera touches no other. On a CPU
    about half the time of the volume, forward and backward."""
    height = maps.shape[3]
    row = uv[..., 1:] * (height - 1) + view * height
    last = max(cameras * height - 1, 1)
    grid = torch.cat([uv[..., :1] * 2 - 1, row * (2.0 / last) - 1], dim=-1)
    return F.grid_sample(maps.flatten(2, 3), grid, align_corners=True)


def _read_as_volume(maps: Tensor, uv: Tensor, view: Tensor, cameras: int) -> Tensor:
    """The same for points anywhere: the view is a third axis of one trilinear look-up."""
    depth = view * (2.0 / max(cameras - 1, 1)) - (1.0 if cameras > 1 else 0.0)
    grid = torch.cat([uv * 2 - 1, depth], dim=-1)[..., None, :]  # (X, Q, P, 1, 3)
    return F.grid_sample(maps, grid, align_corners=True)[..., 0]


def scramble_groups(scale_weights: Tensor, frames: int) -> Tensor:
    """Scale weights (B, Q, T, G, P, L) as the published SparseBEV reads those of (B, Q, G, P, L): its flat
    index over frames and groups is taken for one over groups and frames, so that group g of frame t has the
    weights of group (t G + g) // T."""
    groups = scale_weights.shape[2]
    index = torch.arange(frames * groups, device=scale_weights.device) // frames
    return torch.unflatten(scale_weights[:, :, index], 2, (frames, groups))


def sample_pyramid_plainly(pyramid: Sequence[Tensor], points: ViewPoints, scale_weights: Tensor) -> Tensor:
    """The plain twin of `sample_pyramid`: every camera is read at every point, then one is chosen."""
    groups, count = scale_weights.shape[2:4]
    batch, frames, cameras, channels = pyramid[0].shape[:4]
    queries = scale_weights.shape[1]
    width = channels // groups
    result = pyramid[0].new_zeros(batch, queries, groups, frames, count, width)
    for frame in range(frames):
        for group in range(groups):
            mine = slice(group * count, (group + 1) * count)
            uv = points.uv[:, frame, :, mine] * 2 - 1  # (B, Q, P, 2)
            for camera in range(cameras):
                here = points.seen[:, frame, :, mine] & (points.view[:, frame, :, mine] == camera)
                for level, features in enumerate(pyramid):
                    maps = features[:, frame, camera, group * width : (group + 1) * width]
                    read = F.grid_sample(maps, uv, align_corners=True).permute(0, 2, 3, 1)  # (B, Q, P, C)
                    weight = scale_weights[:, :, group, :, level] * here
                    result[:, :, group, frame] += read * weight[..., None]
    return result.flatten(3, 4)
