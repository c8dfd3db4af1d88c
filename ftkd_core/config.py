# SPDX-License-Identifier: Apache-2.0
"""Configuration of the detectors: image, backbone, decoder, losses.

A preset (presets.py) is a function that returns a complete `DetectorConfig` or `SparseBEVConfig`. Every
checkpoint and weights file stores the complete config as JSON. Sources in the docstrings: [paper sec. n] of
FTKD (arXiv 2512.08247), [public code] of StreamPETR or SparseBEV, [ours].
"""

import math
from dataclasses import field
from typing import Annotated, Final, Literal

import numpy as np
from pydantic import Field

from ftkd_core.classes import CAMERA_CHANNELS, CLASS_NAMES
from ftkd_core.config_class import (
    ConfigT,
    Count,
    PositiveCount,
    Setting,
    config_class,
    describe,
    from_dict,
    override,
    require,
    to_dict,
)
from ftkd_core.geometry import is_rigid

__all__ = [
    "POSITION_RANGE_M", "SAMPLING_GROUPS", "SAMPLING_POINTS", "TOKEN_STRIDE", "BackboneConfig", "Box",
    "ConfigT", "DecoderConfig", "DetectorConfig", "ImageConfig", "LossConfig", "Matrix", "ModelConfig",
    "Setting", "SparseBEVConfig", "SparseDecoderConfig", "TransformerConfig", "config_class", "describe",
    "from_dict", "override", "to_dict",
]  # fmt: skip

Matrix = tuple[tuple[float, ...], ...]
"""A 4x4 transform as rows."""
Box = tuple[float, float, float, float, float, float]
"""A box in space: low x, y, z and high x, y, z, metres."""
TOKEN_STRIDE: Final = 16
"""Stride in pixels of the feature level whose cells are StreamPETR's tokens [public code]."""
POSITION_RANGE_M: Final = (61.2, 61.2, 10.0)
"""Half extents x, y, z in metres of the space that StreamPETR's position embedding normalises to 0..1 [public
code], and to which the anchored student limits boxes [ours]."""
SAMPLING_GROUPS: Final = 4
"""Channel groups of a SparseBEV; each samples its own points [public code]."""
SAMPLING_POINTS: Final = 4
"""Sampling points of a SparseBEV per query, group and frame [public code]."""
ImageSide = Annotated[int, Field(gt=0, multiple_of=16)]


@config_class
class ImageConfig:
    """Network input. The camera image is scaled to `width`; rows are cut from the top until `height`
    remain."""

    width: ImageSide = 704
    """Pixels."""
    height: ImageSide = 256
    """Pixels."""


@config_class
class BackboneConfig:
    """ResNet and the neck behind it."""

    depth: int = 50
    """Layers of the ResNet: 18, 34, 50 or 101."""
    base_channels: PositiveCount = 64
    """Channels of the first stage; 64 is the published network."""
    auxiliary_stride: Literal[8, 16] = 16
    """Stride in pixels of the feature level that the 2-D head reads."""
    neck_channels: PositiveCount = 256
    """Channels C of the neck's feature levels."""

    def __post_init__(self) -> None:
        require(self.depth in (18, 34, 50, 101), f"depth {self.depth}: expected 18, 34, 50 or 101")


@config_class
class TransformerConfig:
    """Settings that both decoders have."""

    channels: PositiveCount = 256
    """Width C of the query features, a multiple of `num_heads`."""
    num_layers: PositiveCount = 6
    """Decoder layers. SparseBEV applies one layer that many times."""
    num_heads: PositiveCount = 8
    """Heads of each attention."""
    ffn_channels: PositiveCount
    """Hidden width of the feed-forward networks."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Dropout rate in training [public code]."""
    num_queries: PositiveCount
    """Learned queries."""
    num_image_queries: Count = 0
    """Additional queries that start as boxes at the peaks of the dense 2-D head [ours, after Far3D, Jiang et
    al. 2024]. With them the 2-D head also runs at inference, and all queries of a StreamPETR are boxes
    (models/anchored_stream_petr.py)."""
    point_range_m: Box
    """Space of reference points and box centres, in the model's frame."""
    learned_linking: bool = False
    """Velocities of image queries come from a network (models/learned_linking.py) instead of a hand-written
    step with prior knowledge of motion (models/linking.py) [ours]."""
    as_published: bool = False
    """Computes what the published weights were trained with, where ours differs."""

    def __post_init__(self) -> None:
        require(
            self.channels % self.num_heads == 0,
            f"channels {self.channels}: expected a multiple of num_heads {self.num_heads}",
        )
        low, high = self.point_range_m[:3], self.point_range_m[3:]
        require(
            all(a < b for a, b in zip(low, high, strict=True)),
            f"point_range_m {list(self.point_range_m)}: expected low x, y, z and high x, y, z",
        )
        require(
            not (self.as_published and self.num_image_queries),
            f"as_published with {self.num_image_queries} image queries: the published models have none",
        )
        require(
            self.num_image_queries > 0 or not self.learned_linking,
            "learned_linking: expected num_image_queries, whose velocity it predicts",
        )


