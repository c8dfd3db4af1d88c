# SPDX-License-Identifier: Apache-2.0
"""Linking of proposals across frames: initial velocities and positions of objects (ours).

A single frame gives the class and an approximate position; velocity needs several frames. Instead of learning
velocity from sampled features, which takes many windows, queries start from a line through matching proposals
(after CenterTrack, Zhou et al. 2020, and offline smoothing). There are no parameters and no gradients.

Symbols: B batch, I proposals of the current frame, T other frames of J proposals each, K classes, V candidate
velocities.
"""

from collections.abc import Sequence
from typing import Final, NamedTuple

import torch
from torch import Tensor

from ftkd_core.classes import IMMOBILE
from ftkd_core.geometry import full_precision
from ftkd_core.models.anchors import Anchors, face_forward

_MAX_SPEED_M_S: Final = 22.0
SAME_TIME_S: Final = 1e-3
"""A frame nearer in time than this repeats the current one."""
_EXACT: Final = "donot_use_mm_for_euclid_dist"  # the default has errors of centimetres
_MIN_SCORE: Final = 1e-20
_LOG_ZERO: Final = -1e4  # exp of it is 0

# Standard deviation of a proposal's position: a constant in metres, a share of its distance from the vehicle
# (depth errors grow with distance) and a share of its length (an image often shows one end of an object).
_NEAR_M: Final = 0.4
_SHARE_OF_DISTANCE: Final = 0.08
_SHARE_OF_LENGTH: Final = 0.1
_MAX_LENGTH_M: Final = 20.0

# A moving candidate needs more support than standing still, by moving * v / (v + slow) + steep * v / typical
# (in units of one frame's support), because most objects stand. These numbers and _SHARE_OF_LENGTH were tuned
# on synthetic scenes that are in no evaluation (docs/explanation/models.md).
_STEEP: Final = 0.6
_SLOW_M_S: Final = 1.0
_TYPICAL_M_S: Final = {"pedestrian": 1.0}
_DEFAULT_TYPICAL_M_S: Final = 10.0
_MOVING: Final = {"trailer": 2.0, "construction_vehicle": 2.0, "pedestrian": 0.5}
_DEFAULT_MOVING: Final = 1.0

# Standard deviations of the velocity prior of moving and of standing objects.
_MOVING_SPREAD_M_S: Final = 6.0
_STANDING_SPREAD_M_S: Final = 0.5


class FrameProposals(NamedTuple):
    """Proposals of T frames in the current ego frame.

    codes (B, T, J, 10); logits (B, T, J, K); origin (B, T, 2), the position of the vehicle in metres; time
    (B, T) seconds relative to the current frame, 0 if a frame repeats it.
    """

    codes: Tensor
    logits: Tensor
    origin: Tensor
    time: Tensor


def current_proposals(anchors: Anchors, origin: Tensor) -> FrameProposals:
    """Return anchors (B, I) of the current frame, seen from origin (B, 2), as proposals of one frame."""
    time = torch.zeros_like(origin[:, :1])
    return FrameProposals(anchors.codes[:, None], anchors.logits[:, None], origin[:, None], time)


class MotionPrior(NamedTuple):
    """Prior knowledge of the motion of classes, each (K,).

    mobile is 1, or 0 for classes that never move; moving and typical_m_s set the cost of a speed.
    """

    mobile: Tensor
    moving: Tensor
    typical_m_s: Tensor

    def cost(self, label: Tensor, speed: Tensor) -> Tensor:
        """Return the support (B, I, V) that speeds (B, I, V) of objects of a class (B, I) need beyond that of
        standing still."""
        typical, moving = self.typical_m_s[label][..., None], self.moving[label][..., None]
        return moving * speed / (speed + _SLOW_M_S) + _STEEP * speed / typical


