# SPDX-License-Identifier: Apache-2.0
"""FLD, future-guided logit distillation: the student learns the teacher's predictions, foreground and
background separately.

Source: FTKD (arXiv 2512.08247) [note]; our choices are marked [ours]. Symbols: B batch, Qs / Qt student and
teacher queries, K classes.
"""

from typing import Final, NamedTuple

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ftkd_core.losses.focal import quality_focal_loss
from ftkd_core.losses.normalizer import shared_count

CLASS_WEIGHT: Final = 2.0
"""Weight of the class term in alignment and loss [note]."""
BOX_WEIGHT: Final = 0.25
"""Weight of the L1 term of the box code in alignment and loss [note]."""


class Alignment(NamedTuple):
    """Pairs of queries: teacher (B, Qs) int64, the teacher query that each student query is paired with, -1
    for none; foreground (B, Qs) bool, True for pairs of the same object."""

    teacher: Tensor
    foreground: Tensor


@torch.no_grad()
def align(
    student_logits: Tensor,
    student_codes: Tensor,
    teacher_logits: Tensor,
    teacher_codes: Tensor,
    student_objects: Tensor,
    teacher_objects: Tensor,
    *,
    by_prediction: bool = False,
    background_reach_m: float = 0.0,
) -> Alignment:
    """Pair student queries (B, Qs, .) with teacher queries (B, Qt, .).

    *_objects (B, Q) int64 is the object that each query is matched to in the ground truth, -1 for background.
    Foreground queries of the same object are a pair. The others are paired by Hungarian matching on class and
    L1 costs [note], with as many of the teacher's best-scoring background queries as the student has [ours:
    rectangular if the numbers differ]. With by_prediction all pairs come from Hungarian matching, and a pair
    is foreground if the teacher's query is (DETRDistill). Background pairs whose centers are farther apart
    than background_reach_m are dropped; 0 keeps all [ours]. Codes (., 10) are in ego metres. Errors:
    FloatingPointError if a cost is not finite.
    """
    device = student_objects.device
    costs = CLASS_WEIGHT * class_costs(student_logits.detach(), teacher_logits.detach())
    costs += BOX_WEIGHT * torch.cdist(student_codes.detach().float(), teacher_codes.detach().float(), p=1)
    costs, scores, student_objects, teacher_objects = (  # four copies to the CPU, not four per sample
        value.cpu() for value in (costs, teacher_logits.float().amax(-1), student_objects, teacher_objects)
    )
    samples = [
        _align_sample(*sample, by_prediction=by_prediction)
        for sample in zip(costs, scores, student_objects, teacher_objects, strict=True)
    ]
    alignment = Alignment(*(torch.stack(values).to(device) for values in zip(*samples, strict=True)))
    if not background_reach_m:
        return alignment
    near = pair_distances(student_codes, teacher_codes, alignment) <= background_reach_m
    kept = near | alignment.foreground
    return alignment._replace(teacher=torch.where(kept, alignment.teacher, -1))


def _align_sample(
    costs: Tensor, scores: Tensor, student_objects: Tensor, teacher_objects: Tensor, *, by_prediction: bool
) -> Alignment:
    """Return the pairs of one sample: costs (Qs, Qt), best scores (Qt,) of the teacher, objects (Qs,) and
    (Qt,), all on the CPU."""
    if by_prediction:
        student_objects = torch.full_like(student_objects, -1)
    same = student_objects[:, None] == teacher_objects[None]
    same &= (student_objects >= 0)[:, None]  # (Qs, Qt), at most one per row
    foreground = same.any(1)
    partner = torch.where(foreground, same.byte().argmax(1), -1)
    rows = (student_objects < 0).nonzero()[:, 0]
    columns = torch.arange(len(teacher_objects))
    if not by_prediction:
        columns = (teacher_objects < 0).nonzero()[:, 0]
    priority = scores[columns] + 1e6 * (teacher_objects[columns] >= 0)  # foreground is always kept
    columns = columns[priority.topk(min(len(rows), len(columns))).indices.sort().values]
    cost = costs[rows][:, columns]
    if not torch.isfinite(cost).all():
        raise FloatingPointError(
            "distillation alignment: the cost is not finite, because the predictions of student or teacher "
            "contain nan or inf"
        )
    chosen, matched = map(torch.as_tensor, linear_sum_assignment(cost.numpy()))
    partner[rows[chosen]] = columns[matched]
    foreground[rows[chosen]] = teacher_objects[columns[matched]] >= 0
    return Alignment(partner, foreground)


