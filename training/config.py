# SPDX-License-Identifier: Apache-2.0
"""What a run of training is set to, beside its model's configuration."""

import math
from dataclasses import dataclass, field
from typing import Final

from ftkd_core.config import DetectorConfig, SparseBEVConfig
from ftkd_core.data.augmentation import AugmentConfig
from ftkd_core.errors import UserError

_NORMS: Final = ("learn", "keep_statistics", "frozen")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Training scenes are seeds first_seed .. first_seed + scenes - 1 of the synthetic world, rendered once
    into `cache`; held-out scenes of the project start at seed 900000. Their frames are `intervals_s` apart,
    each scene at the next of them (a student for 2 to 12 Hz is shown 0.5 to 0.083). With `root`, a nuScenes
    data set, they are the scenes of `split` of its `nuscenes` version instead, indexed once into `cache`.
    Segments of `segment` frames are trained on as one stream; with `window`, every step sees windows of that
    many frames instead and learns from their last `graded` (sliding.py). cache_features reads a frozen
    backbone's features from `cache` instead of running it (feature_cache.py). `order` is `random`, a scene
    and where to begin in it drawn anew each time, or `epochs`, every frame once an epoch (order.py).
    half_decode reads the images of `root` faster, hardly otherwise (nuscenes_clips.py: ImageFiles).
    Errors: UserError for another order."""

    scenes: int = 200
    first_seed: int = 0
    duration_s: float = 20.0
    intervals_s: tuple[float, ...] = (0.5,)
    segment: int = 10
    window: int = 0
    graded: int = 1
    cache: str = "build/clips"
    version: str = ""
    workers: int = 1
    root: str = ""
    nuscenes: str = "v1.0-trainval"
    split: str = "train"
    order: str = "random"
    half_decode: bool = False
    cache_features: bool = False

    def __post_init__(self) -> None:
        if self.order not in ("random", "epochs"):
            raise UserError(f"data.order is {self.order!r}; expected random or epochs")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW with linear warm-up from warmup_start * lr and cosine decay to final_ratio * lr.

    weight_decay applies to weights and, with decay_all, also to norms, biases and learned points. clip_norm:
    largest gradient norm. ema: decay of the averaged weights (0: no averaging).
    backbone_ratio: the backbone learns at backbone_ratio * lr (1 from scratch; 0: frozen, with its
    statistics). backbone_norms: its batch norms `learn` (from scratch), `keep_statistics` (of inference; gain
    and offset learn: SparseBEV) or are `frozen` (gain and offset too: StreamPETR). frozen_stages: freeze the
    stem and the first so many of the four stages; 0 freezes nothing. slow: parameters with one of these
    parts in their dotted name learn at slow_ratio of their rate. Raises UserError for values out of range.
    """

    lr: float = 4e-4
    weight_decay: float = 0.01
    decay_all: bool = False
    warmup_steps: int = 200
    warmup_start: float = 0.0
    final_ratio: float = 0.01
    clip_norm: float = 35.0
    backbone_ratio: float = 1.0
    backbone_norms: str = "learn"
    frozen_stages: int = 0
    slow: tuple[str, ...] = ()
    slow_ratio: float = 0.1
    ema: float = 0.998

    def __post_init__(self) -> None:
        if self.backbone_norms not in _NORMS:
            raise UserError(
                f"optim.backbone_norms {self.backbone_norms!r}: expected one of {', '.join(_NORMS)}"
            )
        if not 0 <= self.frozen_stages <= 4:
            raise UserError(
                f"optim.frozen_stages {self.frozen_stages}: expected 0 (none) to 4 (the stem and all stages)"
            )
        if not 0 < self.slow_ratio <= 1:
            raise UserError(f"optim.slow_ratio {self.slow_ratio}: expected more than 0, at most 1")
        if not 0 <= self.warmup_start <= 1:
            raise UserError(f"optim.warmup_start {self.warmup_start}: expected 0 to 1")

    def rate(self, step: int, steps: int) -> float:
        """Return the learning rate at a step of a run of `steps`."""
        warm = min(1.0, (step + 1) / max(self.warmup_steps, 1))
        progress = min(1.0, max(0.0, (step - self.warmup_steps) / max(steps - self.warmup_steps, 1)))
        cosine = self.final_ratio + (1 - self.final_ratio) * 0.5 * (1 + math.cos(math.pi * progress))
        return self.lr * (self.warmup_start + (1 - self.warmup_start) * warm) * cosine


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What surrounds a model in one run; `streams` is the batch size of each process, `init_parts` names the
    parts of the model, comma-separated, that --init is to give (none: all of it)."""

    steps: int = 20000
    streams: int = 4
    seed: int = 0
    save_every: int = 500
    init_parts: str = ""
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)


@dataclass(frozen=True, kw_only=True)
class TrainConfig(RunConfig):
    """A run of the streaming student."""

    model: DetectorConfig


@dataclass(frozen=True, kw_only=True)
class WindowTrainConfig(RunConfig):
    """A run of a SparseBEV."""

    model: SparseBEVConfig
