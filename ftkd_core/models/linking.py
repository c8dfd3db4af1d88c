# SPDX-License-Identifier: Apache-2.0
"""Proposals of the frames of a window, linked: where an object of the current frame was before and will be.

One frame says what an object is and roughly where; how fast it is, and where exactly, the other frames say.
A detector that has to find this out from sampled features needs a great many windows; here it starts from a
line through the proposals of all frames (ours; after the tracks of CenterTrack, Zhou et al. 2020, and offline
smoothing). Nothing is learnt and no gradient flows. Symbols: B batch, T frames, current first, I proposals a
frame, K classes, V candidate velocities.
"""

from collections.abc import Sequence
from typing import Final, NamedTuple

import torch
from torch import Tensor

from ftkd_core.geometry import full_precision
from ftkd_core.models.anchors import Anchors, face_forward

_FASTEST_M_S: Final = 22.0
_SAME_MOMENT_S: Final = 1e-3
_EXACT: Final = "donot_use_mm_for_euclid_dist"  # the default is good to centimetres only
_NEAR_M: Final = 0.4
_GROWTH: Final = 0.08
"""How far off a proposal may be: metres near, and per metre of distance from the vehicle, as errors of depth
grow."""
_STILL_SHARE: Final = 0.6
"""Of a frame's support that a candidate must win over standing still, at 5 m/s; most things stand."""
_SPEED_SPREAD_M_S: Final = 6.0
_CREEP_M_S: Final = 0.5
"""Prior spreads of the speed of what moves, and of what is taken to stand."""


class FrameProposals(NamedTuple):
    """Proposals of all frames, in the current ego frame: codes (B, T, I, 10), logits (B, T, I, K); origin
    (B, T, 2) where the vehicle was in metres; time (B, T) seconds from the current frame, of repeated frames
    too."""

    codes: Tensor
    logits: Tensor
    origin: Tensor
    time: Tensor


@torch.no_grad()
@full_precision
def link_proposals(frames: FrameProposals, fixed: Sequence[int] = (), candidate_frames: int = 2) -> Anchors:
    """Anchors (B, I) of the current frame with the velocity, and the centre in the ground plane, that the
    window speaks for.

    Candidates are standing still and the velocities that lead to a proposal of the same class in one of the
    `candidate_frames` frames nearest in time. The one with the most support over all frames is refined by a
    weighted line through the proposals that support it. Classes in `fixed` never move.
    """
    points, score = frames.codes[..., :2], frames.logits.sigmoid().amax(-1)  # (B, T, I, 2), (B, T, I)
    label = frames.logits.argmax(-1)
    spread = _NEAR_M + _GROWTH * (points - frames.origin[:, :, None]).norm(dim=-1)  # (B, T, I)
    score = score.sqrt()
    start, now = points[:, 0], label[:, 0]  # (B, I, 2)
    velocity = _candidates(points, label, frames.time, candidate_frames)  # (B, I, V, 2)
    moves = torch.ones_like(now, dtype=torch.bool)
    for index in fixed:
        moves &= now != index
    velocity = velocity * moves[..., None, None]
    support = -_STILL_SHARE * velocity.norm(dim=-1) / 5.0 * score[:, 0, :, None]
    for t in range(1, points.shape[1]):
        same = (now[:, :, None] == label[:, t, None]) * score[:, t, None]  # (B, I, I)
        gone = start[:, :, None] + velocity * frames.time[:, t, None, None, None]  # (B, I, V, 2)
        near = _nearness(gone, points[:, t], spread[:, t])  # (B, I, V, I)
        support = support + (near * same[:, :, None]).amax(-1)
    best = support.argmax(-1)[..., None, None].expand(-1, -1, 1, 2)
    chosen = velocity.gather(2, best)  # (B, I, 1, 2)
    center, fitted = _line(frames, points, spread, score, label, chosen[:, :, 0])
    fitted = fitted * moves[..., None]
    codes = frames.codes[:, 0]
    heading = face_forward(codes[..., 6:8].flip(-1), fitted).flip(-1)
    linked = torch.cat([center, codes[..., 2:6], heading, fitted], dim=-1)
    return Anchors(linked, frames.logits[:, 0])


def _candidates(points: Tensor, label: Tensor, time: Tensor, count: int) -> Tensor:
    """Velocities (B, I, V, 2); those that mean nothing are 0, which is one of them."""
    order = (time.abs() + 1e6 * (time.abs() < _SAME_MOMENT_S)).argsort(dim=1)[:, :count]  # (B, count)
    parts = [torch.zeros_like(points[:, 0])[:, :, None]]
    for place in range(order.shape[1]):
        frame = order[:, place]
        row = torch.arange(len(frame), device=frame.device)
        there, gap = points[row, frame], time[row, frame]  # (B, I, 2), (B,)
        other = gap.abs() >= _SAME_MOMENT_S
        moved = (there[:, None] - points[:, 0, :, None]) / torch.where(other, gap, 1.0)[:, None, None, None]
        fits = (label[row, frame][:, None] == label[:, 0, :, None]) & (moved.norm(dim=-1) < _FASTEST_M_S)
        fits = fits & other[:, None, None]
        parts.append(torch.where(fits[..., None], moved, 0.0))
    return torch.cat(parts, dim=2)


def _nearness(a: Tensor, points: Tensor, spread: Tensor) -> Tensor:
    """How well places a (B, I, V, 2) agree with proposals (B, I, 2) of a spread (B, I), in 0..1:
    (B, I, V, I)."""
    distance = torch.unflatten(torch.cdist(a.flatten(1, 2), points, compute_mode=_EXACT), 1, a.shape[1:3])
    return torch.exp(-0.5 * (distance / spread[:, None, None]).square())


def _line(
    frames: FrameProposals, points: Tensor, spread: Tensor, score: Tensor, label: Tensor, velocity: Tensor
) -> tuple[Tensor, Tensor]:
    """Weighted least squares of place and velocity (B, I, 2) over the proposals nearest to the chosen motion;
    the velocity is held back by how unusual it would be, and only what stands is moved."""
    gone = points[:, 0, None] + velocity[:, None] * frames.time[:, :, None, None]  # (B, T, I, 2)
    distance = torch.cdist(gone, points, compute_mode=_EXACT)  # (B, T, I, I)
    near = torch.exp(-0.5 * (distance / spread[:, :, None]).square()) * score[:, :, None]
    near = near * (label[:, 0, None, :, None] == label[:, :, None])
    near[:, 0] = torch.diag_embed(score[:, 0])  # in its own frame a proposal is itself
    weight, index = near.max(dim=-1)  # (B, T, I)
    there = points.gather(2, index[..., None].expand(-1, -1, -1, 2))
    weight = weight / spread.gather(2, index).square()
    t = frames.time[..., None].expand_as(weight)
    total, first, second = weight.sum(1), (weight * t).sum(1), (weight * t * t).sum(1)  # (B, I)
    place = (weight[..., None] * there).sum(1)
    moment = ((weight * t)[..., None] * there).sum(1)
    prior = torch.where(velocity.norm(dim=-1) > 0, 1.0 / _SPEED_SPREAD_M_S**2, 1.0 / _CREEP_M_S**2)
    held = second + prior
    determinant = (total * held - first.square()).clamp(min=1e-6)[..., None]
    center = (held[..., None] * place - first[..., None] * moment) / determinant
    fitted = (total[..., None] * moment - first[..., None] * place) / determinant
    stands = (velocity.norm(dim=-1) == 0)[..., None]
    return torch.where(stands, center, points[:, 0]), fitted  # those that move may turn: no straight line
