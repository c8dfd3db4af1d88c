# SPDX-License-Identifier: Apache-2.0
"""Competing distillation methods: each measures what its source says, and nothing reaches the teacher."""

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
from ftkd_core.distillation.teacher_output import PreviousMaps, TeacherAnswer
from ftkd_core.errors import UserError
from ftkd_core.models.predictions import Predictions
from ftkd_core.types import Targets


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def maps(seed: int, channels: int = 4) -> Tensor:
    return torch.randn(2, 3, channels, 2, 5, generator=draws(seed))


def learn(config: BaselineConfig, mine: Tensor, yours: Tensor, known: float = 1.0) -> dict[str, Tensor]:
    torch.manual_seed(0)
    baseline = Baseline(config, {16: (mine.shape[2], yours.shape[2])})
    nothing = torch.zeros(1, 2, 1, 10)
    previous = PreviousMaps({16: maps(8, yours.shape[2])}, torch.full((2,), known))
    answer = TeacherAnswer(nothing, nothing, torch.zeros(2, 1, 4), {16: yours}, {16: torch.ones(2)}, previous)
    student = Predictions(nothing, nothing, torch.zeros(2, 1, 4), mine)
    before = PreviousMaps({16: maps(9, mine.shape[2])}, torch.ones(2))
    targets: Targets = None  # type: ignore[assignment]  # these methods do not ask for the truth
    terms: dict[str, Tensor] = baseline(student, {16: mine}, answer, targets, draws(), before)
    return terms


def test_channel_wise_distributions() -> None:
    """One cell after the other, as the paper writes it."""
    mine, yours, temperature = maps(0), maps(1), 4.0
    total = 0.0
    for sample, camera, channel in torch.cartesian_prod(*(torch.arange(n) for n in (2, 3, 4))).tolist():
        p = (yours[sample, camera, channel].flatten() / temperature).softmax(0)
        q = (mine[sample, camera, channel].flatten() / temperature).softmax(0)
        total += float((p * (p / q).log()).sum())
    expected = temperature**2 * total / (2 * 3 * 4)
    assert float(channel_wise_loss(mine, yours, temperature)) == pytest.approx(expected, rel=1e-4)
    assert float(channel_wise_loss(yours + 7, yours, temperature)) == pytest.approx(0, abs=1e-5)


def test_relations_are_cosines_between_frames_of_one_camera() -> None:
    now, before = maps(0), maps(1)
    found = similarity(now, before)
    assert found.shape == (2, 3, 10, 10)
    a, b = now[1, 2, :, 1, 3], before[1, 2, :, 0, 4]
    assert float(found[1, 2, 8, 4]) == pytest.approx(float(a @ b / a.norm() / b.norm()), rel=1e-4)


def test_relations_know_no_width_and_no_missing_frame() -> None:
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
def test_gradient_reaches_the_student_only(name: str) -> None:
    mine, yours = maps(0, 6).requires_grad_(), maps(1).requires_grad_()
    terms = learn(BaselineConfig(name=name), mine, yours)
    assert set(terms) == {f"{name}/16"}
    terms[f"{name}/16"].backward()
    assert mine.grad is not None and mine.grad.abs().sum() > 0
    assert yours.grad is None
    doubled = learn(BaselineConfig(name=name, weight=2.0), mine, yours)
    assert float(doubled[f"{name}/16"].detach()) == pytest.approx(
        2 * float(terms[f"{name}/16"].detach()), rel=1e-5
    )


def test_a_first_frame_has_no_relations() -> None:
    assert float(learn(BaselineConfig(name="stxd"), maps(0), maps(1), known=0.0)["stxd/16"]) == 0


def test_pairs_by_prediction_may_leave_the_object() -> None:
    """DETRDistill: the teacher's box for an object goes to the student's query that predicts it best."""
    logits = torch.full((1, 3, 10), -4.0)
    codes = torch.zeros(1, 3, 10)
    codes[0, :, 0] = torch.tensor([0.0, 20.0, 40.0])
    teacher_codes = codes[:, [1, 0, 2]].clone()
    mine, yours = torch.tensor([[0, -1, -1]]), torch.tensor([[0, -1, -1]])
    by_object = align(logits, codes, logits, teacher_codes, mine, yours)
    assert by_object.teacher.tolist() == [[0, 1, 2]]
    by_prediction = align(logits, codes, logits, teacher_codes, mine, yours, by_prediction=True)
    assert by_prediction.teacher.tolist() == [[1, 0, 2]]
    assert by_prediction.foreground.tolist() == [[False, True, False]]


def test_a_teacher_object_is_kept_however_unsure() -> None:
    logits, teacher_logits = torch.zeros(1, 2, 10), torch.zeros(1, 4, 10)
    teacher_logits[0, 3] = -9.0
    codes = torch.zeros(1, 4, 10)
    yours = torch.tensor([[-1, -1, -1, 5]])
    found = align(
        logits, codes[:, :2], teacher_logits, codes, torch.tensor([[-1, -1]]), yours, by_prediction=True
    )
    assert 3 in found.teacher[0].tolist() and int(found.foreground.sum()) == 1


def test_methods_are_found_by_name_and_checked() -> None:
    assert set(METHODS) == {
        "ftkd", "ftkd_no_pv", "ftkd_no_bev", "ftkd_no_fld", "logits", "mgd", "cwd", "stxd",
    }  # fmt: skip
    logits = method_config("logits")  # the competitor keeps its own rules where FTKD's defaults are others
    assert isinstance(logits, FTKDConfig) and logits.background_reach_m == 0
    with pytest.raises(UserError, match="unknown distillation method 'fgd'; expected one of ftkd, "):
        method_config("fgd")
    with pytest.raises(UserError, match="temperature 0: expected a number above 0"):
        BaselineConfig(name="cwd", temperature=0)
    with pytest.raises(UserError, match="method 'ftkd': expected one of mgd"):
        BaselineConfig(name="ftkd")
