# SPDX-License-Identifier: Apache-2.0
"""Training tasks: compute the weighted losses and the next state for one batch.

A task is the module that Fabric wraps, so that under DDP it contains every trained parameter. Only its
detector is kept after training. Symbols: B streams or windows, T frames, N cameras.
"""

from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ftkd_core.config import TOKEN_STRIDE, to_dict
from ftkd_core.data.clips import StreamBatch
from ftkd_core.data.grid_mask import apply_grid_mask
from ftkd_core.data.windows import WindowBatch
from ftkd_core.distillation.teacher_output import PreviousMaps
from ftkd_core.errors import UserError
from ftkd_core.losses.detection import DetectionCriterion
from ftkd_core.losses.target_filter import filter_targets
from ftkd_core.models.denoising import make_denoising
from ftkd_core.models.memory import Memory
from ftkd_core.models.position import TokenGeometry
from ftkd_core.models.predictions import Predictions
from ftkd_core.models.sparse_bev import SparseBEV
from ftkd_core.models.stream_petr import StreamPETR
from ftkd_core.types import CameraRig, FrameWindow, Targets
from training.distiller import Distiller, TeacherInput
from training.feature_cache import network_input
from training.teacher_inference import by_stride

State: TypeAlias = tuple[Tensor, ...]
"""Tensors that a task carries from step to step."""
_MEMORY_FIELDS = len(Memory._fields)


def split_item(
    item: StreamBatch | tuple[StreamBatch, TeacherInput],
) -> tuple[StreamBatch, TeacherInput | None]:
    """Split an item of a data set into the student's batch and the teacher's input, None without a
    teacher."""
    if isinstance(item, StreamBatch):
        return item, None
    return item


