# SPDX-License-Identifier: Apache-2.0
"""Configuration as frozen dataclasses, checked when they are made.

A preset (`presets.py`) is a function that returns a complete `DetectorConfig`; the resolved configuration
travels in every checkpoint as JSON, so that a checkpoint says what it is.
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

from ftkd_core.classes import CAMERA_CHANNELS, CLASS_NAMES
from ftkd_core.errors import UserError

ConfigT = TypeVar("ConfigT")
Matrix = tuple[tuple[float, ...], ...]
"""A 4x4 transform as rows."""

UNSAID: Final = {"unsaid": True}
"""Metadata of a setting that `to_dict` leaves out while it has its default, so that what was saved before the
setting came still compares equal."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


@dataclass(frozen=True, kw_only=True)
class ImageConfig:
    """Network input: the camera image is scaled to `width`, then rows are cut from the top until `height`
    remain.

    mean and std are per RGB channel in 0..255 (ImageNet's, as StreamPETR's).
    """

    width: int = 704
    height: int = 256
    mean: tuple[float, float, float] = (123.675, 116.28, 103.53)
    std: tuple[float, float, float] = (58.395, 57.12, 57.375)

    def __post_init__(self) -> None:
        _require(
            self.width % 16 == 0 and self.height % 16 == 0 and self.width > 0 and self.height > 0,
            f"image size {self.width}x{self.height}: expected positive multiples of 16",
        )


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """ResNet `depth` with `base_channels` in its first stage (64 is the published network) and the neck's
    output.

    token_stride: stride in pixels of the one feature level whose cells are the decoder's tokens;
    auxiliary_stride: of the level the 2-D head reads, the same or finer; neck_channels: the width C of
    both.
    """

    depth: int = 50
    base_channels: int = 64
    token_stride: int = 16
    auxiliary_stride: int = 16
    neck_channels: int = 256

    def __post_init__(self) -> None:
        _require(self.depth in (18, 34, 50, 101), f"backbone depth {self.depth}: expected 18, 34, 50 or 101")
        _require(self.token_stride in (8, 16), f"token stride {self.token_stride}: expected 8 or 16")
        _require(
            self.auxiliary_stride in (8, 16) and self.auxiliary_stride <= self.token_stride,
            f"auxiliary stride {self.auxiliary_stride}: expected 8 or 16, up to {self.token_stride}",
        )


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Queries, memory and the transformer decoder.

    num_queries learnable queries plus num_propagated taken from the memory of memory_length slots; num_depths
    points along each ray for the position embedding; position_hidden the width of its MLP; position_range_m
    the half extents x, y, z in metres of the space that is normalised to 0..1. num_image_queries: that many
    more queries start at the peaks of the 2-D head, lifted to 3-D by its depth, with the content of that cell
    (after Far3D, Jiang et al. 2024; StreamPETR has none); with them the 2-D head runs at inference too. These
    queries are boxes (models/anchored_stream_petr.py). as_published: computes what StreamPETR's published
    weights were trained with, where ours differs: no projection before the tokens' own MLP, the spatial
    alignment told of points in 0..1 (ours: their inverse sigmoid) at other depths, remembered velocities told
    along the axes of the moment they were answered at (ours: the current ones). memory_interval_s: a frame
    that comes sooner after the newest remembered one is answered but not remembered, so that a memory trained
    on key frames holds what it knows, whatever the cameras' rate (ours; 0 remembers every frame).
    point_range_m: low x, y, z and high x, y, z in metres of the space of reference points and centres; None
    for +-position_range_m.
    """

    channels: int = 256
    num_layers: int = 6
    num_heads: int = 8
    ffn_channels: int = 2048
    dropout: float = 0.1
    num_queries: int = 300
    num_image_queries: int = 0
    num_propagated: int = 128
    memory_length: int = 512
    num_depths: int = 64
    position_hidden: int = 1024
    position_range_m: tuple[float, float, float] = (61.2, 61.2, 10.0)
    memory_interval_s: float = field(default=0.0, metadata=UNSAID)
    as_published: bool = field(default=False, metadata=UNSAID)
    point_range_m: tuple[float, ...] | None = field(default=None, metadata=UNSAID)

    def __post_init__(self) -> None:
        _require(
            self.channels % self.num_heads == 0,
            f"decoder channels {self.channels}: expected a multiple of num_heads {self.num_heads}",
        )
        reach = self.point_range_m
        _require(
            reach is None or (len(reach) == 6 and all(reach[i] < reach[i + 3] for i in range(3))),
            f"point range {reach}: expected low x, y, z and high x, y, z",
        )
        _require(
            not (self.as_published and self.num_image_queries),
            f"as_published with {self.num_image_queries} image queries: the published StreamPETR has none",
        )
        _require(
            0 <= self.memory_interval_s < 60,
            f"memory_interval_s {self.memory_interval_s}: expected 0 to 60 seconds",
        )
        _require(
            not self.as_published or self.num_depths > 30,
            f"{self.num_depths} depths: the published alignment reads the 30th last",
        )
        _require(self.channels % 2 == 0, f"decoder channels {self.channels}: expected an even number")
        _require(
            0 < self.num_propagated <= self.memory_length,
            f"num_propagated {self.num_propagated}: expected 1 .. memory_length {self.memory_length}",
        )


@dataclass(frozen=True, kw_only=True)
class SparseDecoderConfig:
    """SparseBEV's decoder (method.md section 5): num_layers steps of one layer; each query reads `points`
    points in each of `groups` channel groups, frame by frame, from `levels` pyramid levels (the coarsest of
    strides 4 to 32; a fifth is every second cell of stride 32). range_low_m and range_high_m bound the box
    centres, in the model's frame. as_published: computes what the published weights were trained with,
    where ours differs: a point that no camera sees reads the edge of the first camera's maps, if it lies
    within one cell of it (ours: nothing); levels are weighed by the weights of other groups
    (`sampling.scramble_groups`); distances are exact. num_image_queries: that many more queries start at the
    peaks of the dense 2-D head of the current frame, as boxes, and every step changes the box it was given
    instead of answering it anew (ours, as `DecoderConfig.num_image_queries` and `anchored`). link_proposals:
    the dense head looks at all frames of the window, and what it sees there tells image queries their
    velocity (ours; models/linking.py)."""

    channels: int = 256
    num_layers: int = 6
    num_heads: int = 8
    ffn_channels: int = 512
    dropout: float = 0.1
    num_queries: int = 900
    groups: int = 4
    points: int = 4
    levels: int = 4
    out_points: int = 128
    range_low_m: tuple[float, float, float] = (-51.2, -51.2, -5.0)
    range_high_m: tuple[float, float, float] = (51.2, 51.2, 3.0)
    num_image_queries: int = field(default=0, metadata=UNSAID)
    link_proposals: bool = field(default=False, metadata=UNSAID)
    as_published: bool = field(default=False, metadata=UNSAID)

    def __post_init__(self) -> None:
        _require(
            self.channels % self.num_heads == 0 and self.channels % self.groups == 0,
            f"decoder channels {self.channels}: expected a multiple of num_heads {self.num_heads} and groups "
            f"{self.groups}",
        )
        _require(2 <= self.levels <= 5, f"{self.levels} pyramid levels: expected 2 to 5")
        _require(
            math.isqrt(self.num_queries) ** 2 == self.num_queries > 0,
            f"num_queries {self.num_queries}: expected a square number, they start on a square grid",
        )
        _require(
            not (self.as_published and self.num_image_queries),
            f"as_published with {self.num_image_queries} image queries: the published SparseBEV has none",
        )
        _require(
            self.num_image_queries > 0 or not self.link_proposals,
            "link_proposals: expected num_image_queries, which are what is linked",
        )


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weights of the detection losses (StreamPETR's), of denoising and of the training-only 2-D head.

    code_weights follow the 10-d code; velocity takes no part in the matching.
    """

    classification: float = 2.0
    box_l1: float = 0.25
    code_weights: tuple[float, ...] = (2.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0)
    denoising: float = 1.0
    denoising_groups: int = 10
    denoising_noise: float = 1.0
    denoising_split: float = 0.75
    auxiliary: float = 1.0

    def __post_init__(self) -> None:
        _require(len(self.code_weights) == 10, f"{len(self.code_weights)} code weights: expected 10")


