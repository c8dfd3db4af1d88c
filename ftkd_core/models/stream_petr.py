# SPDX-License-Identifier: Apache-2.0
"""StreamPETR: the streaming student. Read it top-down: frame in, detections and memory out.

Source: exiawsh/StreamPETR (Apache-2.0) as described in method.md section 4, re-implemented; marked
differences are ours. Symbols: B batch, N cameras, L image tokens, Q queries (learnt + from the image +
propagated), I from the image, P propagated, M memory slots, R denoising queries, C channels, K classes, Y
decoder layers.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ftkd_core.boxes import CODE_DIM
from ftkd_core.config import DecoderConfig, DetectorConfig
from ftkd_core.geometry import optional_matrix
from ftkd_core.models.anchors import (
    LEAST_AGE_S,
    Anchors,
    anchor_features,
    change_anchors,
    face_forward,
    join,
    points_as_anchors,
)
from ftkd_core.models.attention import HybridAttention, TokenAttention
from ftkd_core.models.denoising import attention_mask
from ftkd_core.models.dense_head import DenseHead, ImageProposals, propose
from ftkd_core.models.focal_head import FocalHead
from ftkd_core.models.fpn import TopDownPyramid
from ftkd_core.models.linking import FrameProposals, MotionPrior, link_proposals, motion_prior, proposals_now
from ftkd_core.models.memory import LocalMemory, Memory, empty_memory, memorise, recall, remember_spaced
from ftkd_core.models.model_frame import (
    codes_in_ego,
    denoising_in_model,
    frame_in_model,
    rig_in_model,
)
from ftkd_core.models.position import (
    ConditionalLayerNorm,
    PositionEmbedding,
    TokenGeometry,
    frequency_encoding,
    inverse_sigmoid,
    sinusoidal,
    sinusoidal_position,
    token_geometry,
)
from ftkd_core.models.predictions import DenseMaps, FocalMaps, Predictions
from ftkd_core.models.resnet import ResNet
from ftkd_core.types import CameraRig, DenoisingQueries, Frame

_PRIOR_LOGIT = -4.6  # focal loss prior of 0.01: what the classifier says before it has learnt
_NOTHING_LOGIT = -100.0  # of a slot that holds no box: it supports nothing
_MOST_EVIDENCE = 7.0  # a remembered box starts at a score of at most 0.92, so that it can still be dropped
_MOTION_DIM = 180  # 15 numbers (vx, vy, age, 12 of the pose) at 6 frequencies, sine and cosine


class DecoderLayer(nn.Module):
    """One step: queries talk to each other and the past, look at the images, then think."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        channels = config.channels
        self.self_attention = HybridAttention(channels, config.num_heads, fading=config.anchored)
        self.cross_attention = TokenAttention(channels, config.num_heads, config.locality)
        self.ffn = nn.Sequential(
            nn.Linear(channels, config.ffn_channels), nn.ReLU(), nn.Dropout(config.dropout),
            nn.Linear(config.ffn_channels, channels),
        )  # fmt: skip
        self.norm_self, self.norm_cross, self.norm_ffn = (nn.LayerNorm(channels) for _ in range(3))
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, queries: Tensor, context: "DecoderContext") -> Tensor:
        keys = torch.cat([queries, context.memory], dim=1)  # (B, Q+M-P, C)
        key_position = torch.cat([context.query_position, context.memory_position], dim=1)
        attended = self.self_attention(
            queries, context.query_position, keys, key_position, context.mask, context.distances
        )
        queries = self.norm_self(queries + self.dropout(attended))
        looked = self.cross_attention(
            queries, context.query_position, context.tokens, context.token_position, context.geometry,
            context.anchors.codes[..., :3],
        )  # fmt: skip
        queries = self.norm_cross(queries + self.dropout(looked))
        result: Tensor = self.norm_ffn(queries + self.dropout(self.ffn(queries)))  # (B, Q, C)
        return result


class DecoderContext(NamedTuple):
    """What every decoder layer sees: query_position (B, Q, C), anchors whose centres are the reference
    points and their age (B, Q) in seconds, 0 for queries that are new; memory and its position (B, M-P, C),
    tokens and their position (B, L, C), geometry, mask of the self-attention or None, distances (B, Q, Q+M-P)
    in metres where attention fades with them."""

    query_position: Tensor
    anchors: Anchors
    age: Tensor
    memory: Tensor
    memory_position: Tensor
    tokens: Tensor
    token_position: Tensor
    geometry: TokenGeometry
    mask: Tensor | None
    distances: Tensor | None


