# SPDX-License-Identifier: Apache-2.0
"""What a run is served, as its settings ask for it: clips, and frames or windows of them, step by step."""

from pathlib import Path
from typing import Any

from lightning_fabric import Fabric
from torch.utils.data import Dataset

from ftkd_core.config import SparseBEVConfig
from ftkd_core.data.clips import ClipSource, StreamDataset, choose_cameras
from ftkd_core.data.order import EpochOrder
from ftkd_core.data.synthetic_clips import SyntheticClips
from ftkd_core.data.windows import PairedDataset, WindowDataset
from ftkd_core.errors import UserError
from ftkd_core.models.sparse_bev import SparseBEV
from ftkd_core.models.stream_petr import StreamPETR
from training.config import RunConfig, TrainConfig, WindowTrainConfig
from training.feature_cache import keep_features, refuse_images


def open_clips(config: TrainConfig | WindowTrainConfig, fabric: Fabric) -> tuple[ClipSource, int]:
    """The clips to train on, rendered or indexed where they are not yet, and their number."""
    data = config.data
    if data.root:
        from ftkd_core.data.nuscenes_clips import NuScenesClips  # the devkit: only a data.root needs it

        if data.intervals_s != (0.5,):
            raise UserError(
                f"data.intervals_s {data.intervals_s} with data.root: nuScenes is annotated at 2 Hz; leave it"
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
        0, config.model.image, Path(data.cache), data.duration_s, data.version, data.intervals_s
    )
    chosen = choose_cameras(rendered, config.model.channels)
    if fabric.is_global_zero:
        rendered.render_all(data.scenes)
    fabric.barrier()
    return chosen, data.scenes


def kept_clips(
    config: RunConfig, model: StreamPETR | SparseBEV, clips: ClipSource, scenes: int, fabric: Fabric
) -> ClipSource:
    """The clips as `data.cache_features` asks for them: with images, or with features that the model then
    takes. Errors: UserError where images or backbone would change."""
    if not config.data.cache_features:
        return clips
    refuse_images(config.augment, config.optim.backbone_ratio)
    mine = scenes if fabric.is_global_zero else 0  # the first process extracts for all
    kept = keep_features(model, clips, Path(config.data.cache), mine, fabric.device)
    fabric.barrier()
    return kept


def make_dataset(
    config: TrainConfig | WindowTrainConfig,
    clips: ClipSource,
    scenes: int,
    fabric: Fabric,
    teacher: SparseBEVConfig | None,
) -> Dataset[Any]:
    """What the run's lesson is served: frames of streams or windows, and the teacher's windows with them."""
    if isinstance(config, WindowTrainConfig):
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
            order=_order(config, clips, scenes, 1),
        )
    segment = config.data.window or config.data.segment
    streams = StreamDataset(
        clips,
        scenes,
        num_streams=config.streams,
        segment=segment,
        augment=config.augment,
        seed=config.seed,
        first_stream=config.streams * fabric.global_rank,
        all_streams=config.streams * fabric.world_size,
        staggered=not config.data.window,
        order=_order(config, clips, scenes, segment),
    )
    return streams if teacher is None else PairedDataset(streams, teacher.num_past, teacher.num_future)


def _order(config: RunConfig, clips: ClipSource, scenes: int, segment: int) -> EpochOrder | None:
    """The order of epochs where `data.order` asks for one."""
    if config.data.order == "random":
        return None
    return EpochOrder([len(clips(index).times) for index in range(scenes)], segment, config.seed)
