# SPDX-License-Identifier: Apache-2.0
"""Build the clip source and the data set of a training run from its configuration."""

from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from lightning_fabric import Fabric
from torch.utils.data import Dataset

from ftkd_core.config import SparseBEVConfig
from ftkd_core.data.augmentation import Augmentation, AugmentConfig, seeded_view
from ftkd_core.data.clip_selection import only_keys, select_cameras
from ftkd_core.data.clips import Clip, ClipSource, StreamBatch, StreamDataset
from ftkd_core.data.order import EpochOrder
from ftkd_core.data.synthetic.rig_presets import DEFAULT_RIG
from ftkd_core.data.synthetic_clips import SyntheticClips
from ftkd_core.data.windows import PairedDataset, WindowBatch, WindowDataset
from ftkd_core.distillation.cache import TeacherCache, collate_outputs
from ftkd_core.distillation.teacher_output import TeacherOutput
from ftkd_core.errors import UserError
from ftkd_core.models.sparse_bev import SparseBEV
from ftkd_core.models.stream_petr import StreamPETR
from training.config import RunConfig, TrainConfig, WindowTrainConfig
from training.feature_cache import cache_features, refuse_image_augmentation

if TYPE_CHECKING:
    from ftkd_core.data.nuscenes_clips import NuScenesClips


class CachedDataset(Dataset[tuple[StreamBatch, TeacherOutput]]):
    """Item `step` is a stream batch with the cached teacher outputs of its frames."""

    def __init__(self, streams: StreamDataset, cache: TeacherCache) -> None:
        self.streams, self.cache = streams, cache

    def __getitem__(self, step: int) -> tuple[StreamBatch, TeacherOutput]:
        chosen = [self.streams.select_frame(stream, step) for stream in self.streams.streams]
        clips = self.streams.num_clips
        outputs = [self.cache(c.view * clips + c.clip_index, c.frame) for c in chosen]
        return self.streams[step], collate_outputs(outputs)


class CachedWindows(Dataset[tuple[WindowBatch, TeacherOutput]]):
    """Item `step` is a batch of windows with the cached teacher outputs of their current frames. The future
    frames of the teacher are not read."""

    def __init__(self, windows: WindowDataset, cache: TeacherCache) -> None:
        self.windows, self.cache = windows, cache

    def __getitem__(self, step: int) -> tuple[WindowBatch, TeacherOutput]:
        clips = self.windows.num_clips
        chosen = [self.windows.select(step, place) for place in range(self.windows.batch)]
        outputs = [self.cache(c.view * clips + c.clip_index, c.key) for c in chosen]
        return self.windows[step], collate_outputs(outputs)


def teacher_view(
    clips: ClipSource, scenes: int, augment: AugmentConfig, number: int
) -> tuple[Clip, Augmentation]:
    """Return the key frames and the augmentation of a shard of the teacher's cache: scene `number` modulo
    `scenes`, in view `number` // `scenes`."""
    view, index = divmod(number, scenes)
    change = seeded_view(augment, index, view) if augment.views else Augmentation()
    return only_keys(clips(index)), change


StreamingDataset: TypeAlias = StreamDataset | PairedDataset | CachedDataset
"""Data sets of a streaming student: without a teacher, with the teacher's windows, with cached outputs."""


def open_clips(config: TrainConfig | WindowTrainConfig, fabric: Fabric) -> tuple[ClipSource, int]:
    """Return the training clips and their number. The first process renders or indexes missing scenes."""
    data = config.data
    if data.root:
        from ftkd_core.data.nuscenes_clips import NuScenesClips  # only data.root needs the devkit

        if data.intervals_s != (0.5,):
            raise UserError(
                f"data.intervals_s {data.intervals_s} with data.root: nuScenes is annotated at 2 Hz; leave it"
            )
        if data.rig != DEFAULT_RIG:
            raise UserError(
                f"data.rig {data.rig!r} with data.root: a data set has its own cameras; leave it out"
            )
        real = NuScenesClips(
            Path(data.root), data.nuscenes, data.split, config.model.image, config.model.channels,
            Path(data.cache), half_decode=data.half_decode, sweeps=data.sweeps != (0, 0),
        )  # fmt: skip
        if fabric.is_global_zero:
            real.prepare()
        fabric.barrier()
        return real, len(real)
    if data.sweeps != (0, 0):
        raise UserError(
            f"data.sweeps {list(data.sweeps)} without data.root: rendered scenes have no frames between key "
            "frames; leave it out, or set data.intervals_s"
        )
    rendered = SyntheticClips(
        0, config.model.image, Path(data.cache), data.duration_s, data.intervals_s, data.world, data.rig
    )
    chosen = select_cameras(rendered, config.model.channels)
    if fabric.is_global_zero:
        rendered.render_all(data.scenes)
    fabric.barrier()
    return chosen, data.scenes


