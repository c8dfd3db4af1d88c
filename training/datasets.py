# SPDX-License-Identifier: Apache-2.0
"""Build the clip source and the data set of a training run from its configuration."""

from pathlib import Path
from typing import TypeAlias

from lightning_fabric import Fabric
from torch.utils.data import Dataset

from ftkd_core.config import SparseBEVConfig
from ftkd_core.data.clips import ClipSource, StreamBatch, StreamDataset, select_cameras
from ftkd_core.data.order import EpochOrder
from ftkd_core.data.synthetic.rig_presets import DEFAULT_RIG
from ftkd_core.data.synthetic_clips import SyntheticClips
from ftkd_core.data.windows import PairedDataset, WindowDataset
from ftkd_core.distillation.cache import TeacherCache, collate_outputs
from ftkd_core.distillation.teacher_output import TeacherOutput
from ftkd_core.errors import UserError
from ftkd_core.models.sparse_bev import SparseBEV
from ftkd_core.models.stream_petr import StreamPETR
from training.config import RunConfig, TrainConfig, WindowTrainConfig
from training.feature_cache import cache_features, refuse_image_augmentation


class CachedDataset(Dataset[tuple[StreamBatch, TeacherOutput]]):
    """Item `step` is a stream batch with the cached teacher outputs of its frames."""

    def __init__(self, streams: StreamDataset, cache: TeacherCache) -> None:
        self.streams, self.cache = streams, cache

    def __getitem__(self, step: int) -> tuple[StreamBatch, TeacherOutput]:
        chosen = [self.streams.select_frame(stream, step) for stream in self.streams.streams]
        return self.streams[step], collate_outputs([self.cache(c.clip_index, c.frame) for c in chosen])


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
            Path(data.cache), half_decode=data.half_decode,
        )  # fmt: skip
        if fabric.is_global_zero:
            real.prepare()
        fabric.barrier()
        return real, len(real)
    rendered = SyntheticClips(
        0, config.model.image, Path(data.cache), data.duration_s, data.intervals_s, data.world, data.rig
    )
    chosen = select_cameras(rendered, config.model.channels)
    if fabric.is_global_zero:
        rendered.render_all(data.scenes)
    fabric.barrier()
    return chosen, data.scenes


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
    segment = config.data.window or config.data.segment
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
    )


def _epoch_order(config: RunConfig, clips: ClipSource, scenes: int, segment: int) -> EpochOrder | None:
    """Return the epoch order if `data.order` is `epochs`."""
    if config.data.order == "random":
        return None
    return EpochOrder([len(clips(index).times) for index in range(scenes)], segment, config.seed)