class StreamingTask(nn.Module):
    """StreamPETR on one frame of each of B streams; with a distiller, an item is (frame, teacher input).
    grid_mask as in `AugmentConfig`."""

    def __init__(
        self, detector: StreamPETR, streams: int, distiller: Distiller | None = None, grid_mask: float = 0.0
    ) -> None:
        super().__init__()
        self.detector, self.streams, self.distiller = detector, streams, distiller
        self.grid_mask = grid_mask
        self.criterion = DetectionCriterion(detector.config)

    @property
    def settings(self) -> dict[str, Any]:
        """Configurations that must equal those of a checkpoint to resume it."""
        return _settings(self.detector, self.distiller)

    def start_state(self) -> State:
        """Return the state before the first step: the memory and, if the method relates consecutive frames,
        the previous feature maps (B, N, C, H, W)."""
        memory = self.detector.start_memory(self.streams)
        if self.distiller is None or not self.distiller.method.needs_previous:
            return tuple(memory)
        config, stride = self.detector.config, TOKEN_STRIDE
        size = (config.image.height // stride, config.image.width // stride)
        shape = (self.streams, len(config.channels), config.backbone.neck_channels, *size)
        return (*memory, memory.embedding.new_zeros(shape))

    def forward(
        self, item: StreamBatch | tuple[StreamBatch, TeacherInput], state: State, generator: torch.Generator
    ) -> tuple[dict[str, Tensor], State]:
        batch, source = split_item(item)
        config = self.detector.config
        _check_cameras(batch.rig, config.channels)
        targets = filter_targets(batch.targets, config)
        images = network_input(batch.images)
        frame = batch.frame(apply_grid_mask(images, self.grid_mask, generator))
        denoising = make_denoising(targets, config.loss, self.detector.range_m, generator)
        predictions, memory = self.detector(
            frame, Memory(*state[:_MEMORY_FIELDS]), denoising, visible_geometry(self.detector, batch)
        )
        terms: dict[str, Tensor] = self.criterion(predictions, targets, batch.rig, denoising)
        if self.distiller is not None:
            assert source is not None
            terms |= self._distil(batch, source, predictions, targets, state, generator)
        previous = state[_MEMORY_FIELDS:]
        return terms, (*memory, *(predictions.image_features.detach().float() for _ in previous))

    def _distil(
        self, batch: StreamBatch, source: TeacherInput, predictions: Predictions, targets: Targets,
        state: State, generator: torch.Generator,
    ) -> dict[str, Tensor]:  # fmt: skip
        assert self.distiller is not None
        stride = TOKEN_STRIDE
        previous = None
        if state[_MEMORY_FIELDS:]:
            known = (~batch.is_first).to(predictions.image_features.dtype)
            previous = PreviousMaps({stride: state[_MEMORY_FIELDS]}, known)
        maps = {stride: predictions.image_features}
        terms: dict[str, Tensor] = self.distiller(predictions, maps, source, targets, generator, previous)
        return terms


class WindowTask(nn.Module):
    """SparseBEV on B windows: the teacher, or the window student, whose frames are the first of the longer
    windows that its distiller receives.

    grid_mask as in `AugmentConfig`; the distiller's teacher sees unmasked images.
    """

    def __init__(
        self, detector: SparseBEV, distiller: Distiller | None = None, grid_mask: float = 0.0
    ) -> None:
        super().__init__()
        self.detector, self.distiller, self.grid_mask = detector, distiller, grid_mask
        self.criterion = DetectionCriterion(detector.config)
        if distiller is not None:
            teacher_past = distiller.teacher.config.num_past
            if detector.config.num_future or teacher_past != detector.config.num_past:
                raise UserError(
                    f"student with {detector.config.num_past} past and {detector.config.num_future} future "
                    f"frames, teacher with {teacher_past} past; expected as many past frames and no future"
                )

    @property
    def settings(self) -> dict[str, Any]:
        """Configurations that must equal those of a checkpoint to resume it."""
        return _settings(self.detector, self.distiller)

    def start_state(self) -> State:
        """Return the empty state: windows carry nothing from step to step."""
        return ()

    def forward(
        self, batch: WindowBatch, state: State, generator: torch.Generator
    ) -> tuple[dict[str, Tensor], State]:
        config = self.detector.config
        _check_cameras(batch.rig, config.channels)
        targets = filter_targets(batch.targets, config)
        frames = config.num_frames
        images = network_input(batch.images[:, :frames])
        rig = CameraRig(*(value[:, :frames] for value in batch.rig))
        images = apply_grid_mask(images, self.grid_mask, generator)
        window = FrameWindow(images, rig, batch.time[:, :frames])
        range_m = batch.time.new_tensor(config.decoder.point_range_m[3:])
        denoising = make_denoising(targets, config.loss, range_m, generator)
        predictions, pyramid = self.detector(window, denoising)
        current_rig = CameraRig(*(value[:, 0] for value in batch.rig))
        terms: dict[str, Tensor] = self.criterion(predictions, targets, current_rig, denoising)
        if self.distiller is not None:
            terms |= self._distil(batch, predictions, pyramid, targets, generator)
        return terms, state

    def _distil(
        self, batch: WindowBatch, predictions: Predictions, pyramid: tuple[Tensor, ...], targets: Targets,
        generator: torch.Generator,
    ) -> dict[str, Tensor]:  # fmt: skip
        assert self.distiller is not None
        frames, all_levels = self.detector.config.num_frames, by_stride(pyramid)
        levels = {s: all_levels[s] for s in self.distiller.method.strides}  # (B, T, N, C, H, W) each
        maps = {stride: level[:, 0] for stride, level in levels.items()}
        previous = None
        if frames > 1:
            previous_maps = {stride: level[:, 1] for stride, level in levels.items()}
            previous = PreviousMaps(previous_maps, batch.real[:, 1].float())
        terms: dict[str, Tensor] = self.distiller(predictions, maps, batch, targets, generator, previous)
        return terms


def visible_geometry(detector: StreamPETR, batch: StreamBatch) -> TokenGeometry:
    """Return the geometry of the tokens of a batch; those that its cameras do not see are masked, as at
    inference."""
    geometry = detector.geometry(batch.rig)
    return geometry._replace(mask=geometry.mask & batch.visible)


def _check_cameras(rig: CameraRig, channels: tuple[str, ...]) -> None:
    """Raise UserError if the number of cameras of a batch is not that of the model's configuration."""
    count = rig.mask.shape[-1]
    if count != len(channels):
        raise UserError(
            f"a batch of {count} cameras for a model of {len(channels)} ({', '.join(channels)}); expected "
            "those of model.channels"
        )


def _settings(detector: StreamPETR | SparseBEV, distiller: Distiller | None) -> dict[str, Any]:
    settings: dict[str, Any] = {"model": to_dict(detector.config)}
    if distiller is not None:
        settings["method"] = to_dict(distiller.config)
        settings["teacher"] = to_dict(distiller.teacher.config)
        settings["hide_future"] = distiller.hide_future
    return settings