def validation_clips(
    config: TrainConfig | WindowTrainConfig, root: str, version: str, split: str, fabric: Fabric
) -> "NuScenesClips":
    """Return the key frames of a split; root and version default to those of the training data. The first
    process indexes missing scenes. Raise UserError for a run without a data set."""
    from ftkd_core.data.nuscenes_clips import NuScenesClips

    data = config.data
    if not (root or data.root):
        raise UserError(
            "--validate-every without data.root: rendered scenes have no tables; write a data set with "
            "`ftkd synth` and give it as --validate-root and --validate-version"
        )
    clips = NuScenesClips(
        Path(root or data.root), version or data.nuscenes, split, config.model.image, config.model.channels,
        Path(data.cache),
    )  # fmt: skip
    if fabric.is_global_zero:
        clips.prepare()
    fabric.barrier()
    return clips


def with_cached_features(
    config: RunConfig, model: StreamPETR | SparseBEV, clips: ClipSource, scenes: int, fabric: Fabric
) -> ClipSource:
    """Return the clips with cached features if `data.cache_features` is set, else unchanged.

    Raises UserError if training would change images or backbone.
    """
    if not config.data.cache_features:
        return clips
    refuse_image_augmentation(config.augment, config.optim.backbone_ratio)
    extracted_here = scenes if fabric.is_global_zero else 0  # the first process extracts for all
    cached = cache_features(model, clips, Path(config.data.cache), extracted_here, fabric.device)
    fabric.barrier()
    return cached


def make_streams(config: TrainConfig, clips: ClipSource, scenes: int, fabric: Fabric) -> StreamDataset:
    """Return the frames of streams that a streaming student sees."""
    data = config.data
    if data.sweeps != (0, 0):
        raise UserError(
            f"data.sweeps {list(data.sweeps)}: a StreamPETR is trained on key frames; leave it out"
        )
    if data.window and not data.segment:
        raise UserError("data.segment 0 with data.window: every segment is a window of equal length; set it")
    segment = data.window or data.segment
    return StreamDataset(
        clips,
        scenes,
        num_streams=config.streams,
        segment=segment,
        augment=config.augment,
        seed=config.seed,
        first_stream=config.streams * fabric.global_rank,
        all_streams=config.streams * fabric.world_size,
        staggered=not config.data.window,
        order=_epoch_order(config, clips, scenes, segment),
    )


def make_windows(
    config: WindowTrainConfig,
    clips: ClipSource,
    scenes: int,
    fabric: Fabric,
    teacher: SparseBEVConfig | None,
) -> WindowDataset:
    """Return the data set of a SparseBEV: windows with the future frames of the teacher, if there is one."""
    return WindowDataset(
        clips,
        scenes,
        batch=config.streams,
        num_past=config.model.num_past,
        num_future=config.model.num_future if teacher is None else teacher.num_future,
        augment=config.augment,
        seed=config.seed,
        rank=fabric.global_rank,
        ranks=fabric.world_size,
        order=_epoch_order(config, clips, scenes, 1),
        hide_future=config.data.hide_future if teacher is None else 0.0,
        sweeps=config.data.sweeps,
    )


def _epoch_order(config: RunConfig, clips: ClipSource, scenes: int, segment: int) -> EpochOrder | None:
    """Return the epoch order if `data.order` is `epochs`."""
    if config.data.order == "random":
        return None
    return EpochOrder([clips(index).num_keys for index in range(scenes)], segment, config.seed)