class StreamPETR(nn.Module):
    """`predictions, memory = model(frame, memory)`; see `decode` for boxes. Holds parameters only, never a
    frame's state. Between `prepare` and `run_decoder`, names that end in _ego mean the frame the model thinks
    in, where `DetectorConfig.model_from_ego` says that this is another."""

    pseudo_points: Tensor
    range_m: Tensor
    points_center: Tensor
    points_half: Tensor
    model_from_ego: Tensor | None
    motion_prior: Tensor

    def __init__(self, config: DetectorConfig) -> None:
        super().__init__()
        decoder, channels = config.decoder, config.decoder.channels
        self.config = config
        self.backbone = ResNet(config.backbone.depth, config.backbone.base_channels)
        strides = {config.backbone.auxiliary_stride, config.backbone.token_stride}
        levels = [(4, 8, 16).index(stride) for stride in sorted(strides)]
        self.neck = TopDownPyramid(self.backbone.out_channels, config.backbone.neck_channels, levels)
        self.input_projection = (
            nn.Identity() if decoder.as_published else nn.Linear(config.backbone.neck_channels, channels)
        )
        self.position = PositionEmbedding(channels, decoder.num_depths, decoder.position_hidden)

        self.reference_points = nn.Parameter(_initial_points(decoder.num_queries, decoder))
        self.register_buffer("pseudo_points", _initial_points(decoder.num_propagated, decoder))
        self.register_buffer("range_m", torch.tensor(decoder.position_range_m), persistent=False)
        center, half = _point_range(decoder)
        self.register_buffer("points_center", center, persistent=False)
        self.register_buffer("points_half", half, persistent=False)
        self.register_buffer("model_from_ego", optional_matrix(config.model_from_ego), persistent=False)
        self.register_buffer("motion_prior", motion_prior(config.class_names), persistent=False)
        self.query_embedding = nn.Sequential(
            nn.Linear(channels // 2 * 3, channels), nn.ReLU(), nn.Linear(channels, channels)
        )
        self.time_embedding = nn.Sequential(nn.Linear(channels, channels), nn.LayerNorm(channels))
        self.motion_position = ConditionalLayerNorm(channels, _MOTION_DIM)
        self.motion_feature = ConditionalLayerNorm(channels, _MOTION_DIM)
        self.layers = nn.ModuleList(DecoderLayer(decoder) for _ in range(decoder.num_layers))
        self.output_norm = nn.LayerNorm(channels)
        self.classifier = _branch(channels, len(config.class_names), normed=True)
        self.regressor = _branch(channels, CODE_DIM, normed=False)
        final = self.classifier[-1]
        assert isinstance(final, nn.Linear)
        nn.init.constant_(final.bias, _PRIOR_LOGIT)
        self.auxiliary: DenseHead | FocalHead | None = None
        width, classes = config.backbone.neck_channels, len(config.class_names)
        if config.auxiliary_head and config.auxiliary_kind == "focal":
            self.auxiliary = FocalHead(width, classes)
        elif config.auxiliary_head:
            self.auxiliary = DenseHead(width, classes, config.backbone.auxiliary_stride)
        if decoder.num_image_queries:
            self.proposal_content = nn.Linear(config.backbone.neck_channels, channels)
        if decoder.anchored:
            self.anchor_content = nn.Sequential(
                nn.Linear(7 + len(config.class_names), channels), nn.ReLU(), nn.Linear(channels, channels)
            )
            self.gain = nn.Linear(channels, 2)  # of the velocity that a move reveals
            nn.init.zeros_(self.gain.weight)
            nn.init.constant_(self.gain.bias, -1.0)
            self.origin = nn.Parameter(0.1 * torch.randn(3, channels))  # learnt, from the image, propagated
            change = self.regressor[-1]
            assert isinstance(change, nn.Linear)
            nn.init.normal_(change.weight, std=0.01)
            nn.init.zeros_(change.bias)

    def start_memory(self, batch: int = 1) -> Memory:
        """An empty memory on the model's device."""
        decoder = self.config.decoder
        classes = len(self.config.class_names)
        return empty_memory(
            batch, decoder.memory_length, decoder.channels, classes, self.reference_points.device
        )

    def forward(
        self,
        frame: Frame,
        memory: Memory,
        denoising: DenoisingQueries | None = None,
        geometry: TokenGeometry | None = None,
    ) -> tuple[Predictions, Memory]:
        features, fine = self.extract(frame.images)
        geometry = self.geometry(frame.rig) if geometry is None else geometry
        count = self.config.decoder.num_image_queries
        auxiliary: DenseMaps | FocalMaps | None = None
        if isinstance(self.auxiliary, DenseHead) and (self.training or count):
            auxiliary = self.auxiliary(fine, frame.rig)
        elif isinstance(self.auxiliary, FocalHead) and self.training:
            auxiliary = self.auxiliary(fine)
        proposals = None
        if count and isinstance(auxiliary, DenseMaps):
            proposals = propose(auxiliary, fine, frame.rig, self.config.backbone.auxiliary_stride, count)
        frame = frame_in_model(frame, self.model_from_ego)
        denoising = denoising_in_model(denoising, self.model_from_ego)
        local = recall(
            memory, frame, self.points_in_metres(self.pseudo_points),
            velocity_as_answered=self.config.decoder.as_published,
        )  # fmt: skip
        if proposals is not None and self.config.decoder.link_memory:
            proposals = proposals._replace(anchors=self.link(proposals.anchors, local))
        context, queries = self.prepare(features, geometry, local, proposals, denoising)
        logits, codes, last = self.run_decoder(queries, context)
        noised = 0 if denoising is None else denoising.points_ego.shape[1]
        kept = self.config.decoder.num_propagated
        last_codes, evidence = codes[-1, :, noised:], logits[-1, :, noised:] - _PRIOR_LOGIT
        after = memorise(memory, local, frame, last[:, noised:], last_codes, evidence, kept)
        if self.config.decoder.memory_interval_s:
            after = remember_spaced(memory, after, frame, self.config.decoder.memory_interval_s)
        codes = codes_in_ego(codes, self.model_from_ego)
        predictions = Predictions(
            logits[:, :, noised:], codes[:, :, noised:], last[:, noised:], features, auxiliary,
            logits[:, :, :noised] if noised else None, codes[:, :, :noised] if noised else None,
        )  # fmt: skip
        return predictions, after

    def link(self, anchors: Anchors, local: LocalMemory) -> Anchors:
        """The image's boxes (B, I) with the velocity that the remembered boxes speak for. One image tells no
        speed, and most things stand: without this, a first answer is 0 and nothing ever contradicts it."""
        kept = self.config.decoder.num_propagated
        frames = local.age.shape[1] // kept

        def by_frame(values: Tensor) -> Tensor:  # (B, M, ...) -> (B, T, P, ...); the newest come first
            return torch.unflatten(values[:, : frames * kept], 1, (frames, kept))

        age = by_frame(local.age)
        codes = torch.cat([local.centers_ego, local.shape_ego, local.velocity_ego], dim=-1)
        logits = by_frame(local.logits) + _PRIOR_LOGIT
        logits = torch.where(age[..., None] > LEAST_AGE_S, logits, _NOTHING_LOGIT)  # a stream that starts
        origin = by_frame(local.ego_from_past)[:, :, 0, :2, 3]
        past = FrameProposals(by_frame(codes), logits, origin, -age[..., 0])
        now = proposals_now(anchors, torch.zeros_like(past.origin[:, 0]))
        return link_proposals(now, past, MotionPrior(*self.motion_prior))

    def extract(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, N, 3, H, W) -> feature maps (B, N, C, H/stride, W/stride) for the tokens and for the
        2-D head."""
        maps = self.neck(self.backbone(images.flatten(0, 1)))
        return maps[-1].unflatten(0, images.shape[:2]), maps[0].unflatten(0, images.shape[:2])

    def geometry(self, rig: CameraRig) -> TokenGeometry:
        """Token geometry of a rig; constant while the rig is, so a runtime may keep it, `encoded` too."""
        stride, image = self.config.backbone.token_stride, self.config.image
        size = (image.height // stride, image.width // stride)
        decoder = self.config.decoder
        return token_geometry(
            rig_in_model(rig, self.model_from_ego), size, stride, decoder.num_depths, self.range_m,
            cone_as_published=decoder.as_published,
        )  # fmt: skip

    def points_in_metres(self, normalised: Tensor) -> Tensor:
        """Points (..., 3) in 0..1 -> metres in the model's frame."""
        return (normalised * 2 - 1) * self.points_half + self.points_center

    def points_normalised(self, points: Tensor) -> Tensor:
        """The inverse of `points_in_metres`."""
        return ((points - self.points_center) / self.points_half + 1) / 2

    def prepare(
        self,
        features: Tensor,
        geometry: TokenGeometry,
        local: LocalMemory,
        proposals: ImageProposals | None,
        denoising: DenoisingQueries | None,
    ) -> tuple[DecoderContext, Tensor]:
        """Queries (B, R+Q, C) and everything the decoder layers look at."""
        batch = features.shape[0]
        tokens = self.input_projection(features.permute(0, 1, 3, 4, 2).flatten(1, 3))
        tokens, token_position = self.position(tokens, geometry)
        kept = self.config.decoder.num_propagated

        anchors, fresh = self.new_anchors(batch, proposals, denoising)
        past = self.past_anchors(local)
        past_motion = torch.cat(
            [local.velocity_ego, local.age[..., None], local.ego_from_past[..., :3, :].flatten(-2)], dim=-1
        )
        still = torch.zeros_like(past_motion[:, :1])
        still[..., 3:] = torch.eye(4, device=still.device)[:3].flatten()
        centers = anchors.codes[..., :3]
        position, content = self.embed(centers, still.expand(-1, centers.shape[1], -1), None)
        if proposals is not None:
            seen = self.proposal_content(proposals.features)
            content = torch.cat([content[:, :fresh], content[:, fresh:] + seen], dim=1)
        past_position, past_content = self.embed(past.codes[..., :3], past_motion, local.embedding)
        everything = join(anchors, past)  # (B, R+Q+M-P)
        if self.config.decoder.anchored:
            content, past_content = self.tell_anchors(everything, content, past_content, fresh)
        denoised = 0 if denoising is None else denoising.points_ego.shape[1]
        queries = position.shape[1] + kept
        context = DecoderContext(
            query_position=torch.cat([position, past_position[:, :kept]], dim=1),
            anchors=Anchors(*(values[:, :queries] for values in everything)),
            age=torch.cat([torch.zeros_like(position[..., 0]), local.age[:, :kept]], dim=1),
            memory=past_content[:, kept:],
            memory_position=past_position[:, kept:],
            tokens=tokens,
            token_position=token_position,
            geometry=geometry,
            mask=None
            if denoising is None
            else attention_mask(denoising, queries - denoised, past_content.shape[1] - kept),
            distances=_ground_distances(everything.codes, queries) if self.config.decoder.anchored else None,
        )
        return context, torch.cat([content, past_content[:, :kept]], dim=1)

    def new_anchors(
        self, batch: int, proposals: ImageProposals | None, denoising: DenoisingQueries | None
    ) -> tuple[Anchors, int]:
        """Anchors (B, R+Q) of queries that are not from the memory: denoising, learnt, and last those from
        the image; and how many are not from the image."""
        points = self.points_in_metres(self.reference_points)[None].expand(batch, -1, -1)
        if denoising is not None:
            points = torch.cat([denoising.points_ego, points], dim=1)
        anchors = points_as_anchors(points, len(self.config.class_names))
        if proposals is None:
            return anchors, points.shape[1]
        codes = proposals.anchors.codes
        inside = codes[..., :3].clamp(-self.range_m, self.range_m)
        codes = torch.cat([inside, codes[..., 3:]], dim=-1)
        seen = Anchors(codes, proposals.anchors.logits - _PRIOR_LOGIT)
        return join(anchors, seen), points.shape[1]

    def tell_anchors(
        self, anchors: Anchors, content: Tensor, past_content: Tensor, fresh: int
    ) -> tuple[Tensor, Tensor]:
        """Contents of new queries (B, R+Q, C), the first `fresh` not from the image, and of the memory's,
        told what their anchors are and where they come from."""
        told = self.anchor_content(anchor_features(anchors))
        count = content.shape[1]
        origin = torch.cat([self.origin[:1].expand(fresh, -1), self.origin[1:2].expand(count - fresh, -1)])
        return content + told[:, :count] + origin, past_content + told[:, count:] + self.origin[2]

    def past_anchors(self, local: LocalMemory) -> Anchors:
        """The memory's boxes (B, M): points where they were (upstream), or anchored, moved to where they
        should be by now."""
        if not self.config.decoder.anchored:
            return points_as_anchors(local.centers_ego, len(self.config.class_names))
        moved = local.centers_ego[..., :2] + local.velocity_ego * local.age[..., None]
        sizes, heading = local.shape_ego[..., :3], local.shape_ego[..., 3:5].flip(-1)
        heading = face_forward(heading, local.velocity_ego).flip(-1)
        codes = torch.cat([moved, local.centers_ego[..., 2:], sizes, heading, local.velocity_ego], dim=-1)
        return Anchors(codes, local.logits.clamp(max=_MOST_EVIDENCE))

    def embed(self, points_ego: Tensor, motion: Tensor, content: Tensor | None) -> tuple[Tensor, Tensor]:
        """Position (B, Q, C) and content (B, Q, C) of queries or memory at points_ego, under motion (B, Q,
        15)."""
        channels = self.config.decoder.channels
        normalised = self.points_normalised(points_ego)
        position = self.query_embedding(sinusoidal_position(normalised, channels // 2))
        if content is None:
            content = position if self.config.decoder.content_from_position else torch.zeros_like(position)
        condition = frequency_encoding(motion)
        position = self.motion_position(position, condition)
        position = position + self.time_embedding(sinusoidal(motion[..., 2], channels))
        return position, self.motion_feature(content, condition)

    def run_decoder(self, queries: Tensor, context: DecoderContext) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (Y, B, Q, K), codes (Y, B, Q, 10) of all layers and the last layer's features (B, Q, C).

        Every layer's box starts from the query's own reference point: no iterative refinement (upstream).
        """
        anchors = context.anchors
        start = inverse_sigmoid(self.points_normalised(anchors.codes[..., :3]))
        logits, codes = [], []
        for layer in self.layers:
            queries = layer(queries, context)
            features = self.output_norm(queries)
            change = self.regressor(features)
            scores = self.classifier(features)
            if self.config.decoder.anchored:
                gain = self.gain(features).float().sigmoid()
                codes.append(change_anchors(anchors.codes, change.float(), gain, context.age))
                scores = scores + anchors.logits
            else:
                centers = self.points_in_metres((change[..., :3] + start).sigmoid())
                codes.append(torch.cat([centers, change[..., 3:]], dim=-1))
            logits.append(scores)
        return torch.stack(logits), torch.stack(codes), features


def build_stream_petr(config: DetectorConfig) -> StreamPETR:
    """The student of a configuration, with random weights."""
    return StreamPETR(config)


def _ground_distances(codes: Tensor, queries: int) -> Tensor:
    """Metres (B, Q, K) in the ground plane between the first `queries` of K anchors and all of them."""
    centers = codes[..., :2].detach()
    return torch.cdist(centers[:, :queries], centers)


def _branch(channels: int, outputs: int, *, normed: bool) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(2):
        layers.append(nn.Linear(channels, channels))
        if normed:
            layers.append(nn.LayerNorm(channels))
        layers.append(nn.ReLU())
    return nn.Sequential(*layers, nn.Linear(channels, outputs))


def _point_range(decoder: DecoderConfig) -> tuple[Tensor, Tensor]:
    """Middle and half extents (3,) in metres of the space that points are normalised in."""
    if decoder.point_range_m is None:
        half = torch.tensor(decoder.position_range_m)
        return torch.zeros_like(half), half
    low, high = torch.tensor(decoder.point_range_m).view(2, 3)
    return (low + high) / 2, (high - low) / 2


def _initial_points(count: int, decoder: DecoderConfig) -> Tensor:
    """Reference points (count, 3) in 0..1. Uniform (upstream), or with `locality` spread over the ground
    where objects can be seen: denser near the vehicle, 0 to 2 m high (ours)."""
    if not decoder.locality:
        return torch.rand(count, 3)
    radius = 52.0 * torch.rand(count) ** 0.7
    angle = 2 * torch.pi * torch.rand(count)
    points = torch.stack([radius * angle.cos(), radius * angle.sin(), 2 * torch.rand(count)], dim=-1)
    return (points / torch.tensor(decoder.position_range_m) + 1) / 2