@dataclass(frozen=True, kw_only=True)
class DetectorConfig:
    """Everything that makes a detector; `preset` is its name.

    auxiliary_kind: the 2-D head for training: none, `dense` (ours, at which image queries start) or `focal`
    (StreamPETR's own). model_from_ego: the frame
    the network thinks in, where that is not ego, as a rigid transform; what goes in and comes out is in ego
    nevertheless. class_names: the classes of the outputs, in their order.
    """

    preset: str
    image: ImageConfig = field(default_factory=ImageConfig)
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    channels: tuple[str, ...] = CAMERA_CHANNELS
    class_names: tuple[str, ...] = CLASS_NAMES
    auxiliary_kind: str = field(default="dense", metadata=UNSAID)
    model_from_ego: Matrix | None = field(default=None, metadata=UNSAID)

    def __post_init__(self) -> None:
        _require(
            len(set(self.channels)) == len(self.channels) > 0,
            f"cameras {self.channels}: expected distinct names",
        )
        decoder = self.decoder
        _require(
            self.auxiliary_kind in ("none", "dense", "focal"),
            f"auxiliary_kind {self.auxiliary_kind!r}: expected none, dense or focal",
        )
        _require(
            self.auxiliary_kind == "dense" or not decoder.num_image_queries,
            f"{decoder.num_image_queries} image queries start at a dense 2-D head: expected one",
        )
        _check_proposals(decoder.num_image_queries, self.channels, self.image, self.backbone)
        _require(
            self.auxiliary_kind != "focal" or self.backbone.neck_channels % 32 == 0,
            f"auxiliary_kind focal, {self.backbone.neck_channels} neck channels: expected a multiple of 32",
        )
        _require(
            not decoder.as_published or decoder.channels == self.backbone.neck_channels,
            f"as_published with {self.backbone.neck_channels} neck channels: expected {decoder.channels}",
        )
        _check_matrix(self.model_from_ego)
        _require(
            self.model_from_ego is None or not decoder.num_image_queries,
            "model_from_ego: image queries need a model in the ego frame",
        )


