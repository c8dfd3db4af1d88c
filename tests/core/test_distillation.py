# SPDX-License-Identifier: Apache-2.0
"""FTKD: future-aware targets, reconstruction, alignment, logit losses; only losses depend on the teacher."""

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
    class_costs,
    logit_losses,
    pair_distances,
    pair_weights,
)
from ftkd_core.distillation.reconstruction import (
    PerspectiveReconstruction,
    QueryReconstruction,
    future_aware_target,
    random_mask,
)
from ftkd_core.distillation.teacher_output import TeacherOutput, make_teacher_output
from ftkd_core.losses.focal import quality_focal_loss
from ftkd_core.models.predictions import Predictions
from ftkd_core.runtime.preprocess import normalise
from ftkd_core.types import Frame, Targets
from tests.core.helpers import make_clip, small_model, small_sparse, window_of

WEIGHTS = (2.0, 2.0) + (1.0,) * 8


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_target_attends_to_future_frames_of_the_same_camera() -> None:
    current, future = (
        torch.randn(2, 3, 4, 2, 5, generator=generator()),
        torch.randn(2, 2, 3, 4, 2, 5, generator=generator(1)),
    )
    real = torch.tensor([[True, True], [True, False]])
    target, weight = future_aware_target(current, future, real)
    assert torch.equal(weight, torch.ones(2))
    for sample, camera in itertools.product(range(2), range(3)):
        q = current[sample, camera].flatten(1).T  # (HW, C)
        attended = []
        for frame in range(int(real[sample].sum())):
            v = future[sample, frame, camera].flatten(1).T
            attended.append((q @ v.T / math.sqrt(4)).softmax(-1) @ v)
        expected = (q + torch.stack(attended).mean(0)).T.reshape(4, 2, 5)
        assert torch.allclose(target[sample, camera], expected, atol=1e-5)


def test_a_frame_without_future_frames_is_its_own_target() -> None:
    current, future = torch.randn(2, 1, 4, 2, 3), torch.randn(2, 2, 1, 4, 2, 3)
    real = torch.tensor([[False, False], [True, True]])
    target, weight = future_aware_target(current, future, real)
    assert torch.equal(target[0], current[0])
    assert torch.equal(weight, torch.ones(2))
    for without in (
        future_aware_target(current, future[:, :0], real[:, :0]),
        future_aware_target(current, future, real, "current"),
    ):
        assert torch.equal(without[0], current) and torch.equal(without[1], torch.ones(2))


def test_maps_are_reconstructed_from_unmasked_cells_only() -> None:
    torch.manual_seed(0)
    branch = PerspectiveReconstruction(3, 4, 0.5)
    student = torch.randn(2, 1, 3, 6, 8, requires_grad=True)
    target = torch.randn(2, 1, 4, 6, 8, requires_grad=True)
    loss = branch(student, target, torch.tensor([1.0, 0.0]), generator(3))
    loss.backward()
    assert target.grad is None
    assert student.grad is not None
    assert torch.count_nonzero(student.grad[1]) == 0  # weight 0
    masked = random_mask((2, 1, 1, 6, 8), 0.5, generator(3), student) == 0
    assert 0.3 < float(masked.float().mean()) < 0.7
    assert torch.count_nonzero(student.grad[0][masked[0].expand(-1, 3, -1, -1)]) == 0
    with pytest.raises(ValueError, match="same image size and stride"):
        branch(student[..., :4], target, torch.ones(2), generator())


def test_the_generator_learns_a_predictable_target() -> None:
    torch.manual_seed(0)
    branch = QueryReconstruction(8, 8, 0.2)
    student = torch.randn(1, 64, 8)
    teacher = torch.nn.functional.layer_norm(
        student[..., :1].expand(-1, -1, 8) * torch.arange(1.0, 9.0), (8,)
    )
    pairs = torch.arange(64)[None]
    optimizer = torch.optim.Adam(branch.parameters(), 1e-2)
    losses = []
    for step in range(80):
        loss = branch(student, teacher, pairs, generator(step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])


