# SPDX-License-Identifier: Apache-2.0
"""2-D head on the image features: it teaches the backbone to see objects before the decoder can.

StreamPETR trains one too; ours is dense (a heat map as in CenterNet, with box, centre and depth at the
peaks) because every cell then carries gradient from the first step, which training from scratch needs. It
is dropped at inference, unless the decoder starts queries at its peaks (`DecoderConfig.num_image_queries`,
after Far3D). Symbols: B batch, N cameras, K classes, C channels, H/W feature size, I image queries.
"""

from typing import Final, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ftkd_core.geometry import transform_points
from ftkd_core.types import CameraRig

REFERENCE_FOCAL_PX: Final = 300.0
"""Depth is predicted as if seen by this focal length, so that one number fits cameras of any field of
view."""


class AuxiliaryMaps(NamedTuple):
    """heat (B, N, K, H, W) logits; edges (B, N, 4, H, W) distances left, top, right, bottom in cells; offset
    (B, N, 2, H, W) projected 3-D centre minus cell centre in cells; log_depth (B, N, 1, H, W) of metres times
    REFERENCE_FOCAL_PX / focal length."""

    heat: Tensor
    edges: Tensor
    offset: Tensor
    log_depth: Tensor


class AuxiliaryHead(nn.Module):
    """Feature maps (B, N, C, H, W) -> AuxiliaryMaps."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.shared = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
        )
        self.output = nn.Conv2d(channels, num_classes + 7, 1)
        bias = torch.zeros(num_classes + 7)
        bias[:num_classes] = -4.0
        bias[-1] = 3.0  # log of 20 m
        with torch.no_grad():
            self.output.bias.copy_(bias)  # type: ignore[union-attr]

    def forward(self, features: Tensor) -> AuxiliaryMaps:
        batch, cameras = features.shape[:2]
        maps = self.output(self.shared(features.flatten(0, 1))).unflatten(0, (batch, cameras))
        heat, edges, offset, log_depth = maps.split([self.num_classes, 4, 2, 1], dim=2)
        return AuxiliaryMaps(heat, edges, offset, log_depth)


class ImageProposals(NamedTuple):
    """points_ego (B, I, 3) metres; features (B, I, C) of the cells they come from; both detached from the
    2-D head."""

    points_ego: Tensor
    features: Tensor


def propose(maps: AuxiliaryMaps, features: Tensor, rig: CameraRig, stride: int, count: int) -> ImageProposals:
    """The `count` strongest local peaks over all cameras, lifted to 3-D. Fixed shapes; nothing leaves the
    device.

    features (B, N, C, H, W) are the maps' input. Gradient flows into the features, not through the points.
    """
    _batch, _cameras, _, height, width = maps.heat.shape
    heat = maps.heat.detach().float().sigmoid().amax(2)  # (B, N, H, W)
    peak = F.max_pool2d(heat, 3, stride=1, padding=1) == heat
    heat = torch.where(peak & rig.mask[:, :, None, None], heat, heat * 1e-3)
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
    return ImageProposals(ego, at(features))


def _per_camera(values: Tensor, camera: Tensor) -> Tensor:
    """values (B, N, r, c) of the cameras chosen by camera (B, I) -> (B, I, r, c)."""
    index = camera[..., None, None].expand(-1, -1, *values.shape[2:])
    return values.gather(1, index)
