# SPDX-License-Identifier: Apache-2.0
"""SparseBEV: box queries that sample features of several frames.

One model, two uses: the offline teacher, whose window includes future frames, and the online student B, whose
window is a ring of past features. Source: MCG-NJU/SparseBEV (MIT; Liu et al. 2023), re-implemented;
differences are marked as ours.

Symbols: B batch, T frames (current first), N cameras, Q queries, R denoising queries, G groups, P points, L
levels, C channels, K classes, Y decoder steps.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ftkd_core.boxes import CODE_DIM, decode_boxes
from ftkd_core.config import SAMPLING_GROUPS, SAMPLING_POINTS, SparseBEVConfig, SparseDecoderConfig
from ftkd_core.geometry import optional_matrix
from ftkd_core.models.anchors import Anchors, anchor_features, refine_anchors
from ftkd_core.models.attention import HybridAttention
from ftkd_core.models.denoising import attention_mask
from ftkd_core.models.dense_head import DenseHead, ImageProposals, propose
from ftkd_core.models.feature_ring import FeatureRing, WindowFeatures, push, ring_window
from ftkd_core.models.fpn import TopDownPyramid
from ftkd_core.models.heads import PRIOR_LOGIT, box_head, class_head, start_near_zero
from ftkd_core.models.learned_linking import LearnedLinking
from ftkd_core.models.linking import (
    FrameProposals,
    MotionPrior,
    current_proposals,
    link_proposals,
    motion_prior,
)
from ftkd_core.models.model_frame import codes_in_ego, denoising_in_model, rig_in_model
from ftkd_core.models.position import inverse_sigmoid
from ftkd_core.models.predictions import DenseMaps, Predictions
from ftkd_core.models.recompute import recompute
from ftkd_core.models.resnet import ResNet
from ftkd_core.models.sampling import (
    box_points,
    move_points,
    project_to_views,
    sample_pyramid,
    scramble_groups,
)
from ftkd_core.types import CameraRig, DenoisingQueries, Frame, FrameWindow

_SAME_TIME_S = 1e-5


class AdaptiveMixing(nn.Module):
    """Mix sampled features (B, Q, G, I, C / G) of I = T P points over channels, then over points.

    The mixing weights are predicted from the query (B, Q, C); the updated query is returned. I determines the
    parameter shapes, so models of other window lengths need other weights.
    """

    def __init__(self, channels: int, groups: int, in_points: int, out_points: int) -> None:
        super().__init__()
        self.groups, self.in_points, self.out_points = groups, in_points, out_points
        self.width = channels // groups
        self.split = (self.width * self.width, out_points * in_points)
        self.parameter_generator = nn.Linear(channels, groups * sum(self.split))
        self.out_proj = nn.Linear(self.width * out_points * groups, channels)
        nn.init.zeros_(self.parameter_generator.weight)

    def forward(self, sampled: Tensor, query: Tensor) -> Tensor:
        generated = self.parameter_generator(query).unflatten(-1, (self.groups, -1))
        by_channel, by_point = generated.split(self.split, dim=-1)
        mixed = sampled @ by_channel.unflatten(-1, (self.width, self.width))  # (B, Q, G, I, C/G)
        mixed = F.layer_norm(mixed, mixed.shape[-2:]).relu()
        mixed = by_point.unflatten(-1, (self.out_points, self.in_points)) @ mixed  # (B, Q, G, O, C/G)
        mixed = F.layer_norm(mixed, mixed.shape[-2:]).relu()
        changed: Tensor = query + self.out_proj(mixed.flatten(2))
        return changed


class SparseDecoderLayer(nn.Module):
    """One refinement step; all steps share these weights.

    Boxes (B, Q, 10) with centres in 0..1 and features (B, Q, C) become features, logits (B, Q, K) and refined
    boxes.
    """

    range_low: Tensor
    range_size: Tensor

    def __init__(self, config: SparseDecoderConfig, num_frames: int, num_classes: int) -> None:
        super().__init__()
        channels = config.channels
        self.config = config
        self.position_encoder = nn.Sequential(
            nn.Linear(3, channels), nn.LayerNorm(channels), nn.ReLU(),
            nn.Linear(channels, channels), nn.LayerNorm(channels), nn.ReLU(),
        )  # fmt: skip
        self.self_attention = HybridAttention(channels, config.num_heads, distance_aware=True)
        points = SAMPLING_GROUPS * SAMPLING_POINTS
        self.sampling_offset = nn.Linear(channels, points * 3)
        self.scale_weights = nn.Linear(channels, points * config.levels)
        in_points = SAMPLING_POINTS * num_frames
        self.mixing = AdaptiveMixing(channels, SAMPLING_GROUPS, in_points, config.out_points)
        self.ffn = nn.Sequential(
            nn.Linear(channels, config.ffn_channels), nn.ReLU(), nn.Dropout(config.dropout),
            nn.Linear(config.ffn_channels, channels),
        )  # fmt: skip
        self.norm_self, self.norm_mix, self.norm_ffn = (nn.LayerNorm(channels) for _ in range(3))
        self.dropout = nn.Dropout(config.dropout)
        self.classifier, self.regressor = class_head(channels, num_classes), box_head(channels)
        low, high = torch.tensor(config.point_range_m).view(2, 3)
        self.register_buffer("range_low", low, persistent=False)
        self.register_buffer("range_size", high - low, persistent=False)
        nn.init.zeros_(self.sampling_offset.weight)
        nn.init.uniform_(self.sampling_offset.bias, -0.5, 0.5)
        if config.num_image_queries:
            start_near_zero(self.regressor)

    def forward(
        self, boxes: Tensor, features: Tensor, window: WindowFeatures, image_size: tuple[int, int],
        mask: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        features = features + self.position_encoder(boxes[..., :3])
        attended = self.attend(boxes, features, mask)
        features = self.norm_self(features + self.dropout(attended))
        sampled = self.sample(boxes, features, window, image_size)  # (B, Q, G, T P, C/G)
        features = self.norm_mix(self.mixing(sampled, features))
        features = self.norm_ffn(features + self.dropout(self.ffn(features)))
        return features, self.classifier(features), self.refine(boxes, self.regressor(features), window.time)

    def metric(self, boxes: Tensor) -> Tensor:
        """Convert centres of codes (..., 10) from 0..1 to metres in ego."""
        return torch.cat([boxes[..., :3] * self.range_size + self.range_low, boxes[..., 3:]], dim=-1)

    def normalised(self, points: Tensor) -> Tensor:
        """Convert centres (..., 3) from metres in ego to 0..1, clamped; the inverse of `metric`."""
        return ((points - self.range_low) / self.range_size).clamp(0, 1)

    def attend(self, boxes: Tensor, features: Tensor, mask: Tensor | None) -> Tensor:
        """Return scale-adaptive self-attention, which decreases with the distance between boxes."""
        centers = self.metric(boxes)[..., :2].detach()
        nothing = features.new_zeros(1)
        # cdist's default has errors of millimetres.
        exact = "donot_use_mm_for_euclid_dist"
        mode = exact if self.config.as_published else "use_mm_for_euclid_dist_if_necessary"
        distances = torch.cdist(centers, centers, compute_mode=mode)
        attended: Tensor = self.self_attention(features, nothing, features, nothing, mask, distances)
        return attended

    def sample(
        self, boxes: Tensor, features: Tensor, window: WindowFeatures, image_size: tuple[int, int]
    ) -> Tensor:
        """Sample features at points that each query predicts, moved by its velocity into every frame."""
        config = self.config
        points = SAMPLING_GROUPS * SAMPLING_POINTS
        metric_boxes = decode_boxes(self.metric(boxes))
        offsets = self.sampling_offset(features).unflatten(-1, (points, 3))
        moved = move_points(box_points(metric_boxes, offsets), metric_boxes[..., 7:9].detach(), window.time)
        shape = (SAMPLING_GROUPS, SAMPLING_POINTS, config.levels)
        weights = self.scale_weights(features).unflatten(-1, shape).softmax(-1)
        if config.as_published:
            weights = scramble_groups(weights, window.time.shape[1])
        views = project_to_views(moved, window.rig, image_size, keep_unseen=config.as_published)
        return sample_pyramid(window.pyramid, views, weights, keep_unseen=config.as_published)

    def refine(self, boxes: Tensor, change: Tensor, time: Tensor) -> Tensor:
        """Return refined boxes: the centre moves relative to its old position, other attributes are replaced.

        Velocity is predicted as displacement since frame 1, which must be in the past (if it repeats the
        current frame: per second). With image queries, all attributes change relative to the old box in its
        view frame (models/anchors.py).
        """
        if self.config.num_image_queries:
            moved = refine_anchors(
                self.metric(boxes),
                change,
                torch.zeros_like(change[..., :2]),
                torch.zeros_like(change[..., 0]),
            )
            return torch.cat([self.normalised(moved[..., :3]), moved[..., 3:]], dim=-1)
        centers = (inverse_sigmoid(boxes[..., :3]) + change[..., :3]).sigmoid()
        velocity = change[..., 8:]
        if time.shape[1] > 1:
            gap = -time[:, 1, None, None]
            velocity = velocity / torch.where(gap < _SAME_TIME_S, torch.ones_like(gap), gap)
        return torch.cat([centers, change[..., 3:8], velocity], dim=-1)


class SparseBEV(nn.Module):
    """Compute `predictions, pyramid = model(window)` for a window, `predictions, ring = model.step(frame,
    ring)` for a stream. If `recomputes` is set, training stores only the inputs of the decoder steps."""

    model_from_ego: Tensor | None
    motion_prior: Tensor

    def __init__(self, config: SparseBEVConfig) -> None:
        super().__init__()
        decoder = config.decoder
        self.config = config
        self.recomputes = False
        self.backbone = ResNet(config.backbone.depth, config.backbone.base_channels)
        stages = len(self.backbone.out_channels)
        levels = range(max(stages - decoder.levels, 0), stages)
        self.neck = TopDownPyramid(self.backbone.out_channels, decoder.channels, tuple(levels))
        self.register_buffer("model_from_ego", optional_matrix(config.model_from_ego), persistent=False)
        self.register_buffer("motion_prior", motion_prior(config.class_names), persistent=False)
        self.decoder_layer = SparseDecoderLayer(decoder, config.num_frames, len(config.class_names))
        self.query_boxes = nn.Parameter(_pillar_grid(decoder.num_queries))
        # One row per class for denoising queries and one for learned queries; the last channel, added later,
        # marks denoising queries (DAB-DETR).
        self.label_embedding = nn.Embedding(len(config.class_names) + 1, decoder.channels - 1)
        self.auxiliary, classes = None, len(config.class_names)
        if config.has_dense_head:
            self.auxiliary = DenseHead(decoder.channels, classes, config.backbone.auxiliary_stride)
        if decoder.num_image_queries:
            self.proposal_content = nn.Linear(decoder.channels, decoder.channels)
            self.anchor_content = nn.Linear(7 + classes, decoder.channels)
        self.linking = None
        if decoder.learned_linking:
            self.linking = LearnedLinking(
                config.num_frames - 1, classes, decoder.channels, decoder.channels, decoder.channels
            )

    def forward(
        self, window: FrameWindow, denoising: DenoisingQueries | None = None, gradient_frames: int = 0
    ) -> tuple[Predictions, tuple[Tensor, ...]]:
        """Return predictions for the current frame and the pyramid (B, T, N, C, H, W) of all frames, strides
        4 to 32 as far as computed, finest first. gradient_frames as in `extract_window`."""
        pyramid = self.extract_window(window.images, gradient_frames)
        predictions = self.decode_window(WindowFeatures(pyramid, window.rig, window.time), denoising)
        return predictions, pyramid[:4]

    def extract(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return pyramid maps (..., C, H/stride, W/stride) of images (..., 3, H, W), finest first."""
        leading = images.shape[:-3]
        maps = self.neck(self.backbone(images.flatten(0, -4)))
        if self.config.decoder.levels > len(maps):
            maps.append(maps[-1][..., ::2, ::2])
        return tuple(level.unflatten(0, leading) for level in maps)

    def extract_window(self, images: Tensor, gradient_frames: int = 0) -> tuple[Tensor, ...]:
        """Return the pyramid of the images (B, T, N, 3, H, W) of a window. If gradient_frames is more than 0,
        only that many first frames have gradients; the others are computed one by one in eval mode (upstream:
        `stop_prev_grad`)."""
        if not 0 < gradient_frames < images.shape[1]:
            return self.extract(images)
        parts = [self.extract(images[:, :gradient_frames])]
        modes = {module: module.training for part in (self.backbone, self.neck) for module in part.modules()}
        with torch.no_grad():
            self.backbone.eval()
            self.neck.eval()
            parts += [self.extract(images[:, i : i + 1]) for i in range(gradient_frames, images.shape[1])]
        for module, mode in modes.items():
            module.training = mode
        return tuple(torch.cat(level, dim=1) for level in zip(*parts, strict=True))

    def decode_window(self, window: WindowFeatures, denoising: DenoisingQueries | None = None) -> Predictions:
        """Run the decoder on features that were extracted earlier."""
        image = self.config.image
        window = window._replace(rig=rig_in_model(window.rig, self.model_from_ego))
        denoising = denoising_in_model(denoising, self.model_from_ego)
        auxiliary, proposals = self.propose(window)
        boxes, features, mask = self.start(window.time.shape[0], denoising, proposals)
        evidence = None
        if proposals is not None:
            seen = proposals.anchors.logits - PRIOR_LOGIT
            evidence = F.pad(seen, (0, 0, boxes.shape[1] - seen.shape[1], 0))
        logits, codes = [], []
        for _ in range(self.config.decoder.num_layers):
            inputs = (boxes, features, window, (image.height, image.width), mask)
            features, scores, refined = (
                recompute(self.decoder_layer, self.decoder_layer, *inputs)
                if self.recomputes
                else self.decoder_layer(*inputs)
            )
            logits.append(scores if evidence is None else scores + evidence)
            codes.append(codes_in_ego(self.decoder_layer.metric(refined), self.model_from_ego))
            boxes = refined.detach()
        count = 0 if denoising is None else denoising.points_ego.shape[1]
        all_logits, all_codes = torch.stack(logits), torch.stack(codes)
        stride16 = window.pyramid[min(self.config.decoder.levels, 4) - 2][:, 0]
        return Predictions(
            all_logits[:, :, count:], all_codes[:, :, count:], features[:, count:], stride16, auxiliary,
            all_logits[:, :, :count] if count else None, all_codes[:, :, :count] if count else None,
            proposals.linked if proposals is not None and self.training else None,
        )  # fmt: skip

    def propose(self, window: WindowFeatures) -> tuple[DenseMaps | None, ImageProposals | None]:
        """Return the maps of the dense head for the current frame and the boxes at which image queries start;
        None if there are none. A head without image queries runs only in training mode."""
        if self.auxiliary is None or not (self.training or self.config.decoder.num_image_queries):
            return None, None
        stride, count = self.auxiliary.stride, self.config.decoder.num_image_queries
        fine = window.pyramid[self.config.auxiliary_level]
        rig = CameraRig(*(value[:, 0] for value in window.rig))
        auxiliary = self.auxiliary(fine[:, 0], rig)
        if not count:
            return auxiliary, None
        proposals = propose(auxiliary, fine[:, 0], rig, stride, count)
        others = self._detect_in_other_frames(fine[:, 1:], CameraRig(*(value[:, 1:] for value in window.rig)))
        origin = window.rig.ego_from_camera[..., :2, 3].mean(2)
        current = current_proposals(proposals.anchors, origin[:, 0])
        seen = FrameProposals(*others.anchors, origin[:, 1:], window.time[:, 1:])
        prior = MotionPrior(*self.motion_prior)
        if self.linking is None:
            return auxiliary, proposals._replace(anchors=link_proposals(current, seen, prior))
        linked = self.linking(current, seen, proposals.features, others.features, prior.mobile)
        return auxiliary, proposals._replace(anchors=linked.anchors, linked=linked)

    @torch.no_grad()
    def _detect_in_other_frames(self, fine: Tensor, rig: CameraRig) -> ImageProposals:
        """Return the dense head's proposals (B, T, I) in frames (B, T, N, C, h, w), without gradients or
        updates of batch statistics."""
        assert self.auxiliary is not None
        shape = fine.shape[:2]
        fine, rig = fine.flatten(0, 1), CameraRig(*(value.flatten(0, 1) for value in rig))
        was_training = self.auxiliary.training
        maps = self.auxiliary.eval()(fine, rig)
        self.auxiliary.train(was_training)
        count = self.config.decoder.num_image_queries
        found = propose(maps, fine, rig, self.auxiliary.stride, count)
        anchors = Anchors(*(torch.unflatten(value, 0, shape) for value in found.anchors))
        return ImageProposals(anchors, torch.unflatten(found.features, 0, shape))

    def start(
        self, batch: int, denoising: DenoisingQueries | None, proposals: ImageProposals | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return boxes (B, R+Q, 10), features (B, R+Q, C) and self-attention mask of the first step:
        denoising queries first, image queries last."""
        start_boxes = self.query_boxes[None].expand(batch, -1, -1)
        label = self.label_embedding.weight[-1]
        features = F.pad(label, (0, 1)).expand(batch, start_boxes.shape[1], -1)
        if proposals is not None:
            codes, scores = proposals.anchors
            centers = self.decoder_layer.normalised(codes[..., :3])
            image_boxes = torch.cat([centers, codes[..., 3:]], dim=-1)
            start_boxes = torch.cat([start_boxes, image_boxes], dim=1)
            content = self.anchor_content(anchor_features(Anchors(codes, scores)))
            content = content + self.proposal_content(proposals.features) + F.pad(label, (0, 1))
            if proposals.linked is not None:
                content = content + proposals.linked.content
            features = torch.cat([features, content], dim=1)
        if denoising is None:
            return start_boxes, features, None
        centers = self.decoder_layer.normalised(denoising.points_ego)
        noisy_boxes = torch.cat([centers, denoising.codes[..., 3:]], dim=-1)
        content = F.pad(self.label_embedding(denoising.labels), (0, 1), value=1.0)
        mask = attention_mask(denoising, start_boxes.shape[1], 0)
        return torch.cat([noisy_boxes, start_boxes], dim=1), torch.cat([content, features], dim=1), mask

    def step(self, frame: Frame, ring: FeatureRing | None) -> tuple[Predictions, FeatureRing]:
        """Process one frame of a stream; features of older frames come from the ring. Pass None as the ring
        of a new stream."""
        pyramid = self.extract(frame.images)
        ring = push(ring, pyramid, frame, self.config.num_frames)
        return self.decode_window(ring_window(ring, frame)), ring


def build_sparse_bev(config: SparseBEVConfig) -> SparseBEV:
    """Return the model of a configuration with random weights."""
    return SparseBEV(config)


def _pillar_grid(count: int) -> Tensor:
    """Return initial boxes (count, 10): tall, at rest, centres in 0..1 on a square grid at the bottom of the
    range."""
    side = math.isqrt(count)
    if side * side != count:
        raise ValueError(f"{count} queries: expected a square number, because they start on a square grid")
    boxes = torch.randn(count, CODE_DIM)
    axis = (torch.arange(side) + 0.5) / side
    boxes[:, :2] = torch.cartesian_prod(axis, axis)
    boxes[:, 2], boxes[:, 5], boxes[:, 8:] = 0.0, 1.5, 0.0
    return boxes
