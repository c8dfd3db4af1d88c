# SPDX-License-Identifier: Apache-2.0
"""FTKD: the weighted losses between a student and a teacher's output, in one dict.

The student is not changed: the generators are part of this module, are trained with the student and discarded
afterwards. Source: FTKD (arXiv 2512.08247) [abs, note]; docs/explanation/ftkd.md. Symbols as in
reconstruction.py and logits.py; Y decoder layers.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ftkd_core.config import SparseBEVConfig
from ftkd_core.distillation.config import FTKDConfig
from ftkd_core.distillation.logits import Alignment, align, logit_losses
from ftkd_core.distillation.reconstruction import PerspectiveReconstruction, QueryReconstruction
from ftkd_core.distillation.teacher_output import PreviousMaps, TeacherOutput
from ftkd_core.losses.matching import CODE_WEIGHTS, match
from ftkd_core.losses.target_filter import in_range
from ftkd_core.models.predictions import Predictions
from ftkd_core.types import Targets


class FTKD(nn.Module):
    """FTKD's losses: `terms = ftkd(student, student_maps, output, targets, generator)`.

    student_channels and teacher_channels are the channels of the query features; map_channels {stride:
    (student, teacher)} those of the feature maps that the PV branch reconstructs. teacher is the teacher's
    config: objects outside its range are matched to none of its queries. Returns weighted scalars, named
    `ftkd/...`.
    """

    code_weights: Tensor
    needs_previous = False

    def __init__(
        self,
        config: FTKDConfig,
        *,
        student_channels: int,
        teacher_channels: int,
        map_channels: Mapping[int, tuple[int, int]],
        teacher: SparseBEVConfig | None = None,
    ) -> None:
        super().__init__()
        self.config, self.teacher = config, teacher
        self.map_target = config.pv_target
        self.register_buffer("code_weights", torch.tensor(CODE_WEIGHTS), persistent=False)
        self.query_branch: QueryReconstruction | None = None
        if config.bev_weight:  # DDP raises an error for a branch without gradient
            self.query_branch = QueryReconstruction(student_channels, teacher_channels)
        self.map_branches = nn.ModuleDict(
            {
                str(stride): PerspectiveReconstruction(*channels)
                for stride, channels in map_channels.items()
                if config.pv_weight
            }
        )
        self.strides = tuple(int(stride) for stride in self.map_branches)

    def forward(
        self,
        student: Predictions,
        student_maps: Mapping[int, Tensor],
        output: TeacherOutput,
        targets: Targets,
        generator: torch.Generator,
        previous: PreviousMaps | None = None,
    ) -> dict[str, Tensor]:
        config = self.config
        terms: dict[str, Tensor] = {}
        if config.pv_weight:
            terms |= self._map_terms(student_maps, output, generator)
        if self.query_branch is not None or config.logits_weight:
            alignments = self.alignments(student, output, targets)
            if self.query_branch is not None:
                pairs = alignments[-1].teacher
                loss = self.query_branch(student.features, output.features, pairs, generator)
                terms["ftkd/bev"] = config.bev_weight * loss
            if config.logits_weight:
                terms |= self._logit_terms(student, output, alignments)
        return terms

    def alignments(self, student: Predictions, output: TeacherOutput, targets: Targets) -> list[Alignment]:
        """Return the pairs of student and teacher queries per distilled layer, the last layer last."""
        teacher_targets = targets if self.teacher is None else in_range(targets, self.teacher)
        count = min(len(student.logits), len(output.logits)) if self.config.matching == "prediction" else 1
        alignments = []
        for layer in range(-count, 0):
            of_student = (student.logits[layer].float(), student.codes[layer].float())
            of_teacher = (output.logits[layer].float(), output.codes[layer].float())
            alignments.append(
                align(
                    *of_student, *of_teacher,
                    match(*of_student, targets, part="distillation alignment/student"),
                    match(*of_teacher, teacher_targets, part="distillation alignment/teacher"),
                    by_prediction=self.config.matching == "prediction",
                    background_reach_m=self.config.background_reach_m,
                )
            )  # fmt: skip
        return alignments

    def _map_terms(
        self, maps: Mapping[int, Tensor], output: TeacherOutput, generator: torch.Generator
    ) -> dict[str, Tensor]:
        terms = {}
        for stride, branch in self.map_branches.items():
            target, weight = output.targets[int(stride)], output.target_weights[int(stride)]
            loss = branch(maps[int(stride)], target, weight, generator)
            terms[f"ftkd/pv{stride}"] = self.config.pv_weight * loss
        return terms

    def _logit_terms(
        self, student: Predictions, output: TeacherOutput, alignments: list[Alignment]
    ) -> dict[str, Tensor]:
        terms: dict[str, Tensor] = {}
        for place, alignment in enumerate(alignments):
            layer = place - len(alignments)
            losses = logit_losses(
                student.logits[layer], student.codes[layer], output.logits[layer], output.codes[layer],
                alignment, self.code_weights,
                background_by_score=self.config.matching == "object",
            )  # fmt: skip
            for name, value in losses.items():
                full = f"ftkd/logits_{name}"
                terms[full] = terms.get(full, value.new_zeros(())) + self.config.logits_weight * value
        return terms
