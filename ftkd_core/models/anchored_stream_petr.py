# SPDX-License-Identifier: Apache-2.0
"""Streaming detector whose queries are boxes, for training from scratch (ours).

Differences from StreamPETR: queries are anchors (boxes with class scores, after Sparse4D and SparseBEV) that
each layer refines; some start at the peaks of a dense 2-D head (after Far3D, Jiang et al. 2024), with
velocities found by linking them to the memory; attention favours keys near the query (after SMCA, Gao et al.
2021). docs/explanation/models.md gives the reasons.

Symbols as in stream_petr.py; Q queries (learned, image, propagated), I image queries.
"""

from typing import Final

import torch
from torch import Tensor, nn

from ftkd_core.config import TOKEN_STRIDE, DetectorConfig
from ftkd_core.models.anchors import (
    MIN_AGE_S,
    Anchors,
    anchor_features,
    concatenate,
    face_forward,
    points_as_anchors,
    refine_anchors,
)
from ftkd_core.models.corrected_stream_petr import CorrectedStreamPETR
from ftkd_core.models.decoder_layer import DecoderContext, DecoderLayer, QuerySet, decoder_inputs
from ftkd_core.models.dense_head import DenseHead, ImageProposals, propose, token_cells
from ftkd_core.models.heads import PRIOR_LOGIT, start_near_zero
from ftkd_core.models.learned_linking import LearnedLinking
from ftkd_core.models.linking import (
    FrameProposals,
    MotionPrior,
    current_proposals,
    link_proposals,
    motion_prior,
)
from ftkd_core.models.memory import AlignedMemory, Memory
from ftkd_core.models.position import TokenGeometry
from ftkd_core.models.predictions import Predictions
from ftkd_core.models.stream_petr import motion_of, no_motion
from ftkd_core.types import DenoisingQueries, Frame

_EMPTY_SLOT_LOGIT: Final = -100.0  # a slot without a box supports no velocity
_MAX_EVIDENCE: Final = 7.0  # a box from memory starts at a score of at most 0.92, so it can still be rejected


