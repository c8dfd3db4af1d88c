# SPDX-License-Identifier: Apache-2.0
"""What one step teaches: batch and state in, weighted loss terms and new state out.

A lesson is the module that Fabric wraps, so that under DDP every parameter that learns is inside it. The
detector is its only part that is kept. Symbols: B streams or windows, T frames, N cameras.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ftkd_core.config import TOKEN_STRIDE, to_dict
from ftkd_core.data.clips import Clip, StreamBatch, StreamDataset
from ftkd_core.data.grid_mask import blank_some
from ftkd_core.data.windows import WindowBatch
from ftkd_core.distillation.cache import Manifest, TeacherCache, collate_outputs, describe
from ftkd_core.distillation.config import FTKDConfig
from ftkd_core.distillation.methods import MethodConfig, build_method
from ftkd_core.distillation.teacher_output import PreviousMaps, TeacherOutput, make_teacher_output
from ftkd_core.errors import UserError
from ftkd_core.losses.detection import DetectionCriterion
from ftkd_core.losses.target_filter import filter_targets
from ftkd_core.models.denoising import make_denoising
from ftkd_core.models.memory import Memory
from ftkd_core.models.predictions import Predictions
from ftkd_core.models.sparse_bev import SparseBEV
from ftkd_core.models.stream_petr import StreamPETR
from ftkd_core.runtime.preprocess import normalise
from ftkd_core.types import CameraRig, FrameWindow, Targets
from training.feature_cache import network_input
from training.teacher_inference import PYRAMID_STRIDES, by_stride, view_clip

State = tuple[Tensor, ...]
Teaching = WindowBatch | TeacherOutput  # what the teacher shall look at, or what a cache says it saw
_METHODS = ("ftkd", "mgd", "cwd", "stxd")  # that name their terms `method/...`
_STRIDES = (16, 32)  # of the maps that competing methods learn, as FTKD by default


def is_taught(name: str) -> bool:
    """Whether a loss term is a distillation method's; all others make the detection loss."""
    return name.split("/", maxsplit=1)[0] in _METHODS


class CachedDataset(Dataset[tuple[StreamBatch, TeacherOutput]]):
    """Item `step` is a stream batch and what the cache holds of the teacher's answers for its frames."""

    def __init__(self, streams: StreamDataset, cache: TeacherCache) -> None:
        self.streams, self.cache = streams, cache

    def __getitem__(self, step: int) -> tuple[StreamBatch, TeacherOutput]:
        chosen = [self.streams.choose(stream, step) for stream in self.streams.streams]
        return self.streams[step], collate_outputs([self.cache(c.number, c.frame) for c in chosen])


class Distiller(nn.Module):
    """The frozen teacher and a method between it and a student of `student_channels`, whose maps have
    map_channels {stride: width}.

    The teacher is no part of the module: it is never saved, averaged or trained.
    """

    def __init__(
        self, teacher: SparseBEV, config: MethodConfig, student_channels: int,
        map_channels: Mapping[int, int], code_weights: tuple[float, ...],
    ) -> None:  # fmt: skip
        super().__init__()
        self.config = config
        self._frozen = (teacher.eval().requires_grad_(False),)
        width = teacher.config.decoder.channels
        self.method = build_method(
            config,
            student_channels=student_channels,
            teacher_channels=width,
            map_channels={stride: (mine, width) for stride, mine in map_channels.items()},
            code_weights=code_weights,
            teacher=teacher.config,
        )

    @property
    def teacher(self) -> SparseBEV:
        """The frozen teacher."""
        return self._frozen[0]

    @torch.no_grad()
    def answer(self, batch: WindowBatch) -> TeacherOutput:
        """What the teacher says of the current frame of its windows."""
        window = batch.window(normalise(batch.images, self.teacher.config.image))
        predictions, pyramid = self.teacher(window)
        return self._answer(predictions, pyramid, batch.real)

    def answer_clip(self, clip: Clip) -> Iterator[TeacherOutput]:
        """The same for all frames of a clip in order, some at a time; features are extracted once."""
        for windows, predictions, pyramid in view_clip(self.teacher, clip):
            yield self._answer(predictions, pyramid, windows.real)

    def describe(self, teacher: str, data: str) -> Manifest:
        """What a cache of these answers depends on; `teacher` is a hash of its weights, `data` the name of
        the clips."""
        return describe(
            teacher=teacher, data=data, map_target=self.method.map_target, strides=self.method.strides,
            with_previous=self.method.needs_previous,
        )  # fmt: skip

    def _answer(self, predictions: Predictions, pyramid: Sequence[Tensor], real: Tensor) -> TeacherOutput:
        levels = by_stride(pyramid)
        return make_teacher_output(
            predictions,
            {stride: levels[stride] for stride in self.method.strides},
            real,
            self.teacher.config.num_past,
            self.method.map_target,
            map_frames=self.method.map_frames,
            with_previous=self.method.needs_previous,
        )

    def forward(
        self, student: Predictions, maps: Mapping[int, Tensor], teaching: Teaching, targets: Targets,
        generator: torch.Generator, previous: PreviousMaps | None = None,
    ) -> dict[str, Tensor]:  # fmt: skip
        answer = teaching if isinstance(teaching, TeacherOutput) else self.answer(teaching)
        terms: dict[str, Tensor] = self.method(student, maps, answer, targets, generator, previous)
        return terms


