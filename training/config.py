# SPDX-License-Identifier: Apache-2.0
"""What a run of training is set to, beside its model's configuration."""

from dataclasses import dataclass, field

from ftkd_core.config import DetectorConfig, SparseBEVConfig
from ftkd_core.data.augmentation import AugmentConfig
from ftkd_core.errors import UserError
from training.trainer import OptimConfig


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Training scenes are seeds first_seed .. first_seed + scenes - 1 of the synthetic world, rendered once
    into `cache`; held-out scenes of the project start at seed 900000. Their frames are `intervals_s` apart,
    each scene at the next of them (a student for 2 to 12 Hz is shown 0.5 to 0.083). With `root`, a nuScenes
    data set, they are the scenes of `split` of its `nuscenes` version instead, indexed once into `cache`.
    Segments of `segment` frames are trained on as one stream; with `window`, every step sees windows of that
    many frames instead and learns from their last `graded` (sliding.py). keep_features reads a frozen
    backbone's features from `cache` instead of running it (kept_features.py). `order` is `random`, a scene
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
    keep_features: bool = False

    def __post_init__(self) -> None:
        if self.order not in ("random", "epochs"):
            raise UserError(f"data.order is {self.order!r}; expected random or epochs")


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
