# SPDX-License-Identifier: Apache-2.0
"""FTKD: targets that absorb the future, reconstruction, alignment, logits, and that only losses see the
teacher."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ftkd_core.data.augmentation import Augmentation
from ftkd_core.data.clips import make_sample
from ftkd_core.distillation.config import FTKDConfig
from ftkd_core.distillation.ftkd import FTKD
from ftkd_core.distillation.logits import (
    Alignment,
    align,
    centres_apart,
    class_costs,
    logit_losses,
    pair_weights,
)
from ftkd_core.distillation.reconstruction import (
    PerspectiveReconstruction,
    QueryReconstruction,
    future_aware_target,
    random_mask,
)
from ftkd_core.distillation.teacher_output import TeacherAnswer, teacher_answer
from ftkd_core.errors import UserError
from ftkd_core.losses.focal import quality_focal_loss
from ftkd_core.models.predictions import Predictions
from ftkd_core.runtime.preprocess import normalise
from ftkd_core.types import Frame, Targets
from tests.core.helpers import make_clip, small_model
from tests.core.test_sparse_bev import small_sparse, window_of

WEIGHTS = (2.0, 2.0) + (1.0,) * 8


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_target_is_attention_to_the_future_of_the_same_camera() -> None:
    current, future = (
        torch.randn(2, 3, 4, 2, 5, generator=draws()),
        torch.randn(2, 2, 3, 4, 2, 5, generator=draws(1)),
    )
    real = torch.tensor([[True, True], [True, False]])
    target, weight = future_aware_target(current, future, real)
    summed, _ = future_aware_target(current, future, real, "sum")
    assert torch.equal(weight, torch.ones(2))
    for sample, camera in itertools.product(range(2), range(3)):
        q = current[sample, camera].flatten(1).T  # (HW, C), one cell after the other
        seen = []
        for frame in range(int(real[sample].sum())):
            v = future[sample, frame, camera].flatten(1).T
            seen.append((q @ v.T / math.sqrt(4)).softmax(-1) @ v)
        expected = (q + torch.stack(seen).mean(0)).T.reshape(4, 2, 5)
        assert torch.allclose(target[sample, camera], expected, atol=1e-5)
        assert torch.allclose(summed[sample, camera], torch.stack(seen).sum(0).T.reshape(4, 2, 5), atol=1e-5)


def test_a_frame_without_future_is_its_own_target_or_none() -> None:
    current, future = torch.randn(2, 1, 4, 2, 3), torch.randn(2, 2, 1, 4, 2, 3)
    real = torch.tensor([[False, False], [True, True]])
    target, weight = future_aware_target(current, future, real)
    assert torch.equal(target[0], current[0])
    assert torch.equal(weight, torch.ones(2))
    _, weight = future_aware_target(current, future, real, "sum")
    assert torch.equal(weight, torch.tensor([0.0, 1.0]))
    target, weight = future_aware_target(current, future[:, :0], real[:, :0])
    assert torch.equal(target, current)


def test_maps_are_rebuilt_from_what_was_not_hidden() -> None:
    torch.manual_seed(0)
    branch = PerspectiveReconstruction(3, 4, 0.5)
    student = torch.randn(2, 1, 3, 6, 8, requires_grad=True)
    target = torch.randn(2, 1, 4, 6, 8, requires_grad=True)
    loss = branch(student, target, torch.tensor([1.0, 0.0]), draws(3))
    loss.backward()
    assert target.grad is None
    assert student.grad is not None
    assert torch.count_nonzero(student.grad[1]) == 0  # a frame of weight 0 teaches nothing
    hidden = random_mask((2, 1, 1, 6, 8), 0.5, draws(3), student) == 0
    assert 0.3 < float(hidden.float().mean()) < 0.7
    assert torch.count_nonzero(student.grad[0][hidden[0].expand(-1, 3, -1, -1)]) == 0
    with pytest.raises(ValueError, match="same image size and stride"):
        branch(student[..., :4], target, torch.ones(2), draws())


@pytest.mark.parametrize("norm", ["last", "first"])
def test_a_generator_can_learn_to_rebuild(norm: str) -> None:
    """The branch's loss falls when its target can be told from the student's feature."""
    torch.manual_seed(0)
    branch = QueryReconstruction(8, 8, 0.2, "channel", norm)
    student = torch.randn(1, 64, 8)
    teacher = torch.nn.functional.layer_norm(
        student[..., :1].expand(-1, -1, 8) * torch.arange(1.0, 9.0), (8,)
    )
    pairs = torch.arange(64)[None]
    optimizer = torch.optim.Adam(branch.parameters(), 1e-2)
    losses = []
    for step in range(80):
        loss = branch(student, teacher, pairs, draws(step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])


@pytest.mark.parametrize("norm", ["last", "first"])
@pytest.mark.parametrize("masking", ["channel", "query", "both", "none"])
def test_query_features_are_hidden_as_asked(masking: str, norm: str) -> None:
    torch.manual_seed(0)
    branch = QueryReconstruction(6, 5, 0.5, masking, norm)
    student = torch.randn(1, 40, 6, requires_grad=True)
    pairs = torch.arange(40)[None].clone()
    pairs[0, 30:] = -1
    branch(student, torch.randn(1, 40, 5), pairs, draws()).backward()
    assert student.grad is not None
    touched = student.grad[0] != 0
    assert not touched[30:].any()  # no partner, nothing to rebuild
    whole, none = touched[:30].all(1).float().mean(), (~touched[:30]).all(1).float().mean()
    match masking:
        case "none":
            assert whole == 1
        case "channel":
            assert whole < 0.2 and none < 0.2
        case "query":
            assert 0.2 < whole < 0.8 and whole + none == 1
        case _:
            assert none > 0.2 and whole < 0.2


def predictions_of(count: int, seed: int) -> tuple[Tensor, Tensor]:
    logits = torch.randn(2, count, 10, generator=draws(seed)) * 2 - 2
    codes = torch.randn(2, count, 10, generator=draws(seed + 100)) * 5
    return logits, codes


def test_a_pair_the_teacher_does_not_believe_in_rebuilds_little() -> None:
    torch.manual_seed(0)
    branch = QueryReconstruction(6, 5, 0.5, "none")
    student, teacher = torch.randn(1, 4, 6, requires_grad=True), torch.randn(1, 4, 5)
    pairs = Alignment(torch.tensor([[0, 2, 3, -1]]), torch.tensor([[True, False, False, False]]))
    scores = torch.tensor([[[0.1, 0.2], [0.9, 0.9], [0.05, 0.5], [0.0, 0.0]]])
    weights = pair_weights(scores, pairs)
    assert weights.tolist() == [[1.0, 0.5, 0.0, 0.0]]
    loss = branch(student, teacher, pairs.teacher, draws(), weights)
    loss.backward()
    assert student.grad is not None
    assert student.grad[0, :2].abs().sum(1).gt(0).all() and not student.grad[0, 2:].any()
    alone = [branch(student[:, i : i + 1], teacher, pairs.teacher[:, i : i + 1], draws()) for i in range(2)]
    assert torch.allclose(loss, (alone[0] + 0.5 * alone[1]) / 1.5)


def test_a_student_equal_to_its_teacher_follows_itself_at_no_cost() -> None:
    logits, codes = predictions_of(12, 0)
    objects = torch.full((2, 12), -1)
    objects[:, 3], objects[:, 7] = 1, 0
    found = align(logits, codes, logits, codes, objects, objects)
    assert torch.equal(found.teacher, torch.arange(12).expand(2, -1))
    assert found.foreground.sum() == 4
    terms = logit_losses(logits, codes, logits, codes, found, torch.tensor(WEIGHTS))
    assert set(terms) == {"foreground_class", "foreground_box", "background_class", "background_box"}
    assert all(float(value) == pytest.approx(0, abs=1e-9) for value in terms.values())


def test_costs_of_all_pairs_are_the_loss_of_each() -> None:
    mine, yours = 4 * torch.randn(2, 7, 10, generator=draws()), 4 * torch.randn(2, 9, 10, generator=draws(1))
    yours[0, 2] = mine[0, 3]  # they agree: nothing but rounding is left
    plain = quality_focal_loss(
        mine[:, :, None].expand(-1, -1, 9, -1), yours.sigmoid()[:, None].expand(-1, 7, -1, -1)
    ).sum(-1)
    found = class_costs(mine, yours)
    assert torch.allclose(found, plain, rtol=1e-5, atol=1e-6)
    assert abs(float(found[0, 3, 2])) < 1e-9


def test_foreground_meets_through_the_object_and_the_rest_by_least_cost() -> None:
    (logits, codes), (teacher_logits, teacher_codes) = predictions_of(4, 1), predictions_of(7, 2)
    mine, yours = torch.tensor([[-1, 5, -1, -1]] * 2), torch.tensor([[-1, -1, -1, -1, 5, -1, 6]] * 2)
    found = align(logits, codes, teacher_logits, teacher_codes, mine, yours)
    assert found.teacher[:, 1].tolist() == [4, 4]
    assert found.foreground.tolist() == [[False, True, False, False]] * 2
    for sample in range(2):
        rest = found.teacher[sample, [0, 2, 3]].tolist()
        best = teacher_logits[sample, [0, 1, 2, 3, 5]].amax(-1).topk(3).indices
        kept = torch.tensor([0, 1, 2, 3, 5])[best].tolist()
        assert sorted(rest) == sorted(kept)  # the teacher's best, each once

        def cost(order: tuple[int, ...], sample: int = sample) -> float:
            total = 0.0
            for row, column in zip((0, 2, 3), order, strict=True):
                quality = teacher_logits[sample, column].sigmoid()
                total += 2.0 * float(quality_focal_loss(logits[sample, row], quality).sum())
                total += 0.25 * float((codes[sample, row] - teacher_codes[sample, column]).abs().sum())
            return total

        assert cost(tuple(rest)) == pytest.approx(min(map(cost, itertools.permutations(kept))), rel=1e-5)


def test_background_pairs_out_of_reach_are_none() -> None:
    """And foreground is, however far: both answer for the same object."""
    (logits, codes), (teacher_logits, teacher_codes) = predictions_of(6, 3), predictions_of(9, 4)
    mine, yours = torch.tensor([[-1, 5] + [-1] * 4] * 2), torch.tensor([[-1] * 8 + [5]] * 2)
    teacher_codes[:, 8, :3] += 500.0
    every = align(logits, codes, teacher_logits, teacher_codes, mine, yours)
    apart = centres_apart(codes, teacher_codes, every)
    expected = [(codes[0, i, :3] - teacher_codes[0, j, :3]).norm() for i, j in enumerate(every.teacher[0])]
    assert torch.allclose(apart[0], torch.stack(expected))
    assert apart[:, 1].min() > 400
    reach = float(apart[~every.foreground].median())
    found = align(logits, codes, teacher_logits, teacher_codes, mine, yours, background_reach_m=reach)
    assert found.foreground.equal(every.foreground)
    kept = (apart <= reach) | every.foreground
    assert 0 < int(kept.sum()) < kept.numel()
    assert found.teacher.equal(torch.where(kept, every.teacher, -1))
    ftkd = Lesson(background_reach_m=1e-6, bev_mask="none", pv_weight=0.0, logits_weight=0.0)
    predictions, _ = ftkd.learn(ftkd.answer())
    pairs = ftkd.ftkd.alignments(predictions, ftkd.answer(), ftkd.targets)[-1]
    assert pairs.foreground.any() and not (pairs.teacher[~pairs.foreground] >= 0).any()


def test_fewer_teacher_queries_leave_students_alone() -> None:
    (logits, codes), (teacher_logits, teacher_codes) = predictions_of(6, 3), predictions_of(4, 4)
    none = torch.full((2, 6), -1)
    found = align(logits, codes, teacher_logits, teacher_codes, none, none[:, :4])
    assert ((found.teacher >= 0).sum(1) == 4).all()
    assert not found.foreground.any()
    with pytest.raises(FloatingPointError, match="distillation alignment: .* nan or inf"):
        align(logits * torch.nan, codes, teacher_logits, teacher_codes, none, none[:, :4])


def test_the_logits_teach_what_they_should() -> None:
    logits = torch.zeros(1, 2, 10, requires_grad=True)
    codes = torch.zeros(1, 2, 10, requires_grad=True)
    teacher_logits = torch.full((1, 2, 10), -2.0)
    teacher_logits[0, 0, 3] = 3.0
    teacher_codes = torch.ones(1, 2, 10)
    pairs = Alignment(torch.tensor([[0, 1]]), torch.tensor([[True, False]]))
    terms = logit_losses(logits, codes, teacher_logits, teacher_codes, pairs, torch.tensor(WEIGHTS))
    torch.stack(list(terms.values())).sum().backward()
    assert logits.grad is not None and codes.grad is not None
    assert logits.grad[0, 0, 3] < 0 and (logits.grad[0, 1] > 0).all()  # up where the teacher believes
    assert float(terms["foreground_box"].detach()) == pytest.approx(0.25 * 12)
    belief = float(torch.tensor(-2.0).sigmoid())
    assert float(terms["background_box"].detach()) == pytest.approx(0.25 * 12 * belief, rel=1e-5)
    only = logit_losses(
        logits, codes, teacher_logits, teacher_codes, pairs, torch.tensor(WEIGHTS), background=False
    )
    assert set(only) == {"foreground_class", "foreground_box"}


class Lesson:
    """A small student, a small teacher with a future, one frame of a clip, and FTKD between them, which pairs
    boxes however far apart: untrained models agree on no place."""

    def __init__(self, **settings: object) -> None:
        self.config = FTKDConfig(**{"background_reach_m": 0.0} | settings)  # type: ignore[arg-type]
        self.student = small_model().train()
        self.teacher = small_sparse(past=1, future=1).requires_grad_(False)
        clip = make_clip(objects=5)
        self.samples = [make_sample(clip, index, Augmentation(), index == 1) for index in range(3)]
        self.frames = [s.frame(normalise(s.images, self.student.config.image)) for s in self.samples]
        self.ftkd = FTKD(
            self.config, student_channels=32, teacher_channels=32, map_channels={16: (16, 32)},
            code_weights=WEIGHTS,
        )  # fmt: skip

    @property
    def targets(self) -> Targets:
        return self.samples[1].targets

    def answer(self, frames: list[Frame] | None = None) -> TeacherAnswer:
        window = window_of(frames or self.frames, 1, [0, 2])
        predictions, pyramid = self.teacher(window)
        real = torch.ones(1, 3, dtype=torch.bool)
        return teacher_answer(predictions, {16: pyramid[1]}, real, 1, self.config.pv_target)

    def learn(self, answer: TeacherAnswer) -> tuple[Predictions, dict[str, Tensor]]:
        predictions, _ = self.student(self.frames[1], self.student.start_memory(1))
        maps = {16: predictions.image_features}
        return predictions, self.ftkd(predictions, maps, answer, self.targets, draws())


def test_changing_the_future_changes_the_losses_and_never_the_student() -> None:
    torch.manual_seed(0)
    lesson = Lesson()
    lesson.student.eval()
    future = lesson.frames[2]._replace(images=-lesson.frames[2].images)
    before, terms = lesson.learn(lesson.answer())
    after, changed = lesson.learn(lesson.answer([*lesson.frames[:2], future]))
    assert torch.equal(before.logits, after.logits) and torch.equal(before.codes, after.codes)
    for name in ("ftkd/pv16", "ftkd/bev", "ftkd/logits_background_class"):
        assert float(terms[name].detach()) != float(changed[name].detach()), name


def test_no_gradient_reaches_the_teacher_and_nothing_of_it_changes() -> None:
    torch.manual_seed(0)
    lesson = Lesson(logit_layers="all")
    before = {name: value.clone() for name, value in lesson.teacher.state_dict().items()}
    answer = lesson.answer()
    _, terms = lesson.learn(answer)
    torch.stack(list(terms.values())).sum().backward()
    assert all(p.grad is None for p in lesson.teacher.parameters())
    assert not any(value.requires_grad for value in (answer.logits, answer.codes, *answer.targets.values()))
    for name, value in lesson.teacher.state_dict().items():
        assert torch.equal(value, before[name]), name
    for module in (lesson.ftkd, lesson.student.backbone, lesson.student.classifier, lesson.student.regressor):
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())


@pytest.mark.parametrize(
    ("settings", "left"),
    [
        ({"pv_weight": 0.0}, {"bev", "logits"}),
        ({"bev_weight": 0.0}, {"pv16", "logits"}),
        ({"logits_weight": 0.0}, {"pv16", "bev"}),
        ({"logits_weight": 0.0, "bev_weight": 0.0}, {"pv16"}),
    ],
)
def test_each_part_can_be_left_out(settings: dict[str, float], left: set[str]) -> None:
    lesson = Lesson(**settings)
    _, terms = lesson.learn(lesson.answer())
    assert {name.removeprefix("ftkd/").partition("_")[0] for name in terms} == left


def test_weights_scale_their_terms() -> None:
    torch.manual_seed(0)
    lesson = Lesson()
    answer = lesson.answer()
    _, terms = lesson.learn(answer)
    lesson.ftkd.config = replace(lesson.config, pv_weight=2e-3, bev_weight=8.0, logits_weight=3.0)
    _, scaled = lesson.learn(answer)
    for name, factor in (("pv16", 2.0), ("bev", 0.5), ("logits_foreground_class", 3.0)):
        ratio = float(scaled[f"ftkd/{name}"].detach()) / float(terms[f"ftkd/{name}"].detach())
        assert ratio == pytest.approx(factor, rel=1e-4), name


def test_settings_are_checked() -> None:
    with pytest.raises(UserError, match="pv_mask_ratio 1.0"):
        FTKDConfig(pv_mask_ratio=1.0)
    with pytest.raises(UserError, match="bev_mask 'channels': expected one of channel"):
        FTKDConfig(bev_mask="channels")
    with pytest.raises(UserError, match="logits_weight -1"):
        FTKDConfig(logits_weight=-1)
    with pytest.raises(UserError, match="background_reach_m nan: expected a number of at least 0"):
        FTKDConfig(background_reach_m=float("nan"))
    for strides in ((), (16, 64), (16, 16)):
        with pytest.raises(UserError, match=r"pv_strides \[.*\]: expected some of 4, 8, 16, 32"):
            FTKDConfig(pv_strides=strides)


def test_a_teacher_answers_for_no_object_out_of_its_range() -> None:
    """One of +-51.2 m beside a student that reaches farther: the student learns the far object from the
    ground truth alone."""
    lesson = Lesson()
    answer, mask = lesson.answer(), lesson.targets.mask
    predictions, _ = lesson.learn(answer)
    near = lesson.ftkd.alignments(predictions, answer, lesson.targets)[-1]
    assert int(near.foreground.sum()) == int(mask.sum()) == mask.numel()
    reach = lesson.targets.boxes[..., :2].abs().amax(-1)
    limit = float(reach.median())
    low, high = (-limit, -limit, -5.0), (limit, limit, 3.0)
    decoder = replace(lesson.teacher.config.decoder, range_low_m=low, range_high_m=high)
    lesson.ftkd.teacher = replace(lesson.teacher.config, decoder=decoder)
    short = lesson.ftkd.alignments(predictions, answer, lesson.targets)[-1]
    far = reach > limit
    assert int(short.foreground.sum()) == int((~far).sum()) < mask.numel()


def test_background_may_count_by_what_the_teacher_believes() -> None:
    """Learning the features of the pairs' foreground alone is the limit of a teacher that believes nothing
    else."""
    torch.manual_seed(0)
    lesson = Lesson(bev_mask="none", bev_by_score=True, pv_weight=0.0, logits_weight=0.0)
    answer = lesson.answer()
    predictions, _ = lesson.learn(answer)
    pairs = lesson.ftkd.alignments(predictions, answer, lesson.targets)[-1]
    nothing = answer._replace(logits=answer.logits.clone())
    nothing.logits[-1] = -100.0
    _, terms = lesson.learn(nothing)
    assert lesson.ftkd.query_branch is not None
    found = lesson.ftkd.alignments(predictions, nothing, lesson.targets)[-1]
    assert (found.teacher[~found.foreground] >= 0).any() and pairs.foreground.any()
    only = torch.where(found.foreground, found.teacher, -1)
    alone = lesson.ftkd.query_branch(predictions.features, answer.features, only, draws())
    assert float(terms["ftkd/bev"].detach()) == pytest.approx(16.0 * float(alone.detach()), rel=1e-5)