def motion_prior(names: Sequence[str]) -> Tensor:
    """Return the fields of `MotionPrior` as (3, K) for classes in this order."""
    mobile = [float(name not in IMMOBILE) for name in names]
    moving = [_MOVING.get(name, _DEFAULT_MOVING) for name in names]
    typical = [_TYPICAL_M_S.get(name, _DEFAULT_TYPICAL_M_S) for name in names]
    return torch.tensor([mobile, moving, typical])


class Observations(NamedTuple):
    """Proposals reduced to what linking needs: points (..., J, 2) in the ground plane, their standard
    deviation in metres, score and label, each (..., J)."""

    points: Tensor
    spread: Tensor
    score: Tensor
    label: Tensor


@torch.no_grad()
@full_precision
def link_proposals(
    current: FrameProposals, others: FrameProposals, prior: MotionPrior, candidate_frames: int = 2
) -> Anchors:
    """Return anchors (B, I) of the current frame with the velocity that the other frames support best, and,
    if they stand, with the mean position.

    Candidate velocities are zero and those that lead to a proposal of the same class in one of the
    `candidate_frames` frames nearest in time. The candidate with the most support over all frames, minus the
    cost of the prior, is refined by a weighted line fit through the supporting proposals.
    """
    own = Observations(*(value[:, 0] for value in observe(current)))
    observed = observe(others)
    prior = MotionPrior(*(value.float() for value in prior))
    moves = prior.mobile[own.label] > 0
    velocity = candidate_velocities(own, observed, others.time, candidate_frames)  # (B, I, V, 2)
    velocity = velocity * moves[..., None, None]
    total = -prior.cost(own.label, velocity.norm(dim=-1)) * own.score[..., None]
    for t in range(others.time.shape[1]):
        frame = Observations(*(value[:, t] for value in observed))
        expected = own.points[:, :, None] + velocity * others.time[:, t, None, None, None]
        total = total + support(own.label, expected, frame)
    best = total.argmax(-1)[..., None, None].expand(-1, -1, 1, 2)
    selected = velocity.gather(2, best)[:, :, 0]  # (B, I, 2)
    center, fitted = fit_line(own, observed, others.time, selected)
    fitted = fitted * moves[..., None]
    codes = current.codes[:, 0]
    heading = face_forward(codes[..., 6:8].flip(-1), fitted).flip(-1)
    linked = torch.cat([center, codes[..., 2:6], heading, fitted], dim=-1)
    return Anchors(linked, current.logits[:, 0])


def observe(frames: FrameProposals) -> Observations:
    # Not codes[..., :2]: OpenVINO drops a slice in front of a gather.
    points = torch.stack([frames.codes[..., 0], frames.codes[..., 1]], dim=-1)
    score = frames.logits.sigmoid().amax(-1).sqrt()
    length = frames.codes[..., 3:6].amax(-1).exp().clamp(max=_MAX_LENGTH_M)
    distance = (points - frames.origin[:, :, None]).norm(dim=-1)
    spread = _NEAR_M + _SHARE_OF_DISTANCE * distance + _SHARE_OF_LENGTH * length
    return Observations(points, spread, score, frames.logits.argmax(-1))


def candidate_velocities(own: Observations, observed: Observations, time: Tensor, count: int) -> Tensor:
    """Return velocities (B, I, V, 2); invalid ones are 0, which is always a candidate."""
    order = (time.abs() + 1e6 * (time.abs() < SAME_TIME_S)).argsort(dim=1)[:, :count]  # (B, count)
    parts = [torch.zeros_like(own.points)[:, :, None]]
    for place in range(order.shape[1]):
        frame = order[:, place]
        row = torch.arange(len(frame), device=frame.device)
        points, gap = observed.points[row, frame], time[row, frame]  # (B, J, 2), (B,)
        distinct = gap.abs() >= SAME_TIME_S
        gap = torch.where(distinct, gap, 1.0)
        velocity = (points[:, None] - own.points[:, :, None]) / gap[:, None, None, None]
        same_class = observed.label[row, frame][:, None] == own.label[:, :, None]
        valid = same_class & (velocity.norm(dim=-1) < _MAX_SPEED_M_S)
        valid = valid & distinct[:, None, None]
        parts.append(torch.where(valid[..., None], velocity, 0.0))
    return torch.cat(parts, dim=2)


