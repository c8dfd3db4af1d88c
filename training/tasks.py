# SPDX-License-Identifier: Apache-2.0
"""Training tasks: compute the weighted losses and the next state for one batch.

A task is the module that Fabric wraps, so that under DDP it contains every trained parameter. Only its
detector is kept after training. Symbols: B streams or windows, T frames, N cameras.
"""

from typing import Any, Final, NamedTuple, TypeAlias

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
from ftkd_core.models.feature_ring import WindowFeatures
from ftkd_core.models.memory import Memory
from ftkd_core.models.position import TokenGeometry
from ftkd_core.models.predictions import Predictions
from ftkd_core.models.sparse_bev import SparseBEV
from ftkd_core.models.stream_petr import StreamPETR
from ftkd_core.noise_scale import noise_scale
from ftkd_core.types import CameraRig, FrameWindow, Targets
from training.distiller import Distiller, TeacherInput
from training.feature_cache import network_input
from training.teacher_inference import by_stride

State: TypeAlias = tuple[Tensor, ...]
"""Tensors that a task carries from step to step."""
_MEMORY_FIELDS = len(Memory._fields)
FROZEN: Final = ("backbone", "neck", "auxiliary")
"""Parts of a detector whose maps can be stored, because `DecoderTask` does not train them."""


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

    def start_state(self, streams: int = 0) -> State:
        """Return the state of `streams` (0: all) before the first step: the memory and, if the method relates
        consecutive frames, the previous feature maps (B, N, C, H, W)."""
        streams = streams or self.streams
        memory = self.detector.start_memory(streams)
        if self.distiller is None or not self.distiller.method.needs_previous:
            return tuple(memory)
        config, stride = self.detector.config, TOKEN_STRIDE
        size = (config.image.height // stride, config.image.width // stride)
        shape = (streams, len(config.channels), config.backbone.neck_channels, *size)
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
        noise = noise_scale(config)
        denoising = make_denoising(targets, config.loss, self.detector.range_m, generator, noise)
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

    grid_mask as in `AugmentConfig`; the distiller's teacher sees unmasked images. gradient_frames as in
    `RunConfig`; frames without gradient are not masked (upstream).
    """

    def __init__(
        self, detector: SparseBEV, distiller: Distiller | None = None, grid_mask: float = 0.0,
        gradient_frames: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.gradient_frames = gradient_frames
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
        self, item: WindowBatch | tuple[WindowBatch, TeacherInput], state: State, generator: torch.Generator
    ) -> tuple[dict[str, Tensor], State]:
        batch, source = (item, item) if isinstance(item, WindowBatch) else item
        config = self.detector.config
        _check_cameras(batch.rig, config.channels)
        targets = filter_targets(batch.targets, config)
        frames = config.num_frames
        images = network_input(batch.images[:, :frames])
        rig = CameraRig(*(value[:, :frames] for value in batch.rig))
        masked = self.gradient_frames or frames
        images = torch.cat(
            [apply_grid_mask(images[:, :masked], self.grid_mask, generator), images[:, masked:]], dim=1
        )
        window = FrameWindow(images, rig, batch.time[:, :frames])
        range_m = batch.time.new_tensor(config.decoder.point_range_m[3:])
        denoising = make_denoising(targets, config.loss, range_m, generator, noise_scale(config))
        predictions, pyramid = self.detector(window, denoising, self.gradient_frames)
        current_rig = CameraRig(*(value[:, 0] for value in batch.rig))
        terms: dict[str, Tensor] = self.criterion(predictions, targets, current_rig, denoising)
        if self.distiller is not None:
            terms |= self._distil(batch, source, predictions, pyramid, targets, generator)
        return terms, state

    def _distil(
        self, batch: WindowBatch, source: TeacherInput, predictions: Predictions,
        pyramid: tuple[Tensor, ...], targets: Targets, generator: torch.Generator,
    ) -> dict[str, Tensor]:  # fmt: skip
        assert self.distiller is not None
        frames, all_levels = self.detector.config.num_frames, by_stride(pyramid)
        levels = {s: all_levels[s] for s in self.distiller.method.strides}  # (B, T, N, C, H, W) each
        maps = {stride: level[:, 0] for stride, level in levels.items()}
        previous = None
        if frames > 1:
            previous_maps = {stride: level[:, 1] for stride, level in levels.items()}
            previous = PreviousMaps(previous_maps, batch.real[:, 1].float())
        terms: dict[str, Tensor] = self.distiller(predictions, maps, source, targets, generator, previous)
        return terms


def visible_geometry(detector: StreamPETR, batch: StreamBatch) -> TokenGeometry:
    """Return the geometry of the tokens of a batch; those that its cameras do not see are masked, as at
    inference."""
    geometry = detector.geometry(batch.rig)
    return geometry._replace(mask=geometry.mask & batch.visible)


class MapBatch(NamedTuple):
    """Windows as stored maps: pyramid, L maps (B, T, N, C, H, W); rig, time and targets as in
    `WindowBatch`."""

    pyramid: tuple[Tensor, ...]
    rig: CameraRig
    time: Tensor
    targets: Targets


class DecoderTask(nn.Module):
    """SparseBEV on stored maps; only what is not `FROZEN` is trained."""

    distiller = None

    def __init__(self, detector: SparseBEV) -> None:
        super().__init__()
        self.detector = detector
        self.criterion = DetectionCriterion(detector.config)
        for part in self._frozen():
            part.requires_grad_(False)

    def _frozen(self) -> list[nn.Module]:
        parts = [getattr(self.detector, name) for name in FROZEN]
        return [part for part in parts if part is not None]

    def train(self, mode: bool = True) -> "DecoderTask":
        """Keep the statistics of the frozen parts."""
        super().train(mode)
        for part in self._frozen():
            part.eval()
        return self

    @property
    def settings(self) -> dict[str, Any]:
        """Configurations that must equal those of a checkpoint to resume it."""
        return {"model": to_dict(self.detector.config)}

    def start_state(self) -> tuple[Tensor, ...]:
        """Return the empty state: windows carry nothing from step to step."""
        return ()

    def forward(
        self, batch: MapBatch, state: tuple[Tensor, ...], generator: torch.Generator
    ) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
        config = self.detector.config
        targets = filter_targets(batch.targets, config)
        range_m = batch.time.new_tensor(config.decoder.point_range_m[3:])
        denoising = make_denoising(targets, config.loss, range_m, generator, noise_scale(config))
        window = WindowFeatures(batch.pyramid, batch.rig, batch.time)
        predictions = self.detector.decode_window(window, denoising)._replace(auxiliary=None)
        rig = CameraRig(*(value[:, 0] for value in batch.rig))
        return self.criterion(predictions, targets, rig, denoising), state


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
