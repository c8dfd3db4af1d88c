# SPDX-License-Identifier: Apache-2.0
"""Positional encodings: sinusoids, 3-D position embedding of image tokens, motion-aware layer norm.

Source: exiawsh/StreamPETR, re-implemented. Symbols: B batch, N cameras, H/W feature size, D depth bins, C
channels, L = N*H*W tokens, Q queries.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ftkd_core.geometry import full_precision, transform_points
from ftkd_core.types import CameraRig


def inverse_sigmoid(x: Tensor, eps: float = 1e-5) -> Tensor:
    """Return the logit of x; x and 1 - x are each clamped at eps, as in StreamPETR's code, so that 0 and 1
    stay finite."""
    x = x.clamp(0.0, 1.0)
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))


def sinusoidal(values: Tensor, num_features: int, temperature: float = 10000.0) -> Tensor:
    """Return codes (..., num_features) of scalars (...): sine and cosine of 2 pi x at geometric frequencies,
    interleaved."""
    index = torch.arange(num_features, dtype=torch.float32, device=values.device)
    frequency = temperature ** (2 * torch.div(index, 2, rounding_mode="floor") / num_features)
    angles = values[..., None] * (2 * math.pi) / frequency
    return torch.stack([angles[..., 0::2].sin(), angles[..., 1::2].cos()], dim=-1).flatten(-2)


def sinusoidal_position(points: Tensor, num_features: int) -> Tensor:
    """Return codes (..., 3 * num_features) of points (..., 3) in 0..1, in the order y, x, z of StreamPETR's
    code."""
    return torch.cat([sinusoidal(points[..., axis], num_features) for axis in (1, 0, 2)], dim=-1)


def frequency_encoding(values: Tensor, num_frequencies: int = 6) -> Tensor:
    """Return codes (..., 2 * num_frequencies * K) of values (..., K): sin and cos of x, 2x, 4x ... (as in
    NeRF)."""
    scales = 2.0 ** torch.arange(num_frequencies, dtype=torch.float32, device=values.device)
    angles = values[..., None, :] * scales[:, None]  # (..., F, K)
    return torch.stack([angles.sin(), angles.cos()], dim=-2).flatten(-3)


class ConditionalLayerNorm(nn.Module):
    """Layer norm with gain and offset predicted from a condition: gamma(c) * LN(x) + beta(c).

    Initially a plain layer norm. x (..., C), condition (..., condition_dim).
    """

    def __init__(self, channels: int, condition_dim: int) -> None:
        super().__init__()
        self.reduce = nn.Sequential(nn.Linear(condition_dim, channels), nn.ReLU())
        self.gamma = nn.Linear(channels, channels)
        self.beta = nn.Linear(channels, channels)
        self.norm = nn.LayerNorm(channels, elementwise_affine=False)
        for layer, bias in ((self.gamma, 1.0), (self.beta, 0.0)):
            nn.init.zeros_(layer.weight)
            nn.init.constant_(layer.bias, bias)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        gain, offset = self.conditions(condition)
        result: Tensor = gain * self.norm(x) + offset
        return result

    def conditions(self, condition: Tensor) -> tuple[Tensor, Tensor]:
        """Return gain and offset (..., C) for a condition."""
        reduced = self.reduce(condition)
        return self.gamma(reduced), self.beta(reduced)


class EncodedRays(NamedTuple):
    """Part of the position embedding that depends on geometry only, each (B, L, C): the embedding before its
    gate, and gain and offset of the spatial alignment."""

    embedding: Tensor
    gain: Tensor
    offset: Tensor


_PUBLISHED_CONE_POINT = 30  # StreamPETR's spatial alignment uses the 30th last point of a ray


class TokenGeometry(NamedTuple):
    """Geometry of the image tokens; it depends on the rig only and can be cached.

    frustum (B, L, 3 D) points along each ray in inverse-sigmoid space; cone (B, L, 8) condition of the
    spatial alignment; rays (B, L, 3) unit directions in ego; camera_centers (B, N, 3) in ego, metres; mask
    (B, L) bool, False for missing cameras; encoded, if a runtime caches it with the geometry.
    """

    frustum: Tensor
    cone: Tensor
    rays: Tensor
    camera_centers: Tensor
    mask: Tensor
    encoded: EncodedRays | None = None


def depth_bins(count: int, nearest: float, farthest: Tensor) -> Tensor:
    """Return depths (D,) in metres with linearly increasing spacing (LID) from `nearest`; `farthest` is not
    reached."""
    index = torch.arange(count, dtype=torch.float32, device=farthest.device)
    return nearest + (farthest - nearest) / (count * (1 + count)) * index * (index + 1)


@full_precision
def token_geometry(
    rig: CameraRig,
    feature_size: tuple[int, int],
    stride: int,
    num_depths: int,
    range_m: Tensor,
    *,
    published_cone: bool = False,
) -> TokenGeometry:
    """Return the geometry of the tokens of N feature maps (H, W) whose cells have `stride` pixels.

    range_m (3,) half extents in metres. The cone contains the camera's focal lengths and the farthest and the
    middle point of the ray in inverse-sigmoid space. With published_cone it is that of StreamPETR's code:
    focal lengths of camera l mod N for token l (the code tiles the list of cameras instead of repeating each
    one), the farthest point and the 30th last, in 0..1.
    """
    height, width = feature_size
    batch, cameras = rig.mask.shape
    focal, directions = _rays(rig, feature_size, stride)
    depths = depth_bins(num_depths, 1.0, range_m[0])
    points = (directions[..., None, :] * depths[:, None]).flatten(2, 4)  # (B, N, HWD, 3) in camera
    points = transform_points(rig.ego_from_camera.float(), points)
    shape_tokens = (batch, cameras * height * width, num_depths * 3)
    normalised = ((points / range_m + 1) / 2).view(shape_tokens)
    frustum = inverse_sigmoid(normalised)
    rays = directions.flatten(2, 3) @ rig.ego_from_camera[..., :3, :3].float().mT
    rays = nn.functional.normalize(rays, dim=-1).flatten(1, 2)
    focal = focal / 1000.0
    if published_cone:
        middle, cone_points = num_depths - _PUBLISHED_CONE_POINT, normalised
        focal_tokens = focal.repeat(1, height * width, 1)
    else:
        middle, cone_points = (num_depths - 1) // 2, frustum
        focal_tokens = focal[:, :, None].expand(-1, -1, height * width, -1).flatten(1, 2)
    farthest, near = cone_points[..., -3:], cone_points[..., 3 * middle : 3 * middle + 3]
    cone = torch.cat([focal_tokens, farthest, near], dim=-1)
    mask = rig.mask[:, :, None].expand(-1, -1, height * width).flatten(1)
    return TokenGeometry(frustum, cone, rays, rig.ego_from_camera[..., :3, 3].float(), mask)


def _rays(rig: CameraRig, feature_size: tuple[int, int], stride: int) -> tuple[Tensor, Tensor]:
    """Return focal lengths (B, N, 2) in pixels, positive also for mirrored images, and the cells' points at
    depth 1 (B, N, H, W, 3) in camera."""
    height, width = feature_size
    device = rig.intrinsics.device
    u = (torch.arange(width, device=device, dtype=torch.float32) + 0.5) * stride
    v = (torch.arange(height, device=device, dtype=torch.float32) + 0.5) * stride
    intrinsics = rig.intrinsics.float()
    focal = intrinsics.diagonal(dim1=-2, dim2=-1)[..., :2]  # (B, N, 2)
    x = (u - intrinsics[..., 0, 2, None]) / focal[..., 0, None]  # (B, N, W)
    y = (v - intrinsics[..., 1, 2, None]) / focal[..., 1, None]  # (B, N, H)
    shape = (*rig.mask.shape, height, width)
    directions = torch.stack(
        [x[:, :, None, :].expand(shape), y[:, :, :, None].expand(shape), torch.ones(shape, device=device)],
        dim=-1,
    )  # (B, N, H, W, 3)
    return focal.abs(), directions


class PositionEmbedding(nn.Module):
    """Compute aligned tokens and their position embedding, both (B, L, C), of tokens (B, L, C).

    Tokens are normalised under the condition of their ray ("spatial alignment"), then they gate the embedding
    of the ray (a squeeze-and-excitation layer).
    """

    def __init__(self, channels: int, num_depths: int, hidden: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Linear(num_depths * 3, hidden), nn.ReLU(), nn.Linear(hidden, channels)
        )
        self.token_mlp = nn.Sequential(
            nn.Linear(channels, channels), nn.ReLU(), nn.Linear(channels, channels)
        )
        self.alignment = ConditionalLayerNorm(channels, 8)
        self.gate = nn.Sequential(
            nn.Linear(channels, channels), nn.ReLU(), nn.Linear(channels, channels), nn.Sigmoid()
        )

    def forward(self, tokens: Tensor, geometry: TokenGeometry) -> tuple[Tensor, Tensor]:
        encoded = self.encode(geometry) if geometry.encoded is None else geometry.encoded
        tokens = encoded.gain * self.alignment.norm(self.token_mlp(tokens)) + encoded.offset
        return tokens, encoded.embedding * self.gate(tokens)

    def encode(self, geometry: TokenGeometry) -> EncodedRays:
        """Return the part that depends on geometry only, so that a runtime can cache it."""
        return EncodedRays(self.encoder(geometry.frustum), *self.alignment.conditions(geometry.cone))