def support(label: Tensor, expected: Tensor, frame: Observations) -> Tensor:
    """Return the support (B, I, V) of one frame for objects of a class (B, I) at expected points (B, I, V,
    2).

    It is the maximum over proposals of that class of score * exp(-distance^2 / 2 spread^2). The logarithm is
    quadratic in the expected point and is computed as one matrix product, because explicit differences of all
    pairs would be millions of numbers.
    """
    inverse = frame.spread.square().reciprocal()  # (B, J)
    constant = frame.score.clamp(min=_MIN_SCORE).log() - 0.5 * inverse * frame.points.square().sum(-1)
    observed_terms = torch.stack(
        [*(inverse[..., None] * frame.points).unbind(-1), -0.5 * inverse, constant], dim=1
    )
    expected_terms = torch.cat(
        [expected, expected.square().sum(-1, keepdim=True), torch.ones_like(expected[..., :1])], dim=-1
    )  # (B, I, V, 4)
    product = expected_terms.flatten(1, 2) @ observed_terms
    logarithm = torch.unflatten(product, 1, expected.shape[1:3])  # (B, I, V, J)
    other_class = (label[:, :, None] != frame.label[:, None])[:, :, None]
    return logarithm.masked_fill_(other_class, _LOG_ZERO).amax(-1).exp()


def nearest_observations(
    own: Observations, observed: Observations, time: Tensor, velocity: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the weight, 0 to 1, and the index, both (B, T, I), of the proposal of each frame that is nearest
    to a motion (B, I, 2) and of the same class."""
    expected = own.points[:, None] + velocity[:, None] * time[:, :, None, None]  # (B, T, I, 2)
    distance = torch.cdist(expected, observed.points, compute_mode=_EXACT)  # (B, T, I, J)
    near = torch.exp(-0.5 * (distance / observed.spread[:, :, None]).square()) * observed.score[:, :, None]
    near = near * (own.label[:, None, :, None] == observed.label[:, :, None])
    weight, index = near.max(dim=-1)
    return weight, index


def fit_line(
    own: Observations, observed: Observations, time: Tensor, velocity: Tensor
) -> tuple[Tensor, Tensor]:
    """Return position and velocity (B, I, 2) of a weighted least-squares line through the proposals nearest
    to the selected motion.

    A prior limits the velocity. Only objects at rest get the fitted position: moving ones may turn, so their
    path is no straight line.
    """
    weight, index = nearest_observations(own, observed, time, velocity)
    points = observed.points.gather(2, index[..., None].expand(-1, -1, -1, 2))
    weight = weight / observed.spread.gather(2, index).square()
    own_weight = own.score / own.spread.square()  # the proposal itself, at time 0
    t = time[..., None].expand_as(weight)
    total, first, second = own_weight + weight.sum(1), (weight * t).sum(1), (weight * t * t).sum(1)  # (B, I)
    position = own_weight[..., None] * own.points + (weight[..., None] * points).sum(1)
    moment = ((weight * t)[..., None] * points).sum(1)
    moving = velocity.norm(dim=-1) > 0
    prior = torch.where(moving, 1.0 / _MOVING_SPREAD_M_S**2, 1.0 / _STANDING_SPREAD_M_S**2)
    second = second + prior
    determinant = (total * second - first.square()).clamp(min=1e-6)[..., None]
    center = (second[..., None] * position - first[..., None] * moment) / determinant
    fitted = (total[..., None] * moment - first[..., None] * position) / determinant
    return torch.where(moving[..., None], own.points, center), fitted
