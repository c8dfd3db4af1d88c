# SPDX-License-Identifier: Apache-2.0
"""Attention of the decoders: self-attention over queries and memory, cross-attention to image tokens.

Symbols: B batch, Q queries, K keys, L image tokens, N cameras, C channels, A heads, E = C / A.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ftkd_core.geometry import full_precision
from ftkd_core.models.position import TokenGeometry


class HybridAttention(nn.Module):
    """Attention of queries to queries and memory.

    Positions are added to queries and keys, not to values. queries, query_position (B, Q, C); keys,
    key_position (B, K, C), the queries first; mask (Q, K) bool, True if a query may attend, or None. If
    distance_aware, attention decreases with distances (B, Q, K) in metres, by a factor per head that is
    predicted from the query (SparseBEV's scale-adaptive self-attention). Returns (B, Q, C).
    """

    def __init__(self, channels: int, num_heads: int, distance_aware: bool = False) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(channels, channels)
        self.key = nn.Linear(channels, channels)
        self.value = nn.Linear(channels, channels)
        self.output = nn.Linear(channels, channels)
        _xavier(self)
        if distance_aware:
            self.fade = nn.Linear(channels, num_heads)
            nn.init.zeros_(self.fade.weight)
            nn.init.uniform_(self.fade.bias, 0.0, 2.0)

    def forward(
        self,
        queries: Tensor,
        query_position: Tensor,
        keys: Tensor,
        key_position: Tensor,
        mask: Tensor | None,
        distances: Tensor | None = None,
    ) -> Tensor:
        q = split_heads(self.query(queries + query_position), self.num_heads)  # (B, A, Q, E)
        k = split_heads(self.key(keys + key_position), self.num_heads)  # (B, A, K, E)
        v = split_heads(self.value(keys), self.num_heads)
        if distances is not None:
            bias = -self.fade(queries).transpose(1, 2)[..., None] * distances[:, None]  # (B, A, Q, K)
            mask = bias if mask is None else bias.masked_fill(~mask, -torch.inf)
            mask = mask.to(q.dtype)
        attended: Tensor = self.output(merge_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=mask)))
        return attended


class TokenAttention(nn.Module):
    """Attention of queries to image tokens; tokens of a masked camera get no weight.

    If distance_aware, each logit gets the term kappa * cos(angle between the token's ray and the direction
    from its camera to the query's reference point), with one learned kappa per head (ours, after SMCA, Gao et
    al. 2021).

    Both the mask and this term are inner products, so they are extra columns of queries and keys and fused
    attention kernels need no dense mask: one column 1 * (-penalty) for masked tokens, and three columns per
    camera for kappa * direction * ray.
    """

    _MASK_PENALTY = 1e4

    def __init__(self, channels: int, num_heads: int, distance_aware: bool = False) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(channels, channels)
        self.key = nn.Linear(channels, channels)
        self.value = nn.Linear(channels, channels)
        self.output = nn.Linear(channels, channels)
        _xavier(self)
        if distance_aware:
            # Angular widths from 2 to 16 degrees over the heads: kappa = 1 / sigma^2.
            sigma = torch.deg2rad(2.0 * 8.0 ** torch.linspace(0.0, 1.0, num_heads))
            self.log_kappa = nn.Parameter(-2.0 * sigma.log())
        else:
            self.register_parameter("log_kappa", None)

    def forward(
        self,
        queries: Tensor,
        query_position: Tensor,
        tokens: Tensor,
        token_position: Tensor,
        geometry: TokenGeometry,
        reference_points_ego: Tensor,
    ) -> Tensor:
        """Return (B, Q, C). queries (B, Q, C), tokens (B, L, C), reference_points_ego (B, Q, 3) in metres."""
        q = split_heads(self.query(queries + query_position), self.num_heads)  # (B, A, Q, E)
        k = split_heads(self.key(tokens + token_position), self.num_heads)  # (B, A, L, E)
        v = split_heads(self.value(tokens), self.num_heads)
        width = q.shape[-1]
        q = q / math.sqrt(width)
        penalty = torch.where(geometry.mask, 0.0, -self._MASK_PENALTY).to(k.dtype)
        extra_q = [q.new_ones(*q.shape[:-1], 1)]
        extra_k = [penalty[:, None, :, None].expand(-1, self.num_heads, -1, -1)]
        if self.log_kappa is not None:
            directions, rays = locality_features(geometry, reference_points_ego)
            kappa = self.log_kappa.exp()[:, None, None]
            extra_q.append(kappa * directions[:, None])  # (B, A, Q, 3N)
            extra_k.append(rays[:, None].expand(-1, self.num_heads, -1, -1))
        attended = _attend_with_columns(q, k, v, extra_q, extra_k)
        result: Tensor = self.output(merge_heads(attended))
        return result


@full_precision
def _attend_with_columns(
    q: Tensor, k: Tensor, v: Tensor, extra_q: list[Tensor], extra_k: list[Tensor]
) -> Tensor:
    """Return attention (B, A, Q, E) whose logits are the inner products of q and k with their extra columns.

    With the columns of the distance term it computes in float32: kappa is in the hundreds and cosines differ
    by thousandths, too fine for half precision. The column of the mask alone needs no float32.
    """
    width, dtype = q.shape[-1], q.dtype if len(extra_q) == 1 else torch.float32
    q, k = (torch.cat([x.to(dtype) for x in columns], dim=-1) for columns in ((q, *extra_q), (k, *extra_k)))
    padded = -(-q.shape[-1] // 8) * 8  # fused kernels need multiples of 8; zeros have no effect
    q, k, v_padded = (F.pad(x.to(dtype), (0, padded - x.shape[-1])) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v_padded, scale=1.0)[..., :width].to(v.dtype)


@full_precision
def locality_features(geometry: TokenGeometry, points_ego: Tensor) -> tuple[Tensor, Tensor]:
    """Return vectors whose inner product is the cosine between a token's ray and the direction from its
    camera to a point.

    These are directions (B, Q, 3N) from each camera centre to points (B, Q, 3), and rays (B, L, 3N) in the
    columns of their own camera, zero elsewhere.
    """
    directions = points_ego[:, :, None] - geometry.camera_centers[:, None]  # (B, Q, N, 3)
    directions = F.normalize(directions, dim=-1).flatten(2)
    batch, length, _ = geometry.rays.shape
    cameras = geometry.camera_centers.shape[1]
    own = torch.eye(cameras, device=points_ego.device).repeat_interleave(length // cameras, dim=0)  # (L, N)
    rays = (own[None, :, :, None] * geometry.rays[:, :, None]).reshape(batch, length, cameras * 3)
    return directions, rays


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """Reshape (B, Q, C) to (B, A, Q, E)."""
    return x.reshape(*x.shape[:-1], num_heads, -1).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """Reshape (B, A, Q, E) to (B, Q, C)."""
    return x.transpose(1, 2).flatten(2)


def _xavier(module: nn.Module) -> None:
    for layer in module.children():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
