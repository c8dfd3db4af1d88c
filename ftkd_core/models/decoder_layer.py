# SPDX-License-Identifier: Apache-2.0
"""The transformer decoder layer of the streaming detectors and its inputs.

Symbols: B batch, L image tokens, Q queries (new ones, then the P propagated ones), P propagated queries,
M memory slots, C channels.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ftkd_core.config import DecoderConfig
from ftkd_core.models.anchors import Anchors
from ftkd_core.models.attention import HybridAttention, TokenAttention
from ftkd_core.models.denoising import attention_mask
from ftkd_core.models.position import TokenGeometry
from ftkd_core.types import DenoisingQueries


class QuerySet(NamedTuple):
    """Embedded queries or memory slots: points (B, Q, 3) in metres, position and content (B, Q, C)."""

    points: Tensor
    position: Tensor
    content: Tensor


class DecoderContext(NamedTuple):
    """Inputs that all decoder layers share.

    query_position (B, Q, C); points (B, Q, 3) reference points in metres; memory and memory_position
    (B, M-P, C); tokens and token_position (B, L, C); geometry of the tokens; mask (Q, Q+M-P) of the
    self-attention or None. For anchored queries also distances (B, Q, Q+M-P) in metres, the anchors of the
    queries and their age (B, Q) in seconds, 0 for new queries.
    """

    query_position: Tensor
    points: Tensor
    memory: Tensor
    memory_position: Tensor
    tokens: Tensor
    token_position: Tensor
    geometry: TokenGeometry
    mask: Tensor | None
    distances: Tensor | None = None
    anchors: Anchors | None = None
    age: Tensor | None = None


def decoder_inputs(
    new: QuerySet,
    past: QuerySet,
    num_propagated: int,
    tokens: tuple[Tensor, Tensor],
    geometry: TokenGeometry,
    denoising: DenoisingQueries | None,
) -> tuple[DecoderContext, Tensor]:
    """Return the decoder's context and its queries (B, Q, C): the new ones and the first memory slots.

    The other memory slots are keys of the self-attention only. tokens are their content and position.
    """
    queries = new.points.shape[1] + num_propagated
    keys_only = past.points.shape[1] - num_propagated
    mask = None
    if denoising is not None:
        mask = attention_mask(denoising, queries - denoising.points_ego.shape[1], keys_only)
    context = DecoderContext(
        query_position=torch.cat([new.position, past.position[:, :num_propagated]], dim=1),
        points=torch.cat([new.points, past.points[:, :num_propagated]], dim=1),
        memory=past.content[:, num_propagated:],
        memory_position=past.position[:, num_propagated:],
        tokens=tokens[0],
        token_position=tokens[1],
        geometry=geometry,
        mask=mask,
    )
    return context, torch.cat([new.content, past.content[:, :num_propagated]], dim=1)


class DecoderLayer(nn.Module):
    """Self-attention over queries and memory, cross-attention to image tokens, feed-forward network.

    distance_aware: both attentions favour keys near the query (ours; see `HybridAttention` and
    `TokenAttention`).
    """

    def __init__(self, config: DecoderConfig, *, distance_aware: bool = False) -> None:
        super().__init__()
        channels = config.channels
        self.self_attention = HybridAttention(channels, config.num_heads, distance_aware)
        self.cross_attention = TokenAttention(channels, config.num_heads, distance_aware)
        self.ffn = nn.Sequential(
            nn.Linear(channels, config.ffn_channels), nn.ReLU(), nn.Dropout(config.dropout),
            nn.Linear(config.ffn_channels, channels),
        )  # fmt: skip
        self.norm_self, self.norm_cross, self.norm_ffn = (nn.LayerNorm(channels) for _ in range(3))
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, queries: Tensor, context: DecoderContext) -> Tensor:
        keys = torch.cat([queries, context.memory], dim=1)  # (B, Q+M-P, C)
        key_position = torch.cat([context.query_position, context.memory_position], dim=1)
        attended = self.self_attention(
            queries, context.query_position, keys, key_position, context.mask, context.distances
        )
        queries = self.norm_self(queries + self.dropout(attended))
        attended = self.cross_attention(
            queries, context.query_position, context.tokens, context.token_position, context.geometry,
            context.points,
        )  # fmt: skip
        queries = self.norm_cross(queries + self.dropout(attended))
        result: Tensor = self.norm_ffn(queries + self.dropout(self.ffn(queries)))  # (B, Q, C)
        return result
