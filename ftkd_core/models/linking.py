# SPDX-License-Identifier: Apache-2.0
"""Proposals of several frames, linked: where an object of the current frame was before and will be.

One frame says what an object is and roughly where; how fast it is, and where exactly, the other frames say.
A detector that has to find this out from sampled features needs a great many windows; here it starts from a
line through the proposals of all frames (ours; after the tracks of CenterTrack, Zhou et al. 2020, and offline
smoothing). Nothing is learnt and no gradient flows. Symbols: B batch, I proposals of the current frame, T
other frames of J proposals each, K classes, V candidate velocities.
"""

from collections.abc import Sequence
from typing import Final, NamedTuple

import torch
from torch import Tensor

from ftkd_core.classes import IMMOBILE
from ftkd_core.geometry import full_precision
from ftkd_core.models.anchors import Anchors, face_forward

_FASTEST_M_S: Final = 22.0
_SAME_MOMENT_S: Final = 1e-3
_EXACT: Final = "donot_use_mm_for_euclid_dist"  # the default is good to centimetres only
_LEAST_SURE, _NEVER = 1e-20, -1e4  # as a logarithm; exp of the second is 0
_NEAR_M: Final = 0.4
_GROWTH: Final = 0.08
_OF_LENGTH: Final = 0.1
"""How far off a proposal may be: metres near, per metre of distance from the vehicle, as errors of depth
grow, and per metre of its own length, of which one image often shows one end."""
_LONGEST_M: Final = 20.0
_STEEP: Final = 0.6
_TYPICAL_M_S: Final = {"pedestrian": 1.0}
_OTHERS_TYPICAL_M_S: Final = 10.0
_MOVING: Final = {"trailer": 2.0, "construction_vehicle": 2.0, "pedestrian": 0.5}
_OTHERS_MOVING: Final = 1.0
_SLOW_M_S: Final = 1.0
"""What a candidate of speed v must win over standing still, in supports of one frame:
moving * v / (v + slow) for moving at all, for most things stand, and steep * v / typical for its speed. These
and the share of length are ours, found on synthetic scenes that no other figure is of (docs/models.md)."""
_SPEED_SPREAD_M_S: Final = 6.0
_CREEP_M_S: Final = 0.5
"""Prior spreads of the speed of what moves, and of what is taken to stand."""


class FrameProposals(NamedTuple):
    """Proposals of T frames, in the current ego frame: codes (B, T, J, 10), logits (B, T, J, K); origin
    (B, T, 2) where the vehicle was in metres; time (B, T) seconds from the current frame, of repeated frames
    too."""

    codes: Tensor
    logits: Tensor
    origin: Tensor
    time: Tensor


def current_proposals(anchors: Anchors, origin: Tensor) -> FrameProposals:
    """Anchors (B, I) of the current frame, seen from origin (B, 2), as the one frame they are."""
    time = torch.zeros_like(origin[:, :1])
    return FrameProposals(anchors.codes[:, None], anchors.logits[:, None], origin[:, None], time)


class MotionPrior(NamedTuple):
    """What is known of how classes move before one looks, each (K,): mobile 1, or 0 for those that never
    do; moving and typical_m_s make a candidate's cost."""

    mobile: Tensor
    moving: Tensor
    typical_m_s: Tensor

    def cost(self, label: Tensor, speed: Tensor) -> Tensor:
        """What candidates of a speed (B, I, V) must win over standing still, objects of a class (B, I)."""
        typical, moving = self.typical_m_s[label][..., None], self.moving[label][..., None]
        return moving * speed / (speed + _SLOW_M_S) + _STEEP * speed / typical


def motion_prior(names: Sequence[str]) -> Tensor:
    """The rows of `MotionPrior` (3, K) for classes in this order."""
    mobile = [float(name not in IMMOBILE) for name in names]
    moving = [_MOVING.get(name, _OTHERS_MOVING) for name in names]
    typical = [_TYPICAL_M_S.get(name, _OTHERS_TYPICAL_M_S) for name in names]
    return torch.tensor([mobile, moving, typical])


class _Seen(NamedTuple):
    """What linking reads of proposals: places (..., J, 2), how far off they may be, how sure they are, their
    class, all (..., J)."""

    points: Tensor
    spread: Tensor
    score: Tensor
    label: Tensor


@torch.no_grad()
@full_precision
def link_proposals(
    now: FrameProposals, others: FrameProposals, prior: MotionPrior, candidate_frames: int = 2
) -> Anchors:
    """Anchors (B, I) of the current frame (`now`, of one frame) with the velocity, and the centre in the
    ground plane, that the other frames speak for.

    Candidates are standing still and the velocities that lead to a proposal of the same class in one of the
    `candidate_frames` frames nearest in time. The one with the most support over all frames, less what the
    prior asks of it, is refined by a weighted line through the proposals that support it.
    """
    own = _Seen(*(value[:, 0] for value in _seen(now)))
    there = _seen(others)
    prior = MotionPrior(*(value.float() for value in prior))
    moves = prior.mobile[own.label] > 0
    velocity = _candidates(own, there, others.time, candidate_frames)  # (B, I, V, 2)
    velocity = velocity * moves[..., None, None]
    support = -prior.cost(own.label, velocity.norm(dim=-1)) * own.score[..., None]
    for t in range(others.time.shape[1]):
        seen = _Seen(*(value[:, t] for value in there))
        gone = own.points[:, :, None] + velocity * others.time[:, t, None, None, None]
        support = support + _support(own.label, gone, seen)
    best = support.argmax(-1)[..., None, None].expand(-1, -1, 1, 2)
    chosen = velocity.gather(2, best)[:, :, 0]  # (B, I, 2)
    center, fitted = _line(own, there, others.time, chosen)
    fitted = fitted * moves[..., None]
    codes = now.codes[:, 0]
    heading = face_forward(codes[..., 6:8].flip(-1), fitted).flip(-1)
    linked = torch.cat([center, codes[..., 2:6], heading, fitted], dim=-1)
    return Anchors(linked, now.logits[:, 0])