@config_class
class DecoderConfig(TransformerConfig):
    """StreamPETR's queries, memory and transformer decoder."""

    ffn_channels: PositiveCount = 2048
    """Hidden width of the feed-forward networks."""
    num_queries: PositiveCount = 300
    """Learned queries."""
    num_propagated: PositiveCount = 128
    """Queries that are propagated from the memory to the next frame, at most `memory_length`."""
    memory_length: PositiveCount = 512
    """Slots of the memory."""
    num_depths: PositiveCount = 64
    """Points along the ray of each token for its position embedding."""
    position_hidden: PositiveCount = 1024
    """Hidden width of the MLP of the position embedding."""
    point_range_m: Box = (-61.2, -61.2, -10.0, 61.2, 61.2, 10.0)
    """Space of reference points and box centres, in the model's frame."""
    memory_interval_s: Annotated[float, Field(ge=0, lt=60)] = 0.0
    """A frame that is captured sooner after the newest memory frame is detected but not stored, so that the
    memory keeps the spacing of the training at any camera rate; 0 stores every frame [ours]."""
    as_published: bool = False
    """Computes what StreamPETR's published weights were trained with: no projection before the MLP of the
    tokens, spatial alignment from points in 0..1 (ours: their inverse sigmoid) at other depths, and memory
    velocities in the ego frame of the frame that predicted them (ours: the current one)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.channels % 2 == 0, f"channels {self.channels}: expected an even number")
        require(
            self.num_propagated <= self.memory_length,
            f"num_propagated {self.num_propagated}: expected at most memory_length {self.memory_length}",
        )
        require(
            not self.as_published or self.num_depths > 30,
            f"num_depths {self.num_depths}: expected more than 30 with as_published, because the published "
            "alignment reads the 30th last",
        )


@config_class
class SparseDecoderConfig(TransformerConfig):
    """SparseBEV's decoder: each query samples image features at points around its box, per frame."""

    ffn_channels: PositiveCount = 512
    """Hidden width of the feed-forward networks."""
    num_queries: PositiveCount = 900
    """Learned queries, a square number: they start on a square grid."""
    levels: Annotated[int, Field(ge=2, le=5)] = 4
    """Pyramid levels, the coarsest of strides 4 to 32; a fifth takes every second cell of stride 32."""
    out_points: PositiveCount = 128
    """Points after adaptive mixing."""
    point_range_m: Box = (-51.2, -51.2, -5.0, 51.2, 51.2, 3.0)
    """Space of reference points and box centres, in the model's frame."""
    as_published: bool = False
    """Computes what SparseBEV's published weights were trained with: a point that no camera sees but that is
    within one cell of the first camera's maps reads their edge (ours: 0), levels are weighted by the weights
    of other groups (`sampling.scramble_groups`), and distances are exact."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.channels % SAMPLING_GROUPS == 0,
            f"channels {self.channels}: expected a multiple of {SAMPLING_GROUPS}, the groups of channels",
        )
        require(
            math.isqrt(self.num_queries) ** 2 == self.num_queries,
            f"num_queries {self.num_queries}: expected a square number (a square grid)",
        )


@config_class
class LossConfig:
    """Options of the losses. Their weights are constants (losses/matching.py)."""

    weighted_matching: bool = False
    """Whether the box cost of the matching has the weights of the loss and includes velocity; without it the
    eight elements before velocity have equal weights [ours]. With `decoder.as_published` the matching is that
    of the public model."""
    denoising_groups: Count = 10
    """Noisy copies of the ground truth per frame; 0 trains without denoising."""


@config_class
class ModelConfig:
    """Settings that both detectors have."""

    preset: str
    """Name of the preset."""
    image: ImageConfig = field(default_factory=ImageConfig)
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    channels: Annotated[tuple[str, ...], Field(min_length=1)] = CAMERA_CHANNELS
    """Names of the cameras, in the order of the input."""
    class_names: tuple[str, ...] = CLASS_NAMES
    """Classes in the order of the outputs."""
    model_from_ego: Matrix | None = None
    """Rigid transform from ego to the frame in which an imported model computes; null is the identity. Inputs
    and outputs are in ego."""

    def __post_init__(self) -> None:
        for names in (self.channels, self.class_names):
            require(len(set(names)) == len(names), f"names {', '.join(names)}: expected distinct names")
        rows = self.model_from_ego
        require(
            rows is None or (list(map(len, rows)) == [4] * 4 and is_rigid(np.array(rows))),
            f"model_from_ego {rows}: expected the four rows of a rigid transform",
        )


@config_class
class DetectorConfig(ModelConfig):
    """Complete configuration of a streaming detector (StreamPETR)."""

    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    auxiliary_kind: Literal["none", "dense", "focal"] = "dense"
    """2-D head that is trained with the detector: `dense`, whose peaks image queries start at [ours], or
    `focal`, StreamPETR's [public code]."""

    def __post_init__(self) -> None:
        super().__post_init__()
        decoder, width = self.decoder, self.backbone.neck_channels
        require(
            self.auxiliary_kind == "dense" or not decoder.num_image_queries,
            f"auxiliary_kind {self.auxiliary_kind}: expected dense, because {decoder.num_image_queries} "
            "image queries start at the peaks of the dense 2-D head",
        )
        require(
            self.auxiliary_kind != "focal" or width % 32 == 0,
            f"backbone.neck_channels {width}: expected a multiple of 32 with auxiliary_kind focal",
        )
        _check_image_queries(self, decoder.num_image_queries)
        require(
            not decoder.as_published or decoder.channels == width,
            f"backbone.neck_channels {width}: expected decoder.channels {decoder.channels} with as_published",
        )
        require(
            self.model_from_ego is None or not decoder.num_image_queries,
            "model_from_ego: expected null, because image queries are in the ego frame",
        )