def pair_distances(student_codes: Tensor, teacher_codes: Tensor, alignment: Alignment) -> Tensor:
    """Return the distance in metres (B, Qs) between the centers of each pair; undefined for a query without a
    pair."""
    index = alignment.teacher.clamp(min=0)[..., None].expand(-1, -1, 3)
    teacher_centers = teacher_codes.detach().float()[..., :3].gather(1, index)
    distances: Tensor = (student_codes.detach().float()[..., :3] - teacher_centers).norm(dim=-1)
    return distances


def class_costs(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the quality focal loss of every pair of student logits (B, Qs, K) and teacher logits (B, Qt, K),
    summed over classes: (B, Qs, Qt) float32.

    With scores p and t, student logit s and a = log(1 + e^s), the loss is (p - t)^2 (a - s t), a polynomial
    in t: one matrix product over powers of t replaces Qs Qt K losses. It is computed in float64, because
    large terms cancel if both scores agree. Plain twin: `quality_focal_loss`.
    """
    logit = student.double()
    score, quality = logit.sigmoid(), teacher.double().sigmoid()
    entropy = F.softplus(logit)
    factors = (
        score**2 * entropy,
        -(score**2) * logit - 2 * score * entropy,
        2 * score * logit + entropy,
        -logit,
    )
    powers = torch.cat([quality**power for power in range(4)], dim=-1)  # (B, Qt, 4 K)
    return (torch.cat(factors, dim=-1) @ powers.mT).float()


def logit_losses(
    logits: Tensor,
    codes: Tensor,
    teacher_logits: Tensor,
    teacher_codes: Tensor,
    alignment: Alignment,
    code_weights: Tensor,
    *,
    background_by_score: bool = True,
) -> dict[str, Tensor]:
    """Return the weighted class and box terms of foreground and background pairs, each divided by the number
    of foreground pairs [ours: divided by 900 queries the loss would vanish].

    logits (B, Qs, K) and codes (B, Qs, 10) are the student's; the teacher's (B, Qt, .) are detached. With
    background_by_score a background box is weighted by the teacher's score. The heading is compared as sine
    and cosine in ego, which both models predict.
    """
    quality = teacher_logits.detach().float().sigmoid()
    classes, width = quality.shape[-1], codes.shape[-1]
    index = alignment.teacher.clamp(min=0)[..., None]
    quality = quality.gather(1, index.expand(-1, -1, classes))  # (B, Qs, K)
    goal = teacher_codes.detach().float().gather(1, index.expand(-1, -1, width))
    by_class = quality_focal_loss(logits.float(), quality).sum(-1)  # (B, Qs)
    by_box = ((codes.float() - goal).abs() * code_weights).sum(-1)
    paired = alignment.teacher >= 0
    count = shared_count(alignment.foreground.sum())
    terms: dict[str, Tensor] = {}
    weights = pair_weights(
        teacher_logits.float().sigmoid(), alignment, background_by_score=background_by_score
    )
    parts = {"foreground": paired & alignment.foreground, "background": paired & ~alignment.foreground}
    for name, pairs in parts.items():
        terms[f"{name}_class"] = CLASS_WEIGHT * (by_class * pairs).sum() / count
        terms[f"{name}_box"] = BOX_WEIGHT * (by_box * weights * pairs).sum() / count
    return terms


def pair_weights(teacher_scores: Tensor, alignment: Alignment, *, background_by_score: bool = True) -> Tensor:
    """Return the weights (B, Qs) of pairs from the teacher's scores (B, Qt, K): 1 for foreground pairs, the
    best score of the teacher's query for background pairs with background_by_score; 0 without a pair."""
    best = teacher_scores.detach().amax(-1).gather(1, alignment.teacher.clamp(min=0))
    one = torch.ones_like(best)
    weights = torch.where(alignment.foreground | (not background_by_score), one, best)
    return weights * (alignment.teacher >= 0)