def split_item(item: StreamBatch | tuple[StreamBatch, Teaching]) -> tuple[StreamBatch, Teaching | None]:
    """What the student sees, and what it is taught, if it is."""
    if isinstance(item, StreamBatch):
        return item, None
    return item


class StreamLesson(nn.Module):
    """StreamPETR on a frame of each of B streams; with a distiller, a batch is (frame, teaching). grid_mask
    as in `AugmentConfig`."""

    def __init__(
        self, detector: StreamPETR, streams: int, distiller: Distiller | None = None, grid_mask: float = 0.0
    ) -> None:
        super().__init__()
        self.detector, self.streams, self.distiller = detector, streams, distiller
        self.grid_mask = grid_mask
        self.criterion = DetectionCriterion(detector.config)

    @property
    def settings(self) -> dict[str, Any]:
        """What a checkpoint must agree on to be resumed."""
        return _settings(self.detector, self.distiller)

    def start_state(self) -> State:
        """The state before the first step: the memory, and where a method relates frames, the maps of the
        frame before."""
        memory = self.detector.start_memory(self.streams)
        if self.distiller is None or not self.distiller.method.needs_previous:
            return tuple(memory)
        config, stride = self.detector.config, TOKEN_STRIDE
        size = (config.image.height // stride, config.image.width // stride)
        shape = (self.streams, len(config.channels), config.backbone.neck_channels, *size)
        return (*memory, memory.embedding.new_zeros(shape))

    def forward(
        self, batch: StreamBatch | tuple[StreamBatch, Teaching], state: State, generator: torch.Generator
    ) -> tuple[dict[str, Tensor], State]:
        seen, teaching = split_item(batch)
        config = self.detector.config
        _check_cameras(seen.rig, config.channels)
        targets = filter_targets(seen.targets, config)
        images = network_input(seen.images, config.image)
        frame = seen.frame(blank_some(images, self.grid_mask, generator))
        denoising = make_denoising(targets, config.loss, self.detector.range_m, generator)
        kept = len(Memory._fields)
        predictions, memory = self.detector(frame, Memory(*state[:kept]), denoising)
        terms: dict[str, Tensor] = self.criterion(predictions, targets, seen.rig, denoising)
        if self.distiller is not None:
            assert teaching is not None
            stride = TOKEN_STRIDE
            maps, previous = {stride: predictions.image_features}, None
            if state[kept:]:
                known = (~seen.is_first).to(predictions.image_features.dtype)
                previous = PreviousMaps({stride: state[kept]}, known)
            terms |= self.distiller(predictions, maps, teaching, targets, generator, previous)
        after = (*memory, *(predictions.image_features.detach().float() for _ in state[kept:]))
        return terms, after


class WindowLesson(nn.Module):
    """SparseBEV on B windows: the teacher, or student B, whose distiller sees the longer window that it is
    the beginning of. grid_mask as in `AugmentConfig`; a teacher beside the student sees whole images."""

    def __init__(
        self, detector: SparseBEV, distiller: Distiller | None = None, grid_mask: float = 0.0
    ) -> None:
        super().__init__()
        self.detector, self.distiller, self.grid_mask = detector, distiller, grid_mask
        self.criterion = DetectionCriterion(detector.config)
        if distiller is not None:
            theirs = distiller.teacher.config.num_past
            if detector.config.num_future or theirs != detector.config.num_past:
                raise UserError(
                    f"student with {detector.config.num_past} past and {detector.config.num_future} future "
                    f"frames, teacher with {theirs} past; expected as many past frames and no future"
                )

    @property
    def settings(self) -> dict[str, Any]:
        """What a checkpoint must agree on to be resumed."""
        return _settings(self.detector, self.distiller)

    def start_state(self) -> State:
        """Windows carry nothing from step to step."""
        return ()

    def forward(
        self, batch: WindowBatch, state: State, generator: torch.Generator
    ) -> tuple[dict[str, Tensor], State]:
        config = self.detector.config
        _check_cameras(batch.rig, config.channels)
        targets = filter_targets(batch.targets, config)
        mine = config.num_frames
        images = network_input(batch.images[:, :mine], config.image)
        rig = CameraRig(*(value[:, :mine] for value in batch.rig))
        images = blank_some(images, self.grid_mask, generator)
        window = FrameWindow(images, rig, batch.time[:, :mine])
        reach = batch.time.new_tensor(config.decoder.point_range_m[3:])
        denoising = make_denoising(targets, config.loss, reach, generator)
        predictions, pyramid = self.detector(window, denoising)
        now = CameraRig(*(value[:, 0] for value in batch.rig))
        terms: dict[str, Tensor] = self.criterion(predictions, targets, now, denoising)
        if self.distiller is not None:
            method, levels = self.distiller.method, by_stride(pyramid)
            levels = {stride: levels[stride] for stride in method.strides}
            taught = mine if method.map_frames == "all" else 1
            maps, previous = {s: level[:, :taught].flatten(0, 1) for s, level in levels.items()}, None
            if mine > 1:
                before = {stride: level[:, 1] for stride, level in levels.items()}
                previous = PreviousMaps(before, batch.real[:, 1].float())
            terms |= self.distiller(predictions, maps, batch, targets, generator, previous)
        return terms, state


def make_distiller(teacher: SparseBEV, student: StreamPETR | SparseBEV, config: MethodConfig) -> Distiller:
    """The distiller between two models. UserError where their images or classes differ."""
    mine, yours = student.config, teacher.config
    for name in ("image", "class_names", "channels"):
        if getattr(mine, name) != getattr(yours, name):
            raise UserError(
                f"student has {name} {getattr(mine, name)}, teacher {getattr(yours, name)}; expected the same"
            )
    maps = _map_channels(student, yours.decoder.levels, config)
    return Distiller(teacher, config, mine.decoder.channels, maps, mine.loss.code_weights)


def _map_channels(
    student: StreamPETR | SparseBEV, teacher_levels: int, config: MethodConfig
) -> dict[int, int]:
    """Width by stride of the student's maps that a method teaches; of strides that the teacher has too."""
    ftkd = config if isinstance(config, FTKDConfig) else None
    if isinstance(student, StreamPETR):
        if ftkd is not None and ftkd.pv_frames == "all":
            raise UserError("pv_frames all: a streaming student has one frame a step; expected current")
        backbone = student.config.backbone
        maps = {TOKEN_STRIDE: backbone.neck_channels}
        wanted = tuple(maps) if ftkd is None else ftkd.pv_strides
    else:
        maps = dict.fromkeys(
            PYRAMID_STRIDES[: student.config.decoder.levels], student.config.decoder.channels
        )
        wanted = _STRIDES if ftkd is None else ftkd.pv_strides
    maps = {stride: width for stride, width in maps.items() if stride in PYRAMID_STRIDES[:teacher_levels]}
    chosen = {stride: maps[stride] for stride in wanted if stride in maps}
    if ftkd is not None and ftkd.pv_weight and not chosen:
        raise UserError(
            f"pv_strides {list(wanted)}: student and teacher have maps of stride "
            f"{', '.join(map(str, maps))}; expected some of them, or pv_weight 0"
        )
    return chosen


def _check_cameras(rig: CameraRig, channels: tuple[str, ...]) -> None:
    """UserError where a batch has another number of cameras than the model's configuration says."""
    count = rig.mask.shape[-1]
    if count != len(channels):
        raise UserError(
            f"a batch of {count} cameras for a model of {len(channels)} ({', '.join(channels)}); expected "
            "those of model.channels"
        )


def _settings(detector: StreamPETR | SparseBEV, distiller: Distiller | None) -> dict[str, Any]:
    settings = {"model": to_dict(detector.config)}
    if distiller is not None:
        settings["method"] = to_dict(distiller.config)
        settings["teacher"] = to_dict(distiller.teacher.config)
    return settings


def difference(saved: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """How saved settings of a lesson differ from ours, the first few of them: `method.pv_target
    'current', here 'mean_residual'`; empty where they are the same as JSON. A setting that one of them lacks
    is `unset`: so it is in a run from before there was one."""
    theirs, mine = _flat(saved), _flat(json.loads(json.dumps(ours)))
    keys = sorted(key for key in {*theirs, *mine} if theirs.get(key, _UNSET) != mine.get(key, _UNSET))
    said = [f"{key} {theirs.get(key, _UNSET)!r}, here {mine.get(key, _UNSET)!r}" for key in keys[:_SAID]]
    return "; ".join(said + [f"{len(keys) - _SAID} more"] * (len(keys) > _SAID))


def _flat(settings: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Settings under dotted names."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        found |= _flat(value, f"{above}{name}.") if isinstance(value, Mapping) else {f"{above}{name}": value}
    return found


class _Unset:
    def __repr__(self) -> str:
        return "unset"


_UNSET: Final = _Unset()
_SAID: Final = 6
