# SPDX-License-Identifier: Apache-2.0
"""FTKD wired together: the teacher's answer and the student's, one dict of weighted terms.

The student's own modules are never touched: what is added (the generators) lives here, is trained with the
student and thrown away. Source: FTKD, method.md sections 1 to 3. Symbols as in reconstruction.py and
logits.py; Y decoder layers.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ftkd_core.config import SparseBEVConfig
from ftkd_core.distillation.config import FTKDConfig
from ftkd_core.distillation.logits import Alignment, align, logit_losses, pair_weights
from ftkd_core.distillation.reconstruction import PerspectiveReconstruction, QueryReconstruction
from ftkd_core.distillation.teacher_output import PreviousMaps, TeacherAnswer
from ftkd_core.losses.matching import match
from ftkd_core.losses.target_filter import in_range
from ftkd_core.models.predictions import Predictions
from ftkd_core.types import Targets


class FTKD(nn.Module):
    """`terms = ftkd(student, student_maps, answer, targets, generator)`: weighted scalars, named
    `ftkd/...`.

    student_channels and teacher_channels are the widths of the query features; map_channels {stride:
    (student, teacher)} those of the feature maps that the PV branch rebuilds; teacher its configuration:
    objects outside its range it answers for with none of its queries.
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
        code_weights: tuple[float, ...],
        teacher: SparseBEVConfig | None = None,
    ) -> None:
        super().__init__()
        self.config, self.teacher = config, teacher
        self.map_target, self.map_frames = config.pv_target, config.pv_frames
        self.register_buffer("code_weights", torch.tensor(code_weights), persistent=False)
        self.query_branch: QueryReconstruction | None = None
        if config.bev_weight:  # a branch without a loss has no gradient, which DDP takes for an error
            self.query_branch = QueryReconstruction(
                student_channels, teacher_channels, config.bev_mask_ratio, config.bev_mask, config.bev_norm
            )
        self.map_branches = nn.ModuleDict(
            {
                str(stride): PerspectiveReconstruction(mine, yours, config.pv_mask_ratio)
                for stride, (mine, yours) in map_channels.items()
                if config.pv_weight
            }
        )
        self.strides = tuple(int(stride) for stride in self.map_branches)

    def forward(
        self,
        student: Predictions,
        student_maps: Mapping[int, Tensor],
        answer: TeacherAnswer,
        targets: Targets,
        generator: torch.Generator,
        previous: PreviousMaps | None = None,
    ) -> dict[str, Tensor]:
        config = self.config
        terms: dict[str, Tensor] = {}
        if config.pv_weight:
            terms |= self._maps(student_maps, answer, generator)
        if self.query_branch is not None or config.logits_weight:
            alignments = self.alignments(student, answer, targets)
            if self.query_branch is not None:
                weight = None
                if config.bev_by_score:
                    weight = pair_weights(answer.logits[-1].float().sigmoid(), alignments[-1])
                loss = self.query_branch(
                    student.features, answer.features, alignments[-1].teacher, generator, weight
                )
                terms["ftkd/bev"] = config.bev_weight * loss
            if config.logits_weight:
                terms |= self._logits(student, answer, alignments)
        return terms

    def alignments(self, student: Predictions, answer: TeacherAnswer, targets: Targets) -> list[Alignment]:
        """Who follows whom, for the layers that are distilled, last layer last."""
        theirs = targets if self.teacher is None else in_range(targets, self.teacher)
        last = 1 if self.config.logit_layers == "last" else min(len(student.logits), len(answer.logits))
        found = []
        for layer in range(-last, 0):
            mine = (student.logits[layer].float(), student.codes[layer].float())
            yours = (answer.logits[layer].float(), answer.codes[layer].float())
            found.append(
                align(
                    *mine, *yours,
                    match(*mine, targets, part="distillation alignment/student"),
                    match(*yours, theirs, part="distillation alignment/teacher"),
                    self.config.class_weight, self.config.box_weight,
                    by_prediction=self.config.matching == "prediction",
                    background_reach_m=self.config.background_reach_m,
                )
            )  # fmt: skip
        return found

    def _maps(
        self, maps: Mapping[int, Tensor], answer: TeacherAnswer, generator: torch.Generator
    ) -> dict[str, Tensor]:
        terms = {}
        for stride, branch in self.map_branches.items():
            target, weight = answer.targets[int(stride)], answer.target_weights[int(stride)]
            loss = branch(maps[int(stride)], target, weight, generator)
            terms[f"ftkd/pv{stride}"] = self.config.pv_weight * loss
        return terms

    def _logits(
        self, student: Predictions, answer: TeacherAnswer, alignments: list[Alignment]
    ) -> dict[str, Tensor]:
        config = self.config
        terms: dict[str, Tensor] = {}
        for place, alignment in enumerate(alignments):
            layer = place - len(alignments)
            losses = logit_losses(
                student.logits[layer], student.codes[layer], answer.logits[layer], answer.codes[layer],
                alignment, self.code_weights,
                foreground=config.foreground, background=config.background,
                class_weight=config.class_weight, box_weight=config.box_weight,
                background_by_score=config.background_by_score,
            )  # fmt: skip
            for name, value in losses.items():
                full = f"ftkd/logits_{name}"
                terms[full] = terms.get(full, value.new_zeros(())) + config.logits_weight * value
        return terms