@pytest.mark.parametrize("mask_ratio", [0.0, 0.5])
def test_channels_of_query_features_are_masked_at_the_ratio(mask_ratio: float) -> None:
    torch.manual_seed(0)
    branch = QueryReconstruction(6, 5, mask_ratio)
    student = torch.randn(1, 40, 6, requires_grad=True)
    pairs = torch.arange(40)[None].clone()
    pairs[0, 30:] = -1
    branch(student, torch.randn(1, 40, 5), pairs, generator()).backward()
    assert student.grad is not None
    has_gradient = student.grad[0] != 0
    assert not has_gradient[30:].any()  # no pair, no loss
    paired = has_gradient[:30]
    if mask_ratio:
        assert paired.all(1).float().mean() < 0.2 and (~paired).all(1).float().mean() < 0.2
    else:
        assert paired.all()


def predictions_of(count: int, seed: int) -> tuple[Tensor, Tensor]:
    logits = torch.randn(2, count, 10, generator=generator(seed)) * 2 - 2
    codes = torch.randn(2, count, 10, generator=generator(seed + 100)) * 5
    return logits, codes


def test_pairs_are_weighted_by_the_score_of_the_teacher_in_the_background() -> None:
    pairs = Alignment(torch.tensor([[0, 2, 3, -1]]), torch.tensor([[True, False, False, False]]))
    scores = torch.tensor([[[0.1, 0.2], [0.9, 0.9], [0.05, 0.5], [0.0, 0.0]]])
    assert pair_weights(scores, pairs).tolist() == [[1.0, 0.5, 0.0, 0.0]]


def test_the_reconstruction_loss_is_the_mean_over_pairs() -> None:
    torch.manual_seed(0)
    branch = QueryReconstruction(6, 5, 0.0)
    student, teacher, pairs = torch.randn(1, 3, 6), torch.randn(1, 4, 5), torch.tensor([[0, 2, -1]])
    loss = branch(student, teacher, pairs, generator())
    single = [branch(student[:, i : i + 1], teacher, pairs[:, i : i + 1], generator()) for i in range(2)]
    assert torch.allclose(loss, (single[0] + single[1]) / 2)


def test_a_student_equal_to_its_teacher_has_no_logit_loss() -> None:
    logits, codes = predictions_of(12, 0)
    objects = torch.full((2, 12), -1)
    objects[:, 3], objects[:, 7] = 1, 0
    found = align(logits, codes, logits, codes, objects, objects)
    assert torch.equal(found.teacher, torch.arange(12).expand(2, -1))
    assert found.foreground.sum() == 4
    terms = logit_losses(logits, codes, logits, codes, found, torch.tensor(WEIGHTS))
    assert set(terms) == {"foreground_class", "foreground_box", "background_class", "background_box"}
    assert all(float(value) == pytest.approx(0, abs=1e-9) for value in terms.values())


def test_class_costs_equal_the_quality_focal_loss_of_each_pair() -> None:
    student = 4 * torch.randn(2, 7, 10, generator=generator())
    teacher = 4 * torch.randn(2, 9, 10, generator=generator(1))
    teacher[0, 2] = student[0, 3]  # equal logits leave rounding errors only
    plain = quality_focal_loss(
        student[:, :, None].expand(-1, -1, 9, -1), teacher.sigmoid()[:, None].expand(-1, 7, -1, -1)
    ).sum(-1)
    found = class_costs(student, teacher)
    assert torch.allclose(found, plain, rtol=1e-5, atol=1e-6)
    assert abs(float(found[0, 3, 2])) < 1e-9


def test_foreground_is_paired_by_object_and_background_by_least_cost() -> None:
    (logits, codes), (teacher_logits, teacher_codes) = predictions_of(4, 1), predictions_of(7, 2)
    student_objects = torch.tensor([[-1, 5, -1, -1]] * 2)
    teacher_objects = torch.tensor([[-1, -1, -1, -1, 5, -1, 6]] * 2)
    found = align(logits, codes, teacher_logits, teacher_codes, student_objects, teacher_objects)
    assert found.teacher[:, 1].tolist() == [4, 4]
    assert found.foreground.tolist() == [[False, True, False, False]] * 2
    for sample in range(2):
        rest = found.teacher[sample, [0, 2, 3]].tolist()
        best = teacher_logits[sample, [0, 1, 2, 3, 5]].amax(-1).topk(3).indices
        kept = torch.tensor([0, 1, 2, 3, 5])[best].tolist()
        assert sorted(rest) == sorted(kept)  # the teacher's best-scoring queries, each once

        def cost(order: tuple[int, ...], sample: int = sample) -> float:
            total = 0.0
            for row, column in zip((0, 2, 3), order, strict=True):
                quality = teacher_logits[sample, column].sigmoid()
                total += 2.0 * float(quality_focal_loss(logits[sample, row], quality).sum())
                total += 0.25 * float((codes[sample, row] - teacher_codes[sample, column]).abs().sum())
            return total

        assert cost(tuple(rest)) == pytest.approx(min(map(cost, itertools.permutations(kept))), rel=1e-5)