@dataclass(frozen=True, kw_only=True)
class SparseBEVConfig:
    """Everything that makes a SparseBEV: the teacher where num_future is not 0, else student B.

    model_from_ego and class_names as in `DetectorConfig`.
    """

    preset: str
    image: ImageConfig = field(default_factory=ImageConfig)
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    decoder: SparseDecoderConfig = field(default_factory=SparseDecoderConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    num_past: int = 7
    num_future: int = 0
    channels: tuple[str, ...] = CAMERA_CHANNELS
    class_names: tuple[str, ...] = CLASS_NAMES
    model_from_ego: Matrix | None = field(default=None, metadata=UNSAID)

    def __post_init__(self) -> None:
        _check_matrix(self.model_from_ego)
        _require(
            self.num_past >= 0 and self.num_future >= 0,
            f"{self.num_past} past and {self.num_future} future frames: expected 0 or more",
        )
        _require(
            self.num_past > 0 or self.num_future == 0,
            "a window with a future needs a past frame: velocities are answered as the move since it",
        )
        _require(
            self.model_from_ego is None or not self.decoder.num_image_queries,
            "model_from_ego: image queries think in ego",
        )
        _require(
            not self.decoder.num_image_queries or self.auxiliary_level >= 0,
            f"image queries read stride {self.backbone.auxiliary_stride}; expected it among the "
            f"{self.decoder.levels} pyramid levels",
        )
        _check_proposals(self.decoder.num_image_queries, self.channels, self.image, self.backbone)

    @property
    def num_frames(self) -> int:
        """Frames in the window, the current one included."""
        return 1 + self.num_past + self.num_future

    @property
    def auxiliary_level(self) -> int:
        """Which pyramid level the 2-D head reads; negative if none has its stride."""
        return min(self.decoder.levels, 4) - {8: 3, 16: 2}[self.backbone.auxiliary_stride]


def to_dict(config: Any) -> dict[str, Any]:
    """Plain nested dict of a configuration, ready for JSON; without what is `UNSAID` and at its default."""
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if _is_said(config, f)}
    return {k: to_dict(v) if dataclasses.is_dataclass(v) else v for k, v in values.items()}