@config_class
class SparseBEVConfig(ModelConfig):
    """Complete configuration of a SparseBEV: a teacher with future frames, a student B without."""

    decoder: SparseDecoderConfig = field(default_factory=SparseDecoderConfig)
    num_past: Count = 7
    """Past frames of the window."""
    num_future: Count = 0
    """Future frames of the window; more than 0 makes an offline teacher."""
    dense_head: bool = False
    """Whether a model without image queries has the dense 2-D head, for training only [ours]. A model with
    image queries always has it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        count = self.decoder.num_image_queries
        require(
            self.num_past > 0 or self.num_future == 0,
            "num_past 0: expected at least 1 with future frames, because velocity is predicted as the "
            "movement since the past frame",
        )
        require(
            self.model_from_ego is None or not count,
            "model_from_ego: expected null, because image queries are in the ego frame",
        )
        require(
            not self.has_dense_head or self.auxiliary_level >= 0,
            f"backbone.auxiliary_stride {self.backbone.auxiliary_stride}: expected one of the "
            f"{self.decoder.levels} pyramid levels, because the 2-D head reads it",
        )
        _check_image_queries(self, count)

    @property
    def has_dense_head(self) -> bool:
        """Whether the model has the dense 2-D head."""
        return self.dense_head or self.decoder.num_image_queries > 0

    @property
    def num_frames(self) -> int:
        """Frames in the window, the current one included."""
        return 1 + self.num_past + self.num_future

    @property
    def auxiliary_level(self) -> int:
        """Index of the pyramid level that the 2-D head reads; negative if no level has its stride."""
        return min(self.decoder.levels, 4) - {8: 3, 16: 2}[self.backbone.auxiliary_stride]


def _check_image_queries(config: ModelConfig, count: int) -> None:
    """Raise a UserError if there are more image queries than cells of the 2-D head."""
    stride, image, cameras = config.backbone.auxiliary_stride, config.image, len(config.channels)
    cells = cameras * (image.height // stride) * (image.width // stride)
    require(
        count <= cells,
        f"decoder.num_image_queries {count}: expected 0 to {cells}, the cells of {cameras} "
        f"{image.width}x{image.height} images at stride {stride}",
    )
