# SPDX-License-Identifier: Apache-2.0
"""The distiller: a frozen teacher and a distillation method between it and a student.

Symbols: B streams or windows, T frames, N cameras.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Final, TypeAlias

import torch
from torch import Tensor, nn

from ftkd_core.config import TOKEN_STRIDE
from ftkd_core.data.clips import Clip
from ftkd_core.data.windows import WindowBatch, hide_future
from ftkd_core.distillation.cache import Manifest, describe
from ftkd_core.distillation.config import FTKDConfig
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
_DEFAULT_STRIDES: Final = (16, 32)  # of the maps that baseline methods distil, as FTKD by default


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
        map_channels: Mapping[int, int], code_weights: tuple[float, ...], *, hide_future: bool = False,
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
            code_weights=code_weights,
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
        window = batch.window(normalise(batch.images, self.teacher.config.image))
        predictions, pyramid = self.teacher(window)
        return self._output(predictions, pyramid, batch.real)

    def run_teacher_on_clip(self, clip: Clip) -> Iterator[TeacherOutput]:
        """Yield the teacher's outputs for all frames of a clip in order, in batches."""
        outputs = infer_clip(self.teacher, clip, hide_future=self.hide_future)
        for windows, predictions, pyramid in outputs:
            yield self._output(predictions, pyramid, windows.real)

    def describe(self, teacher: str, data: str) -> Manifest:
        """Return what a cache of the teacher's outputs depends on; `teacher` is a hash of its weights, `data`
        the name of the clips."""
        return describe(
            teacher=teacher, data=data, map_target=self.method.map_target, strides=self.method.strides,
            with_previous=self.method.needs_previous, hide_future=self.hide_future,
        )  # fmt: skip

    def _output(self, predictions: Predictions, pyramid: Sequence[Tensor], real: Tensor) -> TeacherOutput:
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
    channels = _map_channels(student, other.decoder.levels, config)
    width, weights = own.decoder.channels, own.loss.code_weights
    return Distiller(teacher, config, width, channels, weights, hide_future=hide_future)


def _map_channels(
    student: StreamPETR | SparseBEV, teacher_levels: int, config: MethodConfig
) -> dict[int, int]:
    """Return channels by stride of the student's maps that a method distils: strides that it asks for and
    both models have. Raise UserError if FTKD distils maps and there is none."""
    ftkd = config if isinstance(config, FTKDConfig) else None
    if isinstance(student, StreamPETR):
        if ftkd is not None and ftkd.pv_frames == "all":
            raise UserError("pv_frames all: a streaming student has one frame per step; expected current")
        backbone = student.config.backbone
        available = {TOKEN_STRIDE: backbone.neck_channels}
        wanted = tuple(available) if ftkd is None else ftkd.pv_strides
    else:
        levels = PYRAMID_STRIDES[: student.config.decoder.levels]
        available = dict.fromkeys(levels, student.config.decoder.channels)
        wanted = _DEFAULT_STRIDES if ftkd is None else ftkd.pv_strides
    common = {s: width for s, width in available.items() if s in PYRAMID_STRIDES[:teacher_levels]}
    chosen = {stride: common[stride] for stride in wanted if stride in common}
    if ftkd is not None and ftkd.pv_weight and not chosen:
        raise UserError(
            f"pv_strides {list(wanted)}: student and teacher have maps of stride "
            f"{', '.join(map(str, common))}; expected some of them, or pv_weight 0"
        )
    return chosen