def test_background_pairs_out_of_reach_are_dropped_and_foreground_pairs_are_not() -> None:
    (logits, codes), (teacher_logits, teacher_codes) = predictions_of(6, 3), predictions_of(9, 4)
    objects = (torch.tensor([[-1, 5] + [-1] * 4] * 2), torch.tensor([[-1] * 8 + [5]] * 2))
    teacher_codes[:, 8, :3] += 500.0
    every = align(logits, codes, teacher_logits, teacher_codes, *objects)
    distances = pair_distances(codes, teacher_codes, every)
    expected = [(codes[0, i, :3] - teacher_codes[0, j, :3]).norm() for i, j in enumerate(every.teacher[0])]
    assert torch.allclose(distances[0], torch.stack(expected))
    assert distances[:, 1].min() > 400
    reach = float(distances[~every.foreground].median())
    found = align(logits, codes, teacher_logits, teacher_codes, *objects, background_reach_m=reach)
    assert found.foreground.equal(every.foreground)
    kept = (distances <= reach) | every.foreground
    assert 0 < int(kept.sum()) < kept.numel()
    assert found.teacher.equal(torch.where(kept, every.teacher, -1))
    task = DistillationTask(background_reach_m=1e-6, pv_weight=0.0, logits_weight=0.0)
    predictions, _ = task.losses(task.teacher_output())
    pairs = task.ftkd.alignments(predictions, task.teacher_output(), task.targets)[-1]
    assert pairs.foreground.any() and not (pairs.teacher[~pairs.foreground] >= 0).any()


def test_fewer_teacher_queries_leave_student_queries_without_a_pair() -> None:
    (logits, codes), (teacher_logits, teacher_codes) = predictions_of(6, 3), predictions_of(4, 4)
    none = torch.full((2, 6), -1)
    found = align(logits, codes, teacher_logits, teacher_codes, none, none[:, :4])
    assert ((found.teacher >= 0).sum(1) == 4).all()
    assert not found.foreground.any()
    with pytest.raises(FloatingPointError, match="distillation alignment: .* nan or inf"):
        align(logits * torch.nan, codes, teacher_logits, teacher_codes, none, none[:, :4])


def test_logit_losses_pull_towards_the_scores_and_boxes_of_the_teacher() -> None:
    logits = torch.zeros(1, 2, 10, requires_grad=True)
    codes = torch.zeros(1, 2, 10, requires_grad=True)
    teacher_logits = torch.full((1, 2, 10), -2.0)
    teacher_logits[0, 0, 3] = 3.0
    teacher_codes = torch.ones(1, 2, 10)
    pairs = Alignment(torch.tensor([[0, 1]]), torch.tensor([[True, False]]))
    terms = logit_losses(logits, codes, teacher_logits, teacher_codes, pairs, torch.tensor(WEIGHTS))
    torch.stack(list(terms.values())).sum().backward()
    assert logits.grad is not None and codes.grad is not None
    assert logits.grad[0, 0, 3] < 0 and (logits.grad[0, 1] > 0).all()  # up only where the teacher scores high
    assert float(terms["foreground_box"].detach()) == pytest.approx(0.25 * 12)
    score = float(torch.tensor(-2.0).sigmoid())
    assert float(terms["background_box"].detach()) == pytest.approx(0.25 * 12 * score, rel=1e-5)
    equal = logit_losses(
        logits, codes, teacher_logits, teacher_codes, pairs, torch.tensor(WEIGHTS), background_by_score=False
    )
    assert float(equal["background_box"].detach()) == pytest.approx(0.25 * 12)


