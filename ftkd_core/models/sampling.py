# SPDX-License-Identifier: Apache-2.0
"""Spatio-temporal sampling: points of moving boxes are projected into the cameras of several frames and read
from feature maps.

Source: MCG-NJU/SparseBEV (MIT; Liu et al. 2023), re-implemented; differences are marked as ours. Symbols: B
batch, T frames, N cameras, Q queries, G groups, P points per group and frame, R = G P, L pyramid levels, C
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
    """Projected points: uv (B, T, Q, R, 2) in 0..1 of the selected image, view (B, T, Q, R) int64 its camera,
    seen (B, T, Q, R) bool. If seen is False, uv and view have no meaning."""

    uv: Tensor
    view: Tensor
    seen: Tensor


def box_points(boxes: Tensor, offsets: Tensor) -> Tensor:
    """Return points (B, Q, R, 3) at offsets (B, Q, R, 3) from the centres of boxes (B, Q, 9), in units of
    length, width and height along the axes of the box."""
    along, across, up = (offsets * boxes[..., None, 3:6]).unbind(-1)
    cos, sin = boxes[..., 6:7].cos(), boxes[..., 6:7].sin()
    rotated = torch.stack([along * cos - across * sin, along * sin + across * cos, up], dim=-1)
    return boxes[..., None, :3] + rotated


def move_points(points: Tensor, velocity: Tensor, time: Tensor) -> Tensor:
    """Return points (B, T, Q, R, 3) of points (B, Q, R, 3) that move with velocity (B, Q, 2), at times (B, T)
    relative to the current frame (negative in the past)."""
    moved = velocity[:, None] * time[:, :, None, None]  # (B, T, Q, 2)
    shift = F.pad(moved, (0, 1))[..., None, :]
    return points[:, None] + shift


@full_precision
def project_to_views(
    points_ego: Tensor, rig: CameraRig, image_size: tuple[int, int], *, keep_unseen: bool = False
) -> ViewPoints:
    """Project points (B, T, Q, R, 3) of the current ego frame into the first camera of each frame that sees
    them.

    rig (B, T, N, ...); image_size (height, width) in pixels. A point gets at most one view, as in SparseBEV's
    code; masked cameras see nothing (ours). With keep_unseen, a point that no camera sees keeps its
    projection into the first camera, so that just outside the image it reads part of the border (SparseBEV's
    code).
    """
    height, width = image_size
    image_from_ego = rig.intrinsics.float() @ invert_rigid(rig.ego_from_camera.float())[..., :3, :]
    rotation, translation = image_from_ego[..., :3].mT, image_from_ego[..., 3]
    flat = points_ego.flatten(2, 3)[:, :, None]  # (B, T, 1, Q R, 3)
    x, y, depth = (flat @ rotation + translation[..., None, :]).unbind(-1)  # each (B, T, N, Q R)
    near = depth.clamp(min=_NEAREST_M)
    # Division by Python numbers: a tensor would be copied from the host, which synchronises with a GPU.
    uv = torch.stack([x / near / width, y / near / height], dim=-1)
    inside = (depth > _NEAREST_M) & (uv > 0).all(-1) & (uv < 1).all(-1) & rig.mask[..., None]
    view = inside.byte().argmax(dim=2)  # (B, T, Q R), first camera that sees it
    chosen = uv.gather(2, view[:, :, None, :, None].expand(-1, -1, 1, -1, 2))[:, :, 0]
    shape = points_ego.shape[2:4]
    seen = torch.unflatten(inside.any(dim=2), 2, shape)
    kept = seen | rig.mask[:, :, :1, None] if keep_unseen else seen
    # Unseen points are outside the image and read zeros.
    uv = torch.where(kept[..., None], torch.unflatten(chosen, 2, shape), -2.0)
    return ViewPoints(uv, torch.unflatten(view, 2, shape), seen)


@full_precision
def sample_pyramid(
    pyramid: Sequence[Tensor], points: ViewPoints, scale_weights: Tensor, *, keep_unseen: bool = False
) -> Tensor:
    """Return features (B, Q, G, T P, C / G) at points (R = G P) of pyramid levels (B, T, N, C, H, W),
    weighted by scale_weights (B, Q, G, P, L), or (B, Q, T, G, P, L) if they differ between frames.

    Corners are aligned as in SparseBEV's code. Unseen points read zero; with keep_unseen, as passed to
    `project_to_views`, points just outside their camera read its border. Half-precision maps are read in
    float32: in bfloat16, a row of six stacked cameras has an error of a third of a row (stride 4, 256 image
    rows). Reference implementation: `sample_pyramid_reference`.
    """
    groups, count = scale_weights.shape[-3:-1]
    batch, frames, cameras = pyramid[0].shape[:3]
    if scale_weights.ndim == 5:
        scale_weights = scale_weights[:, :, None]
    shape = (groups, count)
    uv = torch.unflatten(points.uv.float(), 3, shape).movedim(3, 2).flatten(0, 2)  # (BTG, Q, P, 2)
    view = torch.unflatten(points.view, 3, shape).movedim(3, 2).flatten(0, 2)[..., None].to(uv.dtype)
    read_views = _read_padded if keep_unseen else _read_stacked
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
    """Read maps (X, C, N, H, W) at uv (X, Q, P, 2) of view (X, Q, P, 1); returns (X, C, Q, P).

    The maps of all cameras are stacked to one image; a point between the outer cells of its camera touches no
    other camera. On a CPU this takes about half the time of a volume, forward and backward.
    """
    height = maps.shape[3]
    return _read_rows(maps, uv[..., :1], uv[..., 1:] * (height - 1) + view * height, cameras)


def _read_padded(maps: Tensor, uv: Tensor, view: Tensor, cameras: int) -> Tensor:
    """Read as `_read_stacked`, for points anywhere: a row of zeros above and below each camera separates it
    from the others. SparseBEV's code reads the cameras as the third axis of a volume, with equal results;
    this form has no 5-D operator, which TensorRT and ONNX before opset 20 lack."""
    height = maps.shape[3]
    row = (uv[..., 1:] * (height - 1)).clamp(-1.0, float(height))  # farther outside reads zeros as well
    padded = F.pad(maps, (0, 0, 1, 1))
    return _read_rows(padded, uv[..., :1], row + 1 + view * (height + 2), cameras)


def _read_rows(maps: Tensor, u: Tensor, row: Tensor, cameras: int) -> Tensor:
    """Read maps (X, C, N, H, W) at horizontal positions u (X, Q, P, 1), 0 to 1, and rows (X, Q, P, 1) of the
    stacked cameras."""
    last = max(cameras * maps.shape[3] - 1, 1)
    grid = torch.cat([u * 2 - 1, row * (2.0 / last) - 1], dim=-1)
    return F.grid_sample(maps.flatten(2, 3), grid, align_corners=True)


def scramble_groups(scale_weights: Tensor, frames: int) -> Tensor:
    """Return scale weights (B, Q, T, G, P, L) in the order in which SparseBEV's code reads (B, Q, G, P, L).

    The code interprets its flat index over frames and groups as one over groups and frames: group g of frame
    t uses the weights of group (t G + g) // T.
    """
    groups = scale_weights.shape[2]
    index = torch.arange(frames * groups, device=scale_weights.device) // frames
    return torch.unflatten(scale_weights[:, :, index], 2, (frames, groups))


def sample_pyramid_reference(pyramid: Sequence[Tensor], points: ViewPoints, scale_weights: Tensor) -> Tensor:
    """Compute `sample_pyramid` with loops over frames, groups, cameras and levels, for tests."""
    groups, count = scale_weights.shape[2:4]
    batch, frames, cameras, channels = pyramid[0].shape[:4]
    queries = scale_weights.shape[1]
    width = channels // groups
    result = pyramid[0].new_zeros(batch, queries, groups, frames, count, width)
    for frame in range(frames):
        for group in range(groups):
            own = slice(group * count, (group + 1) * count)
            uv = points.uv[:, frame, :, own] * 2 - 1  # (B, Q, P, 2)
            for camera in range(cameras):
                here = points.seen[:, frame, :, own] & (points.view[:, frame, :, own] == camera)
                for level, features in enumerate(pyramid):
                    maps = features[:, frame, camera, group * width : (group + 1) * width]
                    read = F.grid_sample(maps, uv, align_corners=True).permute(0, 2, 3, 1)  # (B, Q, P, C)
                    weight = scale_weights[:, :, group, :, level] * here
                    result[:, :, group, frame] += read * weight[..., None]
    return result.flatten(3, 4)
