# SPDX-License-Identifier: Apache-2.0
"""The distiller: a frozen teacher and a distillation method between it and a student.

Symbols: B streams or windows, T frames, N cameras.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Final, TypeAlias

import torch
from torch import Tensor, nn

from ftkd_core.config import TOKEN_STRIDE
from ftkd_core.data.augmentation import Augmentation, AugmentConfig
from ftkd_core.data.clips import Clip
from ftkd_core.data.windows import WindowBatch, hide_future
from ftkd_core.distillation.cache import Manifest, describe
from ftkd_core.distillation.config import MAP_STRIDES
from ftkd_core.distillation.methods import MethodConfig, build_method
from ftkd_core.distillation.teacher_output import PreviousMaps, TeacherOutput, make_teacher_output
from ftkd_core.errors import UserError
from ftkd_core.models.predictions import Predictions
from ftkd_core.models.sparse_bev import SparseBEV
from ftkd_core.models.stream_petr import StreamPETR
from ftkd_core.runtime.preprocess import normalise
from ftkd_core.types import Targets
from training.teacher_inference import PYRAMID_STRIDES, by_stride, infer_clip

TeacherInput: TypeAlias = WindowBatch | TeacherOutput
"""Windows for the teacher to process, or its cached outputs."""

_METHODS: Final = ("ftkd", "mgd", "cwd", "stxd")  # their loss terms are named `method/...`


def is_distillation_term(name: str) -> bool:
    """Return whether a loss term belongs to a distillation method; all others form the detection loss."""
    return name.split("/", maxsplit=1)[0] in _METHODS


class Distiller(nn.Module):
    """A frozen teacher and a method between it and a student with `student_channels` query channels and maps
    of map_channels {stride: channels}.

    With hide_future the teacher sees no future frames. The teacher is not a submodule, so it is never saved,
    averaged or trained.
    """

    def __init__(
        self, teacher: SparseBEV, config: MethodConfig, student_channels: int,
        map_channels: Mapping[int, int], *, hide_future: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.config, self.hide_future = config, hide_future
        self._frozen = (teacher.eval().requires_grad_(False),)
        teacher_channels = teacher.config.decoder.channels
        self.method = build_method(
            config,
            student_channels=student_channels,
            teacher_channels=teacher_channels,
            map_channels={stride: (own, teacher_channels) for stride, own in map_channels.items()},
            teacher=teacher.config,
        )

    @property
    def teacher(self) -> SparseBEV:
        """The frozen teacher."""
        return self._frozen[0]

    @torch.no_grad()
    def run_teacher(self, batch: WindowBatch) -> TeacherOutput:
        """Return the teacher's output for the current frames of a batch of windows."""
        if self.hide_future:
            batch = hide_future(batch, self.teacher.config.num_past)
        window = batch.window(normalise(batch.images))
        predictions, pyramid = self.teacher(window)
        return self._output(predictions, pyramid, batch.real)

    def run_teacher_on_clip(
        self, clip: Clip, augmentation: Augmentation | None = None
    ) -> Iterator[TeacherOutput]:
        """Yield the teacher's outputs for all frames of a clip in order, in batches."""
        outputs = infer_clip(self.teacher, clip, hide_future=self.hide_future, augmentation=augmentation)
        for windows, predictions, pyramid in outputs:
            yield self._output(predictions, pyramid, windows.real)

    def describe(self, teacher: str, data: str, augment: AugmentConfig | None = None) -> Manifest:
        """Return what a cache of the teacher's outputs depends on; `teacher` is a hash of its weights, `data`
        the name of the clips, augment the augmentation whose views are stored."""
        return describe(
            teacher=teacher, data=data, map_target=self.method.map_target, strides=self.method.strides,
            with_previous=self.method.needs_previous, hide_future=self.hide_future, augment=augment,
        )  # fmt: skip

    def _output(self, predictions: Predictions, pyramid: Sequence[Tensor], real: Tensor) -> TeacherOutput:
        levels = by_stride(pyramid)
        return make_teacher_output(
            predictions,
            {stride: levels[stride] for stride in self.method.strides},
            real,
            self.teacher.config.num_past,
            self.method.map_target,
            with_previous=self.method.needs_previous,
        )

    def forward(
        self, student: Predictions, maps: Mapping[int, Tensor], source: TeacherInput, targets: Targets,
        generator: torch.Generator, previous: PreviousMaps | None = None,
    ) -> dict[str, Tensor]:  # fmt: skip
        output = source if isinstance(source, TeacherOutput) else self.run_teacher(source)
        terms: dict[str, Tensor] = self.method(student, maps, output, targets, generator, previous)
        return terms


def make_distiller(
    teacher: SparseBEV, student: StreamPETR | SparseBEV, config: MethodConfig, *, hide_future: bool = False
) -> Distiller:
    """Return the distiller between two models; with hide_future the teacher sees no future frames. Raise
    UserError if their images, classes or cameras differ."""
    own, other = student.config, teacher.config
    for name in ("image", "class_names", "channels"):
        if getattr(own, name) != getattr(other, name):
            raise UserError(
                f"student has {name} {getattr(own, name)}, teacher {getattr(other, name)}; expected the same"
            )
    channels = _map_channels(student, other.decoder.levels)
    return Distiller(teacher, config, own.decoder.channels, channels, hide_future=hide_future)


def _map_channels(student: StreamPETR | SparseBEV, teacher_levels: int) -> dict[int, int]:
    """Return channels by stride of the student's maps that are distilled: those of MAP_STRIDES that both
    models have."""
    if isinstance(student, StreamPETR):
        available = {TOKEN_STRIDE: student.config.backbone.neck_channels}
    else:
        levels = PYRAMID_STRIDES[: student.config.decoder.levels]
        available = dict.fromkeys(levels, student.config.decoder.channels)
    of_teacher = PYRAMID_STRIDES[:teacher_levels]
    return {s: available[s] for s in MAP_STRIDES if s in available and s in of_teacher}
