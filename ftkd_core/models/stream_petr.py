# SPDX-License-Identifier: Apache-2.0
"""StreamPETR as published: a streaming detector whose queries are points.

Source: exiawsh/StreamPETR (Apache-2.0; Wang et al. 2023), re-implemented. The computation is that of the
public code, so that its weights can be imported; `corrected_stream_petr.py` and `anchored_stream_petr.py`
build on it.

Symbols: B batch, N cameras, L image tokens, Q queries (learned, then propagated), P propagated queries, M
memory slots, R denoising queries, C channels, K classes, Y decoder layers.
"""

from typing import Final, NamedTuple

import torch
from torch import Tensor, nn

from ftkd_core.config import POSITION_RANGE_M, TOKEN_STRIDE, DetectorConfig
from ftkd_core.geometry import optional_matrix
from ftkd_core.models.decoder_layer import DecoderContext, DecoderLayer, QuerySet, decoder_inputs
from ftkd_core.models.fpn import TopDownPyramid
from ftkd_core.models.heads import PRIOR_LOGIT, box_head, build_auxiliary_head, class_head
from ftkd_core.models.memory import AlignedMemory, Memory, align_memory, empty_memory, update_memory
from ftkd_core.models.model_frame import codes_in_ego, denoising_in_model, frame_in_model, rig_in_model
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
from ftkd_core.models.recompute import recompute
from ftkd_core.models.resnet import ResNet
from ftkd_core.types import CameraRig, DenoisingQueries, Frame

MOTION_DIM: Final = 15  # vx, vy, age, and the 12 numbers of a pose


class DecoderOutput(NamedTuple):
    """logits (Y, B, R+Q, K) and codes (Y, B, R+Q, 10) of all layers, features (B, R+Q, C) of the last; boxes
    are in the model's frame."""

    logits: Tensor
    codes: Tensor
    features: Tensor


