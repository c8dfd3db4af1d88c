# SPDX-License-Identifier: Apache-2.0
"""Configuration of a training run: data, augmentation, optimizer and model."""

import math
from dataclasses import field
from typing import Annotated, Final, Literal

from pydantic import Field

from ftkd_core.config import DetectorConfig, SparseBEVConfig
from ftkd_core.config_class import (
    Count,
    NotNegative,
    Positive,
    PositiveCount,
    Probability,
    config_class,
    require,
)
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
    segment: Count = 10
    """Consecutive frames that a stream takes from a scene; 0 with order `epochs` takes halves of scenes, of
    any length [public code: StreamPETR, `seq_split_num=2`]."""
    sweeps: tuple[Count, Count] = (0, 0)
    """Least and most camera rounds (12 Hz) between the frames of a SparseBEV's window in `root`, drawn per
    window; [0, 0] takes key frames, which are 6 rounds apart [public code: 4 to 8]."""
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
        least, most = self.sweeps
        require(
            self.sweeps == (0, 0) or 1 <= least <= most,
            f"sweeps {list(self.sweeps)}: expected [0, 0], or at least 1 and no more than the second",
        )
        require(
            self.segment > 0 or self.order == "epochs",
            "segment 0 (halves of scenes): expected order epochs, which cuts every scene in halves",
        )


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
    hold_steps: PositiveCount = 1
    """Steps between changes of the decaying rate: those of an epoch in SparseBEV [public code]."""
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
        step -= step % self.hold_steps
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
    recompute: bool = False
    """Activation checkpointing in backbone and decoder: less memory, the same gradients, one more forward
    pass [public code: with_cp]."""
    accumulate: PositiveCount = 1
    """Parts in which a process runs its batch, a divisor of `streams`. The optimizer takes one step with the
    mean of their gradients."""
    gradient_frames: Count = 0
    """First frames of a SparseBEV's window whose features have gradients; 0 is all [public code:
    stop_prev_grad]."""
    init_parts: str = ""
    """Parts of the model that `--init` provides, comma-separated; empty takes all."""
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)

    def __post_init__(self) -> None:
        require(
            self.streams % self.accumulate == 0,
            f"accumulate {self.accumulate}: expected a divisor of the {self.streams} streams of a process",
        )


@config_class
class TrainConfig(RunConfig):
    """A run of the streaming detector."""

    model: DetectorConfig

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_mirrored(self, self.model.auxiliary_kind == "dense")


@config_class
class WindowTrainConfig(RunConfig):
    """A run of a SparseBEV."""

    model: SparseBEVConfig

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_mirrored(self, self.model.has_dense_head)


def _check_mirrored(config: RunConfig, has_dense_head: bool) -> None:
    require(
        not (config.augment.as_published and config.augment.flip and has_dense_head),
        "augment.as_published with the dense 2-D head: it cannot read mirrored images of a world that is not "
        "mirrored; set augment.flip=0, or leave augment.as_published out",
    )