class DistillationTask:
    """A small student, a small teacher with a future frame, three frames of a clip, and FTKD.

    Background pairs have no distance limit, because untrained models predict boxes at random places.
    """

    def __init__(self, **settings: object) -> None:
        self.config = FTKDConfig(**{"background_reach_m": 0.0} | settings)  # type: ignore[arg-type]
        self.student = small_model().train()
        self.teacher = small_sparse(past=1, future=1).requires_grad_(False)
        clip = make_clip(objects=5)
        self.samples = [make_sample(clip, index, Augmentation(), index == 1) for index in range(3)]
        self.frames = [s.frame(normalise(s.images)) for s in self.samples]
        self.ftkd = FTKD(self.config, student_channels=32, teacher_channels=32, map_channels={16: (16, 32)})

    @property
    def targets(self) -> Targets:
        return self.samples[1].targets

    def teacher_output(self, frames: list[Frame] | None = None) -> TeacherOutput:
        window = window_of(frames or self.frames, 1, [0, 2])
        predictions, pyramid = self.teacher(window)
        real = torch.ones(1, 3, dtype=torch.bool)
        return make_teacher_output(predictions, {16: pyramid[1]}, real, 1, self.config.pv_target)

    def losses(self, output: TeacherOutput) -> tuple[Predictions, dict[str, Tensor]]:
        predictions, _ = self.student(self.frames[1], self.student.start_memory(1))
        maps = {16: predictions.image_features}
        return predictions, self.ftkd(predictions, maps, output, self.targets, generator())


def test_changing_the_future_changes_the_losses_but_not_the_student() -> None:
    torch.manual_seed(0)
    task = DistillationTask()
    task.student.eval()
    future = task.frames[2]._replace(images=-task.frames[2].images)
    before, terms = task.losses(task.teacher_output())
    after, changed = task.losses(task.teacher_output([*task.frames[:2], future]))
    assert torch.equal(before.logits, after.logits) and torch.equal(before.codes, after.codes)
    for name in ("ftkd/pv16", "ftkd/bev", "ftkd/logits_background_class"):
        assert float(terms[name].detach()) != float(changed[name].detach()), name


def test_no_gradient_reaches_the_teacher_and_its_state_does_not_change() -> None:
    torch.manual_seed(0)
    task = DistillationTask(matching="prediction")
    before = {name: value.clone() for name, value in task.teacher.state_dict().items()}
    output = task.teacher_output()
    _, terms = task.losses(output)
    torch.stack(list(terms.values())).sum().backward()
    assert all(p.grad is None for p in task.teacher.parameters())
    assert not any(value.requires_grad for value in (output.logits, output.codes, *output.targets.values()))
    for name, value in task.teacher.state_dict().items():
        assert torch.equal(value, before[name]), name
    for module in (task.ftkd, task.student.backbone, task.student.classifier, task.student.regressor):
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
def test_a_weight_of_0_switches_a_part_off(settings: dict[str, float], left: set[str]) -> None:
    task = DistillationTask(**settings)
    _, terms = task.losses(task.teacher_output())
    assert {name.removeprefix("ftkd/").partition("_")[0] for name in terms} == left


def test_weights_scale_their_terms() -> None:
    torch.manual_seed(0)
    task = DistillationTask()
    output = task.teacher_output()
    _, terms = task.losses(output)
    task.ftkd.config = replace(task.config, pv_weight=2e-3, bev_weight=8.0, logits_weight=3.0)
    _, scaled = task.losses(output)
    for name, factor in (("pv16", 2.0), ("bev", 0.5), ("logits_foreground_class", 3.0)):
        ratio = float(scaled[f"ftkd/{name}"].detach()) / float(terms[f"ftkd/{name}"].detach())
        assert ratio == pytest.approx(factor, rel=1e-4), name


def test_objects_outside_the_range_of_the_teacher_form_no_foreground_pairs() -> None:
    task = DistillationTask()
    output, mask = task.teacher_output(), task.targets.mask
    predictions, _ = task.losses(output)
    near = task.ftkd.alignments(predictions, output, task.targets)[-1]
    assert int(near.foreground.sum()) == int(mask.sum()) == mask.numel()
    reach = task.targets.boxes[..., :2].abs().amax(-1)
    limit = float(reach.median())
    box = (-limit, -limit, -5.0, limit, limit, 3.0)
    decoder = replace(task.teacher.config.decoder, point_range_m=box)
    task.ftkd.teacher = replace(task.teacher.config, decoder=decoder)
    short = task.ftkd.alignments(predictions, output, task.targets)[-1]
    far = reach > limit
    assert int(short.foreground.sum()) == int((~far).sum()) < mask.numel()