class AnchoredStreamPETR(CorrectedStreamPETR):
    """Streaming detector with anchored queries; same interface as `StreamPETR`."""

    auxiliary: DenseHead
    motion_prior: Tensor

    def __init__(self, config: DetectorConfig) -> None:
        super().__init__(config)
        decoder, channels, classes = config.decoder, config.decoder.channels, len(config.class_names)
        self.layers = nn.ModuleList(
            DecoderLayer(decoder, distance_aware=True) for _ in range(decoder.num_layers)
        )
        with torch.no_grad():
            for points in (self.reference_points, self.pseudo_points):
                points.copy_(self.points_normalised(_points_on_ground(len(points))))
        self.proposal_content = nn.Linear(config.backbone.neck_channels, channels)
        self.anchor_content = nn.Sequential(
            nn.Linear(7 + classes, channels), nn.ReLU(), nn.Linear(channels, channels)
        )
        self.gain = nn.Linear(channels, 2)  # how much a correction of the centre corrects the velocity
        nn.init.zeros_(self.gain.weight)
        nn.init.constant_(self.gain.bias, -1.0)
        self.origin = nn.Parameter(0.1 * torch.randn(3, channels))  # learned, from the image, propagated
        start_near_zero(self.regressor)
        self.linking = None
        if decoder.learned_linking:
            frames = decoder.memory_length // decoder.num_propagated
            self.linking = LearnedLinking(frames, classes, config.backbone.neck_channels, channels, channels)
        self.register_buffer("motion_prior", motion_prior(config.class_names), persistent=False)

    def forward(
        self,
        frame: Frame,
        memory: Memory,
        denoising: DenoisingQueries | None = None,
        geometry: TokenGeometry | None = None,
    ) -> tuple[Predictions, Memory]:
        features, fine = self.extract(frame.images)
        geometry = self.geometry(frame.rig) if geometry is None else geometry
        auxiliary = self.auxiliary(fine, frame.rig)
        stride, count = self.config.backbone.auxiliary_stride, self.config.decoder.num_image_queries
        cells = token_cells(geometry.mask, fine.shape, TOKEN_STRIDE // stride)
        proposals = propose(auxiliary, fine, frame.rig, stride, count, cells)
        past = self.align_memory(memory, frame)
        proposals = self.link(proposals, past)
        context, queries = self.prepare(features, geometry, past, denoising, proposals)
        output = self.run_decoder(queries, context)
        predictions = self.finish(output, denoising, features, auxiliary)
        if self.training:
            predictions = predictions._replace(linked=proposals.linked)
        return predictions, self.update_memory(memory, past, frame, output, denoising)

    def link(self, proposals: ImageProposals, past: AlignedMemory) -> ImageProposals:
        """Initialise the velocity of proposals (B, I) by matching them to boxes in memory.

        A single image carries no velocity; without this, new boxes start at 0 m/s and training keeps them
        there.
        """
        kept = self.config.decoder.num_propagated
        frames = past.age.shape[1] // kept

        def by_frame(values: Tensor) -> Tensor:  # (B, M, ...) -> (B, T, P, ...), newest frame first
            return torch.unflatten(values[:, : frames * kept], 1, (frames, kept))

        age = by_frame(past.age)
        codes = torch.cat([past.centers_ego, past.shape_ego, past.velocity_ego], dim=-1)
        logits = by_frame(past.logits) + PRIOR_LOGIT
        logits = torch.where(age[..., None] > MIN_AGE_S, logits, _EMPTY_SLOT_LOGIT)  # start of a stream
        origin = by_frame(past.ego_from_past)[:, :, 0, :2, 3]
        others = FrameProposals(by_frame(codes), logits, origin, -age[..., 0])
        current = current_proposals(proposals.anchors, torch.zeros_like(others.origin[:, 0]))
        prior = MotionPrior(*self.motion_prior)
        if self.linking is None:
            return proposals._replace(anchors=link_proposals(current, others, prior))
        linked = self.linking(current, others, proposals.features, by_frame(past.embedding), prior.mobile)
        return proposals._replace(anchors=linked.anchors, linked=linked)

    def prepare(
        self,
        features: Tensor,
        geometry: TokenGeometry,
        past: AlignedMemory,
        denoising: DenoisingQueries | None,
        proposals: ImageProposals | None = None,
    ) -> tuple[DecoderContext, Tensor]:
        """Return the decoder's context, with anchors, and its queries (B, R+Q, C)."""
        anchors, not_from_image = self.new_anchors(features.shape[0], proposals, denoising)
        points = anchors.codes[..., :3]
        position = self.encode_points(points)
        position, content = self.add_motion(position, position, no_motion(points))
        if proposals is not None:
            seen = self.proposal_content(proposals.features)
            if proposals.linked is not None:
                seen = seen + proposals.linked.content
            content = torch.cat([content[:, :not_from_image], content[:, not_from_image:] + seen], dim=1)
        old = self.past_anchors(past)
        old_points = old.codes[..., :3]
        old_position, old_content = self.add_motion(
            self.encode_points(old_points), past.embedding, motion_of(past)
        )
        everything = concatenate(anchors, old)  # (B, R+Q+M-P)
        content, old_content = self.embed_anchors(everything, content, old_content, not_from_image)

        kept = self.config.decoder.num_propagated
        tokens = self.position(self.project_tokens(features), geometry)
        context, queries = decoder_inputs(
            QuerySet(points, position, content), QuerySet(old_points, old_position, old_content), kept,
            tokens, geometry, denoising,
        )  # fmt: skip
        count = queries.shape[1]
        context = context._replace(
            distances=_ground_distances(everything.codes, count),
            anchors=Anchors(*(values[:, :count] for values in everything)),
            age=torch.cat([torch.zeros_like(position[..., 0]), past.age[:, :kept]], dim=1),
        )
        return context, queries

    def new_anchors(
        self, batch: int, proposals: ImageProposals | None, denoising: DenoisingQueries | None
    ) -> tuple[Anchors, int]:
        """Return the anchors (B, R+Q-P) of denoising, learned and image queries, in this order, and the
        number of those that are not from the image."""
        points = self.points_in_metres(self.reference_points)[None].expand(batch, -1, -1)
        if denoising is not None:
            points = torch.cat([denoising.points_ego, points], dim=1)
        anchors = points_as_anchors(points, len(self.config.class_names))
        if proposals is None:
            return anchors, points.shape[1]
        codes = proposals.anchors.codes
        inside = codes[..., :3].clamp(-self.range_m, self.range_m)
        codes = torch.cat([inside, codes[..., 3:]], dim=-1)
        seen = Anchors(codes, proposals.anchors.logits - PRIOR_LOGIT)
        return concatenate(anchors, seen), points.shape[1]

    def past_anchors(self, past: AlignedMemory) -> Anchors:
        """Return the boxes in memory (B, M), moved by their velocity to the current time."""
        moved = past.centers_ego[..., :2] + past.velocity_ego * past.age[..., None]
        sizes, heading = past.shape_ego[..., :3], past.shape_ego[..., 3:5].flip(-1)
        heading = face_forward(heading, past.velocity_ego).flip(-1)
        codes = torch.cat([moved, past.centers_ego[..., 2:], sizes, heading, past.velocity_ego], dim=-1)
        return Anchors(codes, past.logits.clamp(max=_MAX_EVIDENCE))

    def embed_anchors(
        self, anchors: Anchors, content: Tensor, past_content: Tensor, not_from_image: int
    ) -> tuple[Tensor, Tensor]:
        """Add embeddings of the anchors and of their origin to the content of new queries (B, R+Q-P, C) and
        of memory slots (B, M, C)."""
        embedded = self.anchor_content(anchor_features(anchors))
        count = content.shape[1]
        learned = self.origin[:1].expand(not_from_image, -1)
        origin = torch.cat([learned, self.origin[1:2].expand(count - not_from_image, -1)])
        return (
            content + embedded[:, :count] + origin,
            past_content + embedded[:, count:] + self.origin[2],
        )

    def predict(self, features: Tensor, context: DecoderContext) -> tuple[Tensor, Tensor]:
        """Return logits (B, Q, K) and refined codes (B, Q, 10) of query features (B, Q, C)."""
        assert context.anchors is not None and context.age is not None
        change, scores = self.regressor(features), self.classifier(features)
        gain = self.gain(features).float().sigmoid()
        codes = refine_anchors(context.anchors.codes, change.float(), gain, context.age)
        return scores + context.anchors.logits, codes


def _ground_distances(codes: Tensor, queries: int) -> Tensor:
    """Return distances (B, Q, K) in metres in the ground plane between the first Q of K anchors and all."""
    centers = codes[..., :2].detach()
    return torch.cdist(centers[:, :queries], centers)


def _points_on_ground(count: int) -> Tensor:
    """Draw points (count, 3) in metres around the vehicle, denser near it, 0 to 2 m high."""
    radius = 52.0 * torch.rand(count) ** 0.7
    angle = 2 * torch.pi * torch.rand(count)
    return torch.stack([radius * angle.cos(), radius * angle.sin(), 2 * torch.rand(count)], dim=-1)