class StreamPETR(nn.Module):
    """Compute `predictions, memory = model(frame, memory)`; `predictions.decode` turns them into boxes.

    The module holds parameters only; the state of a stream is the memory. If `recomputes` is set, training
    stores only the inputs of the decoder layers. Between `frame_in_model` and
    `codes_in_ego`, names that end in _ego refer to the model's frame if `DetectorConfig.model_from_ego` is
    set.
    """

    pseudo_points: Tensor
    range_m: Tensor
    points_center: Tensor
    points_half: Tensor
    model_from_ego: Tensor | None

    def __init__(self, config: DetectorConfig) -> None:
        super().__init__()
        backbone, decoder, channels = config.backbone, config.decoder, config.decoder.channels
        self.config = config
        self.recomputes = False
        self.backbone = ResNet(backbone.depth, backbone.base_channels)
        levels = [(4, 8, 16).index(s) for s in sorted({backbone.auxiliary_stride, TOKEN_STRIDE})]
        self.neck = TopDownPyramid(self.backbone.out_channels, backbone.neck_channels, levels)
        self.position = PositionEmbedding(channels, decoder.num_depths, decoder.position_hidden)

        self.reference_points = nn.Parameter(torch.rand(decoder.num_queries, 3))
        self.register_buffer("pseudo_points", torch.rand(decoder.num_propagated, 3))
        self.query_embedding = nn.Sequential(
            nn.Linear(channels // 2 * 3, channels), nn.ReLU(), nn.Linear(channels, channels)
        )
        self.time_embedding = nn.Sequential(nn.Linear(channels, channels), nn.LayerNorm(channels))
        frequencies = 12  # sine and cosine of 6 frequencies
        self.motion_position = ConditionalLayerNorm(channels, MOTION_DIM * frequencies)
        self.motion_feature = ConditionalLayerNorm(channels, MOTION_DIM * frequencies)

        self.layers = nn.ModuleList(DecoderLayer(decoder) for _ in range(decoder.num_layers))
        self.output_norm = nn.LayerNorm(channels)
        self.classifier = class_head(channels, len(config.class_names))
        self.regressor = box_head(channels)
        self.auxiliary = build_auxiliary_head(config)

        low, high = torch.tensor(decoder.point_range_m).view(2, 3)
        self.register_buffer("range_m", torch.tensor(POSITION_RANGE_M), persistent=False)
        self.register_buffer("points_center", (low + high) / 2, persistent=False)
        self.register_buffer("points_half", (high - low) / 2, persistent=False)
        self.register_buffer("model_from_ego", optional_matrix(config.model_from_ego), persistent=False)

    def start_memory(self, batch: int = 1) -> Memory:
        """Return an empty memory on the model's device."""
        decoder, classes = self.config.decoder, len(self.config.class_names)
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
        use_auxiliary = self.auxiliary is not None and self.training
        auxiliary = self.auxiliary(fine, frame.rig) if use_auxiliary else None  # type: ignore[misc]
        frame = frame_in_model(frame, self.model_from_ego)
        denoising = denoising_in_model(denoising, self.model_from_ego)
        past = self.align_memory(memory, frame)
        context, queries = self.prepare(features, geometry, past, denoising)
        output = self.run_decoder(queries, context)
        return self.finish(output, denoising, features, auxiliary), self.update_memory(
            memory, past, frame, output, denoising
        )

    def extract(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return feature maps (B, N, C, H/stride, W/stride) of images (B, N, 3, H, W), at the token stride
        and at the stride of the 2-D head."""
        maps = self.neck(self.backbone(images.flatten(0, 1)))
        return maps[-1].unflatten(0, images.shape[:2]), maps[0].unflatten(0, images.shape[:2])

    def geometry(self, rig: CameraRig) -> TokenGeometry:
        """Return the geometry of the tokens. It depends on the rig only, so a runtime may cache it."""
        return self._token_geometry(rig, published_cone=True)

    def _token_geometry(self, rig: CameraRig, *, published_cone: bool) -> TokenGeometry:
        stride, image = TOKEN_STRIDE, self.config.image
        size = (image.height // stride, image.width // stride)
        rig = rig_in_model(rig, self.model_from_ego)
        return token_geometry(
            rig, size, stride, self.config.decoder.num_depths, self.range_m, published_cone=published_cone
        )

    def align_memory(self, memory: Memory, frame: Frame) -> AlignedMemory:
        """Return the memory in the current frame. Velocities keep the axes of the frame that predicted
        them."""
        points = self.points_in_metres(self.pseudo_points)
        return align_memory(memory, frame, points, rotate_velocity=False)

    def prepare(
        self,
        features: Tensor,
        geometry: TokenGeometry,
        past: AlignedMemory,
        denoising: DenoisingQueries | None,
    ) -> tuple[DecoderContext, Tensor]:
        """Return the decoder's context and its queries (B, R+Q, C)."""
        points = self.points_in_metres(self.reference_points)[None].expand(features.shape[0], -1, -1)
        if denoising is not None:
            points = torch.cat([denoising.points_ego, points], dim=1)
        position = self.encode_points(points)
        new = QuerySet(points, *self.add_motion(position, torch.zeros_like(position), no_motion(points)))
        position = self.encode_points(past.centers_ego)
        old = QuerySet(past.centers_ego, *self.add_motion(position, past.embedding, motion_of(past)))
        tokens = self.position(self.project_tokens(features), geometry)
        return decoder_inputs(new, old, self.config.decoder.num_propagated, tokens, geometry, denoising)

    def project_tokens(self, features: Tensor) -> Tensor:
        """Return the cells of feature maps (B, N, C, H, W) as tokens (B, L, C)."""
        return features.permute(0, 1, 3, 4, 2).flatten(1, 3)

    def encode_points(self, points_ego: Tensor) -> Tensor:
        """Return the position embedding (B, Q, C) of points (B, Q, 3) in metres."""
        normalised = self.points_normalised(points_ego)
        code = sinusoidal_position(normalised, self.config.decoder.channels // 2)
        embedding: Tensor = self.query_embedding(code)
        return embedding

    def add_motion(self, position: Tensor, content: Tensor, motion: Tensor) -> tuple[Tensor, Tensor]:
        """Return position and content (B, Q, C), both modulated by motion (B, Q, 15) as of `motion_of`."""
        condition = frequency_encoding(motion)
        position = self.motion_position(position, condition)
        position = position + self.time_embedding(sinusoidal(motion[..., 2], position.shape[-1]))
        return position, self.motion_feature(content, condition)

    def run_decoder(self, queries: Tensor, context: DecoderContext) -> DecoderOutput:
        """Run all layers; each predicts boxes from the reference points, without iterative refinement."""
        logits, codes = [], []
        for layer in self.layers:
            queries = (
                recompute(layer, layer, queries, context) if self.recomputes else layer(queries, context)
            )
            features = self.output_norm(queries)
            layer_logits, layer_codes = self.predict(features, context)
            logits.append(layer_logits)
            codes.append(layer_codes)
        return DecoderOutput(torch.stack(logits), torch.stack(codes), features)

    def predict(self, features: Tensor, context: DecoderContext) -> tuple[Tensor, Tensor]:
        """Return logits (B, Q, K) and codes (B, Q, 10) of query features (B, Q, C)."""
        change = self.regressor(features)
        start = inverse_sigmoid(self.points_normalised(context.points))
        centers = self.points_in_metres((change[..., :3] + start).sigmoid())
        return self.classifier(features), torch.cat([centers, change[..., 3:]], dim=-1)

    def finish(
        self,
        output: DecoderOutput,
        denoising: DenoisingQueries | None,
        image_features: Tensor,
        auxiliary: DenseMaps | FocalMaps | None,
    ) -> Predictions:
        """Return predictions in ego, those of the denoising queries apart from the others."""
        count = num_denoising(denoising)
        logits, codes = output.logits, codes_in_ego(output.codes, self.model_from_ego)
        return Predictions(
            logits[:, :, count:], codes[:, :, count:], output.features[:, count:], image_features, auxiliary,
            logits[:, :, :count] if count else None, codes[:, :, :count] if count else None,
        )  # fmt: skip

    def update_memory(
        self,
        memory: Memory,
        past: AlignedMemory,
        frame: Frame,
        output: DecoderOutput,
        denoising: DenoisingQueries | None,
    ) -> Memory:
        """Return the memory with the best queries of this frame in front."""
        decoder, count = self.config.decoder, num_denoising(denoising)
        return update_memory(
            memory, past, frame, output.features[:, count:], output.codes[-1, :, count:],
            output.logits[-1, :, count:] - PRIOR_LOGIT, decoder.num_propagated, decoder.memory_interval_s,
        )  # fmt: skip

    def points_in_metres(self, normalised: Tensor) -> Tensor:
        """Convert points (..., 3) in 0..1 to metres in the model's frame."""
        return (normalised * 2 - 1) * self.points_half + self.points_center

    def points_normalised(self, points: Tensor) -> Tensor:
        """Convert points (..., 3) in metres to 0..1; the inverse of `points_in_metres`."""
        return ((points - self.points_center) / self.points_half + 1) / 2


def motion_of(past: AlignedMemory) -> Tensor:
    """Return velocity, age and ego motion of memory slots as (B, M, 15)."""
    pose = past.ego_from_past[..., :3, :].flatten(-2)
    return torch.cat([past.velocity_ego, past.age[..., None], pose], dim=-1)


def no_motion(points: Tensor) -> Tensor:
    """Return the motion (B, Q, 15) of new queries at points (B, Q, 3): no velocity, no age, identity pose."""
    still = points.new_zeros(points.shape[0], 1, MOTION_DIM)
    still[..., 3:] = torch.eye(4, device=still.device)[:3].flatten()
    return still.expand(-1, points.shape[1], -1)


def num_denoising(denoising: DenoisingQueries | None) -> int:
    """Return R, 0 without denoising queries."""
    return 0 if denoising is None else denoising.points_ego.shape[1]
