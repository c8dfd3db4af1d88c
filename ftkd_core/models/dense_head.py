# SPDX-License-Identifier: Apache-2.0
"""Dense 2-D head: heat maps and box geometry for every cell of the image features.

Supervision of the image features lets the backbone detect objects before the decoder can. StreamPETR's head
(focal_head.py) is matched to few cells; this one (ours) has a heat map as in CenterNet (Zhou et al. 2019) and
2-D box, centre, depth, size and heading as in FCOS3D (Wang et al. 2021), so every cell gets a gradient from
the first step, which training from scratch needs. At inference it runs only if image queries start at its
peaks (`DecoderConfig.num_image_queries`, after Far3D and BEVFormer v2).

Symbols: B batch, N cameras, K classes, C channels, H/W feature size, I image queries.
"""

from typing import Final, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ftkd_core.geometry import full_precision, line_of_sight, rotate_2d, transform_points
from ftkd_core.models.anchors import Anchors
from ftkd_core.models.predictions import REFERENCE_FOCAL_PX, DenseMaps, LinkedProposals
from ftkd_core.types import CameraRig

_GEOMETRY: Final = (4, 2, 1, 3, 2, 2)  # channels of edges, offset, log_depth, log_size, heading, axis


class DenseHead(nn.Module):
    """Compute `DenseMaps` of feature maps (B, N, C, H, W) and their rig.

    The geometry branch also gets each cell's ray and the depth at which it meets the ground (ours): on even
    ground, the image row of an object's foot gives its depth.
    """

    def __init__(self, channels: int, num_classes: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.classes, self.geometry = _tower(channels, channels), _tower(channels + 3, channels)
        self.heat = nn.Conv2d(channels, num_classes, 1)
        self.output = nn.Conv2d(channels, sum(_GEOMETRY), 1)
        nn.init.constant_(self.heat.bias, -4.0)  # type: ignore[arg-type]
        with torch.no_grad():
            self.output.bias.zero_()  # type: ignore[union-attr]
            self.output.bias[6] = 3.0  # type: ignore[index]  # log of 20 m

    def forward(self, features: Tensor, rig: CameraRig) -> DenseMaps:
        shape = features.shape[:2]
        rays = ray_features(rig, features.shape[-2:], self.stride).flatten(0, 1).to(features.dtype)
        features = features.flatten(0, 1)
        heat = self.heat(self.classes(features))
        maps = self.output(self.geometry(torch.cat([features, rays], dim=1)))
        parts = maps.unflatten(0, shape).split(_GEOMETRY, dim=2)
        return DenseMaps(heat.unflatten(0, shape), *parts)


@full_precision
def ray_features(rig: CameraRig, size: tuple[int, int] | torch.Size, stride: int) -> Tensor:
    """Return features (B, N, 3, H, W) of the cells' rays: slopes x/z and y/z, and log depth of the ground.

    The depth is that at which the ray meets the plane z = 0 of ego, clamped to 1..200 m (200 m if it never
    does) and normalised as `DenseMaps.log_depth`.
    """
    height, width = size
    k, pose = rig.intrinsics.float(), rig.ego_from_camera.float()
    u = (torch.arange(width, device=k.device) + 0.5) * stride
    v = (torch.arange(height, device=k.device) + 0.5) * stride
    x = ((u - k[..., 0, 2, None]) / k[..., 0, 0, None])[..., None, :].expand(-1, -1, height, -1)
    y = ((v - k[..., 1, 2, None]) / k[..., 1, 1, None])[..., :, None].expand(-1, -1, -1, width)
    up = pose[..., 2, :3, None, None]  # (B, N, 3, 1, 1), z of each camera axis in ego
    descent = -(up[:, :, 0] * x + up[:, :, 1] * y + up[:, :, 2])  # metres per metre of depth
    depth = torch.where(descent > 1e-3, pose[..., 2, 3, None, None] / descent.clamp(min=1e-3), 200.0)
    scaled = depth.clamp(1.0, 200.0) * REFERENCE_FOCAL_PX / k[..., 0, 0, None, None]
    return torch.stack([x, y, scaled.log()], dim=2)


def _tower(in_channels: int, channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(inplace=True),
    )


class ImageProposals(NamedTuple):
    """anchors of I queries in ego, without gradient; features (B, I, C) of the cells they come from; linked,
    what learned linking found in other frames."""

    anchors: Anchors
    features: Tensor
    linked: LinkedProposals | None = None


@full_precision
def propose(
    maps: DenseMaps,
    features: Tensor,
    rig: CameraRig,
    stride: int,
    count: int,
    cells: Tensor | None = None,
) -> ImageProposals:
    """Return the `count` strongest local peaks of all cameras, lifted to 3-D, of masked cells only if there
    are not enough others.

    cells (B, N, H, W) bool, False for masked cells; default: those of missing cameras. All shapes are fixed
    and nothing is copied to the host. features (B, N, C, H, W) are the input of the maps; gradients flow into
    the features of the proposals, not into their boxes.
    """
    _batch, _cameras, _, height, width = maps.heat.shape
    heat = maps.heat.detach().float().sigmoid().amax(2)  # (B, N, H, W)
    peak = F.max_pool2d(heat, 3, stride=1, padding=1) == heat
    seen = rig.mask[:, :, None, None] if cells is None else cells
    heat = torch.where(peak, heat, heat * 1e-3) * seen
    index = heat.flatten(1).topk(count, dim=1).indices  # (B, I)
    camera, cell = index // (height * width), index % (height * width)
    rows, columns = cell // width, cell % width

    def at(values: Tensor) -> Tensor:
        flat = values.transpose(2, 1).flatten(2)  # (B, ., N*H*W)
        return flat.gather(2, index[:, None].expand(-1, flat.shape[1], -1)).transpose(1, 2)

    offset = at(maps.offset.detach().float())
    intrinsics = _per_camera(rig.intrinsics.float(), camera)  # (B, I, 3, 3)
    depth = at(maps.log_depth.detach().float())[..., 0].clamp(-1.0, 5.0).exp() * intrinsics[..., 0, 0]
    depth = (depth / REFERENCE_FOCAL_PX).clamp(0.5, 100.0)
    u = (columns + 0.5 + offset[..., 0]) * stride
    v = (rows + 0.5 + offset[..., 1]) * stride
    x = (u - intrinsics[..., 0, 2]) / intrinsics[..., 0, 0] * depth
    y = (v - intrinsics[..., 1, 2]) / intrinsics[..., 1, 1] * depth
    points = torch.stack([x, y, depth], dim=-1)[:, :, None]  # (B, I, 1, 3) in camera
    ego = transform_points(_per_camera(rig.ego_from_camera.float(), camera), points)[:, :, 0]
    direction = line_of_sight(ego - _per_camera(rig.ego_from_camera.float(), camera)[..., :3, 3])
    relative = resolve_heading(at(maps.axis.detach().float()), at(maps.heading.detach().float()))
    heading = rotate_2d(relative, direction)
    codes = torch.cat(
        [ego, at(maps.log_size.detach().float()), heading.flip(-1), torch.zeros_like(heading)], dim=-1
    )
    return ImageProposals(Anchors(codes, at(maps.heat.detach().float())), at(features))


def token_cells(mask: Tensor, shape: torch.Size, ratio: int) -> Tensor:
    """Return the mask of tokens (B, L) for the cells of feature maps of `shape` (B, N, C, H, W), `ratio` x
    `ratio` cells per token, as (B, N, H, W) bool."""
    batch, cameras, _, height, width = shape
    cells = mask.view(batch, cameras, height // ratio, width // ratio)
    return cells.repeat_interleave(ratio, dim=2).repeat_interleave(ratio, dim=3)


def resolve_heading(axis: Tensor, heading: Tensor) -> Tensor:
    """Return unit vectors (..., 2) of the doubled angle `axis` (..., 2), on the side of `heading` (...,
    2)."""
    angle = torch.atan2(axis[..., 1], axis[..., 0]) / 2
    along = torch.stack([angle.cos(), angle.sin()], dim=-1)
    return torch.where((along * heading).sum(-1, keepdim=True) < 0, -along, along)


def _per_camera(values: Tensor, camera: Tensor) -> Tensor:
    """Return values (B, N, r, c) of the cameras with index camera (B, I), as (B, I, r, c)."""
    index = camera[..., None, None].expand(-1, -1, *values.shape[2:])
    return values.gather(1, index)
