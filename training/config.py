# SPDX-License-Identifier: Apache-2.0
"""Configuration of a training run: data, augmentation, optimizer and model."""

import math
from dataclasses import field
from typing import Annotated, Final, Literal

from pydantic import Field

from ftkd_core.config import DetectorConfig, SparseBEVConfig
from ftkd_core.config_class import Count, NotNegative, Positive, PositiveCount, Probability, config_class
from ftkd_core.data.augmentation import AugmentConfig
from ftkd_core.data.synthetic.traffic import world_config
from ftkd_core.data.synthetic.varied_rigs import check_rig_name

WEIGHT_DECAY: Final = 0.01
"""Weight decay of AdamW [public code of StreamPETR and SparseBEV]."""
MAX_GRADIENT_NORM: Final = 35.0
"""Norm at which the gradient is clipped [the same]."""
SLOW_RATIO: Final = 0.1
"""Learning rate of the parameters in `OptimConfig.slow`, as a share of their rate [public code]."""


@config_class
class DataConfig:
    """Scenes to train on: of the synthetic world, or with `root` of a nuScenes data set."""

    scenes: PositiveCount = 200
    """Synthetic scenes, of seeds 0, 1 and so on, rendered once into `cache`. Held-out scenes have seeds from
    900000."""
    duration_s: Positive = 20.0
    """Seconds per synthetic scene."""
    intervals_s: Annotated[tuple[Positive, ...], Field(min_length=1)] = (0.5,)
    """Seconds between frames; scenes take these values in turn. 0.5 to 0.083 trains for 2 to 12 Hz."""
    segment: PositiveCount = 10
    """Consecutive frames that a stream takes from a scene."""
    window: Count = 0
    """Frames per window of a streaming student that is trained on windows instead of streams; the
    last one has a loss (sliding_window.py). 0 uses streams."""
    cache: str = "build/clips"
    """Folder of rendered clips, cached features and the index of a data set."""
    world: str = "ordinary"
    """Synthetic world: `ordinary`, or `traffic`, in which most objects move and brake, turn and overtake."""
    rig: str = "nuscenes"
    """Cameras in the synthetic world: `nuscenes`; `varied`, where each scene draws its own rig, seen through
    virtual cameras; or the name of a rig (synthetic/rig_presets.py)."""
    hide_future: Probability = 0.0
    """Share of a teacher's windows whose future frames are hidden in training, so that one teacher predicts
    with and without its future."""
    workers: Count = 1
    """Processes that load data; 0 loads in the training process."""
    root: str = ""
    """Folder of a nuScenes data set; empty uses the synthetic world."""
    nuscenes: str = "v1.0-trainval"
    """Version of the data set."""
    split: str = "train"
    """Split of the data set."""
    order: Literal["random", "epochs"] = "random"
    """`random` draws a scene and a first frame each time; `epochs` takes every frame once per epoch
    (ftkd_core/data/order.py)."""
    half_decode: bool = False
    """Decode images of `root` at half size if the network needs no more (nuscenes_clips.py): faster, with
    almost the same pixels."""
    cache_features: bool = False
    """Read the features of a frozen backbone from `cache` instead of computing them (feature_cache.py)."""

    def __post_init__(self) -> None:
        world_config(self.world)
        check_rig_name(self.rig)


@config_class
class OptimConfig:
    """AdamW with linear warm-up and cosine decay.

    SparseBEV and StreamPETR keep parts of a pretrained backbone fixed: `backbone_norms`, `frozen_stages`.
    """

    lr: NotNegative = 4e-4
    """Learning rate after warm-up."""
    decay_all: bool = False
    """Whether norms, biases and learned points are decayed too [public code]."""
    warmup_steps: Count = 200
    """Steps of the warm-up."""
    warmup_start: Probability = 0.0
    """Learning rate at the first step, as a share of `lr`."""
    final_ratio: Probability = 0.01
    """Learning rate at the last step, as a share of `lr`."""
    backbone_ratio: NotNegative = 1.0
    """Learning rate of the backbone, as a share of the others'; 0 freezes it, its statistics included."""
    backbone_norms: Literal["learn", "keep_statistics", "frozen"] = "learn"
    """Batch norms of the backbone: `learn` from scratch, `keep_statistics` as at inference while gain and
    offset learn [public code: SparseBEV], or `frozen` [public code: StreamPETR]."""
    frozen_stages: Annotated[int, Field(ge=0, le=4)] = 0
    """If more than 0, the stem and that many of the backbone's four stages are frozen."""
    slow: tuple[str, ...] = ()
    """Parameters with one of these parts in their dotted name learn at `SLOW_RATIO` of their rate."""
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.998
    """Decay of the averaged weights; 0 averages nothing."""

    def rate(self, step: int, steps: int) -> float:
        """Return the learning rate at a step of a run of `steps`."""
        warm = min(1.0, (step + 1) / max(self.warmup_steps, 1))
        progress = min(1.0, max(0.0, (step - self.warmup_steps) / max(steps - self.warmup_steps, 1)))
        cosine = self.final_ratio + (1 - self.final_ratio) * 0.5 * (1 + math.cos(math.pi * progress))
        return self.lr * (self.warmup_start + (1 - self.warmup_start) * warm) * cosine


@config_class
class RunConfig:
    """Settings of a run besides its model."""

    steps: PositiveCount = 20000
    """Optimizer steps of the whole run."""
    streams: PositiveCount = 4
    """Batch size of each process: scenes, or windows, that are trained on in parallel."""
    seed: Count = 0
    """Seed of weights, order of the data, augmentation and masks."""
    save_every: PositiveCount = 500
    """Steps between checkpoints."""
    init_parts: str = ""
    """Parts of the model that `--init` provides, comma-separated; empty takes all."""
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)


@config_class
class TrainConfig(RunConfig):
    """A run of the streaming detector."""

    model: DetectorConfig


@config_class
class WindowTrainConfig(RunConfig):
    """A run of a SparseBEV."""

    model: SparseBEVConfig