def _seen(frames: FrameProposals) -> _Seen:
    points, score = frames.codes[..., :2], frames.logits.sigmoid().amax(-1).sqrt()
    length = frames.codes[..., 3:6].amax(-1).exp().clamp(max=_LONGEST_M)
    spread = _NEAR_M + _GROWTH * (points - frames.origin[:, :, None]).norm(dim=-1) + _OF_LENGTH * length
    return _Seen(points, spread, score, frames.logits.argmax(-1))


def _candidates(own: _Seen, there: _Seen, time: Tensor, count: int) -> Tensor:
    """Velocities (B, I, V, 2); those that mean nothing are 0, which is one of them."""
    order = (time.abs() + 1e6 * (time.abs() < _SAME_MOMENT_S)).argsort(dim=1)[:, :count]  # (B, count)
    parts = [torch.zeros_like(own.points)[:, :, None]]
    for place in range(order.shape[1]):
        frame = order[:, place]
        row = torch.arange(len(frame), device=frame.device)
        points, gap = there.points[row, frame], time[row, frame]  # (B, J, 2), (B,)
        other = gap.abs() >= _SAME_MOMENT_S
        moved = (points[:, None] - own.points[:, :, None]) / torch.where(other, gap, 1.0)[:, None, None, None]
        fits = (there.label[row, frame][:, None] == own.label[:, :, None]) & (
            moved.norm(dim=-1) < _FASTEST_M_S
        )
        fits = fits & other[:, None, None]
        parts.append(torch.where(fits[..., None], moved, 0.0))
    return torch.cat(parts, dim=2)


def _support(label: Tensor, gone: Tensor, seen: _Seen) -> Tensor:
    """How much (B, I, V) the proposals of one frame speak for places gone (B, I, V, 2) of objects of a class
    (B, I): the best one's sureness times exp(-distance^2 / 2 spread^2).

    Their logarithm is one product of matrices, quadratic in the place; places of all pairs would be some
    millions.
    """
    inverse = seen.spread.square().reciprocal()  # (B, J)
    constant = seen.score.clamp(min=_LEAST_SURE).log() - 0.5 * inverse * seen.points.square().sum(-1)
    of_seen = torch.stack([*(inverse[..., None] * seen.points).unbind(-1), -0.5 * inverse, constant], dim=1)
    of_gone = torch.cat(
        [gone, gone.square().sum(-1, keepdim=True), torch.ones_like(gone[..., :1])], dim=-1
    )  # (B, I, V, 4)
    logarithm = torch.unflatten(of_gone.flatten(1, 2) @ of_seen, 1, gone.shape[1:3])  # (B, I, V, J)
    another = (label[:, :, None] != seen.label[:, None])[:, :, None]
    return logarithm.masked_fill_(another, _NEVER).amax(-1).exp()


def _line(own: _Seen, there: _Seen, time: Tensor, velocity: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted least squares of place and velocity (B, I, 2) over the proposals nearest to the chosen motion;
    the velocity is held back by how unusual it would be, and only what stands is moved."""
    gone = own.points[:, None] + velocity[:, None] * time[:, :, None, None]  # (B, T, I, 2)
    distance = torch.cdist(gone, there.points, compute_mode=_EXACT)  # (B, T, I, J)
    near = torch.exp(-0.5 * (distance / there.spread[:, :, None]).square()) * there.score[:, :, None]
    near = near * (own.label[:, None, :, None] == there.label[:, :, None])
    weight, index = near.max(dim=-1)  # (B, T, I)
    points = there.points.gather(2, index[..., None].expand(-1, -1, -1, 2))
    weight = weight / there.spread.gather(2, index).square()
    itself = own.score / own.spread.square()  # in its own frame, at time 0, a proposal is itself
    t = time[..., None].expand_as(weight)
    total, first, second = itself + weight.sum(1), (weight * t).sum(1), (weight * t * t).sum(1)  # (B, I)
    place = itself[..., None] * own.points + (weight[..., None] * points).sum(1)
    moment = ((weight * t)[..., None] * points).sum(1)
    prior = torch.where(velocity.norm(dim=-1) > 0, 1.0 / _SPEED_SPREAD_M_S**2, 1.0 / _CREEP_M_S**2)
    held = second + prior
    determinant = (total * held - first.square()).clamp(min=1e-6)[..., None]
    center = (held[..., None] * place - first[..., None] * moment) / determinant
    fitted = (total[..., None] * moment - first[..., None] * place) / determinant
    stands = (velocity.norm(dim=-1) == 0)[..., None]
    return torch.where(stands, center, own.points), fitted  # those that move may turn: no straight line
