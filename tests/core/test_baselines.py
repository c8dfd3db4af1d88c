# SPDX-License-Identifier: Apache-2.0
"""Baseline distillation methods: their losses as published, and no gradient to the teacher."""

from typing import Literal

import pytest
import torch
from torch import Tensor

from ftkd_core.distillation.baselines import (
    Baseline,
    BaselineConfig,
    channel_wise_loss,
    relation_loss,
    similarity,
)
from ftkd_core.distillation.config import FTKDConfig
from ftkd_core.distillation.logits import align
from ftkd_core.distillation.methods import METHODS, method_config
from ftkd_core.distillation.teacher_output import PreviousMaps, TeacherOutput
from ftkd_core.errors import UserError
from ftkd_core.models.predictions import Predictions
from ftkd_core.types import Targets


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def maps(seed: int, channels: int = 4) -> Tensor:
    return torch.randn(2, 3, channels, 2, 5, generator=generator(seed))


def losses(
    config: BaselineConfig, student_map: Tensor, teacher_map: Tensor, known: float = 1.0
) -> dict[str, Tensor]:
    torch.manual_seed(0)
    baseline = Baseline(config, {16: (student_map.shape[2], teacher_map.shape[2])})
    nothing = torch.zeros(1, 2, 1, 10)
    previous = PreviousMaps({16: maps(8, teacher_map.shape[2])}, torch.full((2,), known))
    features = torch.zeros(2, 1, 4)
    output = TeacherOutput(nothing, nothing, features, {16: teacher_map}, {16: torch.ones(2)}, previous)
    student = Predictions(nothing, nothing, features, student_map)
    before = PreviousMaps({16: maps(9, student_map.shape[2])}, torch.ones(2))
    targets: Targets = None  # type: ignore[assignment]  # unused
    terms: dict[str, Tensor] = baseline(student, {16: student_map}, output, targets, generator(), before)
    return terms


def test_cwd_equals_the_formula_of_the_paper_cell_by_cell() -> None:
    student, teacher, temperature = maps(0), maps(1), 4.0
    total = 0.0
    for sample, camera, channel in torch.cartesian_prod(*(torch.arange(n) for n in (2, 3, 4))).tolist():
        p = (teacher[sample, camera, channel].flatten() / temperature).softmax(0)
        q = (student[sample, camera, channel].flatten() / temperature).softmax(0)
        total += float((p * (p / q).log()).sum())
    expected = temperature**2 * total / (2 * 3 * 4)
    assert float(channel_wise_loss(student, teacher, temperature)) == pytest.approx(expected, rel=1e-4)
    assert float(channel_wise_loss(teacher + 7, teacher, temperature)) == pytest.approx(0, abs=1e-5)


def test_similarities_are_cosines_between_frames_of_one_camera() -> None:
    now, before = maps(0), maps(1)
    found = similarity(now, before)
    assert found.shape == (2, 3, 10, 10)
    a, b = now[1, 2, :, 1, 3], before[1, 2, :, 0, 4]
    assert float(found[1, 2, 8, 4]) == pytest.approx(float(a @ b / a.norm() / b.norm()), rel=1e-4)


def test_the_relation_loss_ignores_channels_and_frames_without_a_previous_one() -> None:
    now, before = maps(0), maps(1)
    wide_now, wide_before = now.repeat(1, 1, 3, 1, 1), before.repeat(1, 1, 3, 1, 1)
    known = torch.ones(2)
    assert float(relation_loss(now, before, wide_now, wide_before, known)) == pytest.approx(0, abs=1e-9)
    other = relation_loss(now, before, maps(2), maps(3), known)
    assert float(other) > 0.01
    half = relation_loss(now, before, maps(2), maps(3), torch.tensor([1.0, 0.0]))
    alone = relation_loss(now[:1], before[:1], maps(2)[:1], maps(3)[:1], torch.ones(1))
    assert float(half) == pytest.approx(float(alone), rel=1e-5)
    assert float(relation_loss(now, before, maps(2), maps(3), torch.zeros(2))) == 0


@pytest.mark.parametrize("name", ["mgd", "cwd", "stxd"])
def test_gradient_reaches_the_student_only(name: Literal["mgd", "cwd", "stxd"]) -> None:
    student, teacher = maps(0, 6).requires_grad_(), maps(1).requires_grad_()
    terms = losses(BaselineConfig(name=name), student, teacher)
    assert set(terms) == {f"{name}/16"}
    terms[f"{name}/16"].backward()
    assert student.grad is not None and student.grad.abs().sum() > 0
    assert teacher.grad is None
    doubled = losses(BaselineConfig(name=name, weight=2.0), student, teacher)
    assert float(doubled[f"{name}/16"].detach()) == pytest.approx(
        2 * float(terms[f"{name}/16"].detach()), rel=1e-5
    )


def test_the_first_frame_has_no_relation_loss() -> None:
    assert float(losses(BaselineConfig(name="stxd"), maps(0), maps(1), known=0.0)["stxd/16"]) == 0


def test_pairs_by_prediction_ignore_the_objects_of_the_student() -> None:
    """DETRDistill: the teacher's box of an object is paired with the student query that predicts it best."""
    logits = torch.full((1, 3, 10), -4.0)
    codes = torch.zeros(1, 3, 10)
    codes[0, :, 0] = torch.tensor([0.0, 20.0, 40.0])
    teacher_codes = codes[:, [1, 0, 2]].clone()
    objects = torch.tensor([[0, -1, -1]])
    by_object = align(logits, codes, logits, teacher_codes, objects, objects)
    assert by_object.teacher.tolist() == [[0, 1, 2]]
    by_prediction = align(logits, codes, logits, teacher_codes, objects, objects, by_prediction=True)
    assert by_prediction.teacher.tolist() == [[1, 0, 2]]
    assert by_prediction.foreground.tolist() == [[False, True, False]]


def test_foreground_queries_of_the_teacher_are_paired_whatever_their_score() -> None:
    logits, teacher_logits = torch.zeros(1, 2, 10), torch.zeros(1, 4, 10)
    teacher_logits[0, 3] = -9.0
    codes = torch.zeros(1, 4, 10)
    objects = torch.tensor([[-1, -1, -1, 5]])
    found = align(
        logits, codes[:, :2], teacher_logits, codes, torch.tensor([[-1, -1]]), objects, by_prediction=True
    )
    assert 3 in found.teacher[0].tolist() and int(found.foreground.sum()) == 1


def test_methods_are_found_by_name() -> None:
    assert set(METHODS) == {
        "ftkd", "ftkd_no_pv", "ftkd_no_bev", "ftkd_no_fld", "logits", "mgd", "cwd", "stxd",
    }  # fmt: skip
    logits = method_config("logits")
    assert isinstance(logits, FTKDConfig)
    assert (logits.background_reach_m, logits.matching) == (0, "prediction")
    with pytest.raises(UserError, match="unknown distillation method 'fgd'; expected one of ftkd, "):
        method_config("fgd")
    with pytest.raises(UserError, match="name is 'ftkd'; expected 'mgd', 'cwd' or 'stxd'"):
        BaselineConfig(name="ftkd")  # type: ignore[arg-type]