def _is_said(config: Any, field_: "dataclasses.Field[Any]") -> bool:
    return not field_.metadata.get("unsaid") or getattr(config, field_.name) != field_.default


def _check_proposals(
    count: int, channels: tuple[str, ...], image: ImageConfig, backbone: BackboneConfig
) -> None:
    """UserError for more image queries than there are cells for them to start at."""
    stride = backbone.auxiliary_stride
    cells = len(channels) * (image.height // stride) * (image.width // stride)
    _require(
        0 <= count <= cells,
        f"num_image_queries {count}: expected 0 to {cells}, the cells of {len(channels)} "
        f"{image.width}x{image.height} images at stride {stride}",
    )


def _check_matrix(matrix: Matrix | None) -> None:
    if matrix is None:
        return
    import numpy as np

    from ftkd_core.geometry import is_rigid

    _require(
        len(matrix) == 4 and all(len(row) == 4 for row in matrix) and is_rigid(np.array(matrix)),
        f"model_from_ego {matrix}: expected the four rows of a rigid transform",
    )


def from_dict(kind: type[ConfigT], values: dict[str, Any], path: str = "") -> ConfigT:
    """Configuration of type `kind` from a nested dict; an unknown key is a UserError that names its path
    and the nearest."""
    hints = typing.get_type_hints(kind)
    known = {f.name for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    arguments: dict[str, Any] = {}
    for key, value in values.items():
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1)
            hint = (
                f"; did you mean {path}{nearest[0]}?"
                if nearest
                else f"; expected one of {', '.join(sorted(known))}"
            )
            raise UserError(f"unknown configuration key {path}{key}{hint}")
        arguments[key] = _convert(hints[key], value, f"{path}{key}")
    return kind(**arguments)


def _convert(hint: Any, value: Any, path: str) -> Any:
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise UserError(f"configuration {path} is {value!r}; expected a mapping")
        return from_dict(hint, value, f"{path}.")  # type: ignore[arg-type]
    if isinstance(hint, types.UnionType):
        if value is None:
            return None
        hint = next(kind for kind in typing.get_args(hint) if kind is not type(None))
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, (list, tuple)):
            raise UserError(f"configuration {path} is {value!r}; expected a list")
        return tuple(tuple(item) if isinstance(item, list) else item for item in value)
    if hint is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 5e-4 as text
        except ValueError:
            raise UserError(f"configuration {path} is {value!r}; expected float") from None
    if hint in (int, float, str, bool) and type(value) is not hint:
        raise UserError(f"configuration {path} is {value!r}; expected {hint.__name__}")
    return value


def override(config: ConfigT, assignments: Sequence[str]) -> ConfigT:
    """A copy of the configuration with `a.b=value` assignments applied; values are read as YAML."""
    import yaml

    values = to_dict(config)
    for assignment in assignments:
        path, separator, text = assignment.partition("=")
        _require(bool(separator), f"override {assignment!r}: expected path=value")
        *parents, last = path.split(".")
        target = values
        for name in parents:
            if not isinstance(target.get(name), dict):
                raise UserError(
                    f"unknown configuration key {path}; expected one of {', '.join(sorted(target))}"
                )
            target = target[name]
        target[last] = yaml.safe_load(text)
    return from_dict(type(config), values)
