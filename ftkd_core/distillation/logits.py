# SPDX-License-Identifier: Apache-2.0
"""FLD, future-guided logit distillation: the student's predictions follow the teacher's, foreground and
background apart.

Source: FTKD, method.md section 3 [note]; marked choices are ours. Symbols: B batch, Qs / Qt student and
teacher queries, K classes.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ftkd_core.losses.focal import quality_focal_loss
from ftkd_core.losses.normalizer import shared_count


class Alignment(NamedTuple):
    """Which teacher query each student query follows: teacher (B, Qs) int64, -1 for none; foreground (B, Qs)
    bool, True where both answer for the same object."""

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
    class_weight: float = 2.0,
    box_weight: float = 0.25,
    *,
    by_prediction: bool = False,
    background_reach_m: float = 0.0,
) -> Alignment:
    """Student queries (B, Qs, .) paired with teacher queries (B, Qt, .).

    *_objects (B, Q) int64 is the object each query answers for by its own matching with the ground truth, -1
    for background. Foreground pairs meet through that object; the rest by Hungarian matching on 2.0 class +
    0.25 L1 [note], where the teacher keeps as many of its best-scoring background queries as the student has
    [ours: rectangular where the numbers differ]. With by_prediction all pairs meet by Hungarian matching, and
    a pair is foreground where the teacher's query is (DETRDistill). A background pair whose centres are
    farther apart than background_reach_m is none (0: all are kept) [ours]. Codes are both ours, (., 10) in
    ego metres. Errors: FloatingPointError where a cost is not finite.
    """
    device = student_objects.device
    costs = class_weight * class_costs(student_logits.detach(), teacher_logits.detach())
    costs += box_weight * torch.cdist(student_codes.detach().float(), teacher_codes.detach().float(), p=1)
    costs, belief, student_objects, teacher_objects = (  # all that pairing needs, in four copies
        value.cpu() for value in (costs, teacher_logits.float().amax(-1), student_objects, teacher_objects)
    )
    partner = torch.full(student_objects.shape, -1, dtype=torch.long)
    foreground = torch.zeros(student_objects.shape, dtype=torch.bool)
    for sample in range(len(partner)):
        mine, yours = student_objects[sample], teacher_objects[sample]
        if by_prediction:
            mine = torch.full_like(mine, -1)
        same = (mine[:, None] == yours[None]) & (mine >= 0)[:, None]  # (Qs, Qt), at most one a row
        foreground[sample] = same.any(1)
        partner[sample] = torch.where(foreground[sample], same.byte().argmax(1), -1)
        rows = (mine < 0).nonzero()[:, 0]
        columns = torch.arange(len(yours)) if by_prediction else (yours < 0).nonzero()[:, 0]
        worth = belief[sample, columns] + 1e6 * (yours[columns] >= 0)  # foreground stays
        columns = columns[worth.topk(min(len(rows), len(columns))).indices.sort().values]
        cost = costs[sample][rows][:, columns]
        if not torch.isfinite(cost).all():
            raise FloatingPointError(
                "distillation alignment: the cost is not finite, for the predictions of student or teacher "
                "hold nan or inf"
            )
        chosen, matched = map(torch.as_tensor, linear_sum_assignment(cost.numpy()))
        partner[sample, rows[chosen]] = columns[matched]
        foreground[sample, rows[chosen]] = yours[columns[matched]] >= 0
    alignment = Alignment(partner.to(device), foreground.to(device))
    if not background_reach_m:
        return alignment
    near = centres_apart(student_codes, teacher_codes, alignment) <= background_reach_m
    kept = near | alignment.foreground
    return alignment._replace(teacher=torch.where(kept, alignment.teacher, -1))


def centres_apart(student_codes: Tensor, teacher_codes: Tensor, alignment: Alignment) -> Tensor:
    """Metres (B, Qs) between the centres of each pair, of a query without partner any."""
    index = alignment.teacher.clamp(min=0)[..., None].expand(-1, -1, 3)
    theirs = teacher_codes.detach().float()[..., :3].gather(1, index)
    apart: Tensor = (student_codes.detach().float()[..., :3] - theirs).norm(dim=-1)
    return apart


def class_costs(student: Tensor, teacher: Tensor) -> Tensor:
    """Quality focal loss of every student query's logits (B, Qs, K) towards every teacher query's scores, as
    logits (B, Qt, K), summed over classes: (B, Qs, Qt) float32.

    With p and t the two scores, s the student's logit and a = log(1 + e^s), the loss is (p - t)^2 (a - s t),
    a polynomial in t: one matrix product over powers of t instead of Qs Qt K losses. In float64, for where
    both agree large terms cancel. Plain twin: `quality_focal_loss`.
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
    foreground: bool = True,
    background: bool = True,
    class_weight: float = 2.0,
    box_weight: float = 0.25,
    background_by_score: bool = True,
) -> dict[str, Tensor]:
    """Weighted class and box terms of foreground and background pairs, each divided by the number of
    foreground pairs [ours: by 900, as a mean would, the loss would vanish among empty queries].

    logits (B, Qs, K), codes (B, Qs, 10) of the student; the teacher's (B, Qt, .) are detached. The heading's
    part of the code is compared as it stands, in both models sine and cosine in ego.
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
    weights = pair_weights(teacher_logits.float().sigmoid(), alignment) if background_by_score else paired
    parts = (
        ("foreground", foreground, paired & alignment.foreground),
        ("background", background, paired & ~alignment.foreground),
    )
    for name, wanted, pairs in parts:
        if wanted:
            terms[f"{name}_class"] = class_weight * (by_class * pairs).sum() / count
            terms[f"{name}_box"] = box_weight * (by_box * weights * pairs).sum() / count
    return terms


def pair_weights(teacher_scores: Tensor, alignment: Alignment) -> Tensor:
    """Weights (B, Qs) of pairs from the teacher's scores (B, Qt, K): 1 in the foreground, in the background
    the best score of the teacher's query, 0 without a partner."""
    best = teacher_scores.detach().amax(-1).gather(1, alignment.teacher.clamp(min=0))
    weights = torch.where(alignment.foreground, torch.ones_like(best), best)
    return weights * (alignment.teacher >= 0)
