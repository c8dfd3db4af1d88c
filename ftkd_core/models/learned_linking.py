# SPDX-License-Identifier: Apache-2.0
"""Learned linking of proposals across frames: velocities of new boxes from weights (ours).

Each proposal of the current frame has candidate velocities: standing still, and those that lead to a proposal
of its class in one of the two frames nearest in time. A network scores them from the features of both
proposals, class, time, and how well each frame of the window agrees. A second network reads the proposals
along the best candidate, one per frame, and returns the final velocity and an embedding for the query. Both
are trained on true velocities (losses/linking.py). models/linking.py is the same idea without learning; the
observations and their standard deviations are taken from it, but its prior knowledge of motion is not used.

Symbols: B batch, I proposals of the current frame, T other frames of J proposals each, V candidate
velocities, K classes, C channels, S hidden width. Geometry is in the view frame of the proposal
(models/anchors.py), so that the networks see the same numbers in every direction.
"""

from typing import Final, NamedTuple

import torch
from torch import Tensor, nn

from ftkd_core.geometry import full_precision, line_of_sight, rotate_2d, rotate_2d_back
from ftkd_core.models.anchors import Anchors, face_forward
from ftkd_core.models.linking import (
    SAME_TIME_S,
    FrameProposals,
    Observations,
    candidate_velocities,
    fit_line,
    nearest_observations,
    observe,
    support,
)
from ftkd_core.models.predictions import IMPOSSIBLE, LinkedProposals

_CANDIDATES: Final = 40
"""Candidates that are scored: standing still and the best supported."""
_NEAR_FRAMES: Final = 2
"""Frames that candidates lead to."""
_STRICT: Final = 0.4
"""Share of the standard deviations at which the agreement of frames is also measured."""
_SPEED_UNIT_M_S: Final = 5.0
_DISTANCE_UNIT_M: Final = 30.0
_CORRECTION_M_S: Final = 3.0
_LARGEST_GAIN: Final = 1.2
_NO_TRACK: Final = 0.3
_HIDDEN: Final = 48
_TRACK: Final = 64
_MOTION_FEATURES: Final = 8  # of a candidate; the agreement of the frames is added
_SOURCE_FEATURES: Final = 6
_STEP_FEATURES: Final = 12


class _Candidates(NamedTuple):
    """velocity (B, I, V, 2); features (B, I, V, F); source (B, I, V), the place of the other proposal in the
    sources of `_sources`; possible (B, I, V) bool."""

    velocity: Tensor
    features: Tensor
    source: Tensor
    possible: Tensor


class LearnedLinking(nn.Module):
    """Compute `linked = linking(current, others, features, other_features, mobile)`.

    features (B, I, C1) of the current proposals, other_features (B, T, J, C2); mobile (K,), 0 for classes
    that never move. The weights belong to a number of other frames, which always have the same order.
    """

    def __init__(self, frames: int, num_classes: int, channels: int, other_channels: int, width: int) -> None:
        super().__init__()
        self.frames = frames
        self.from_features = nn.Linear(channels, _HIDDEN)
        self.from_box = nn.Linear(num_classes + 8 + frames, _HIDDEN)
        self.from_source = nn.Linear(other_channels, _HIDDEN, bias=False)
        self.from_source_box = nn.Linear(_SOURCE_FEATURES, _HIDDEN, bias=False)
        self.from_motion = nn.Linear(2 * frames + _MOTION_FEATURES, _HIDDEN)
        self.score = nn.Sequential(nn.ReLU(), nn.Linear(_HIDDEN, _HIDDEN), nn.ReLU(), nn.Linear(_HIDDEN, 1))
        self.step = _network(other_channels + num_classes + _STEP_FEATURES, _TRACK, _TRACK)
        self.correct = _network(_TRACK + _HIDDEN + 8, 96, 4)
        self.content = nn.Linear(_TRACK + 2, width)
        nn.init.zeros_(self.content.weight)
        nn.init.zeros_(self.content.bias)

    @full_precision
    def forward(
        self, current: FrameProposals, others: FrameProposals, features: Tensor, other_features: Tensor,
        mobile: Tensor,
    ) -> LinkedProposals:  # fmt: skip
        features, other_features = features.float(), other_features.float()
        codes = current.codes[:, 0]
        axis = line_of_sight(codes[..., :3])
        own = Observations(*(value[:, 0] for value in observe(current)))
        observed, real = observe(others), (others.time.abs() > SAME_TIME_S).float()
        observed = observed._replace(score=observed.score * real[..., None])
        moves = mobile[own.label][..., None]
        with torch.no_grad():
            found = _find_candidates(own, observed, others.time, real, codes, moves)
            box, source = _box_features(current, own, axis, real), _source_features(others)
        query = self.from_features(features) + self.from_box(box)
        scores = self._score(query, found, source, others, other_features)
        best = scores.argmax(-1)[..., None, None].expand(-1, -1, 1, 2)
        selected = found.velocity.gather(2, best)[:, :, 0]
        with torch.no_grad():
            steps, weight, index = _along_track(own, observed, others, selected, axis)
            center, fitted = fit_line(own, observed, others.time, selected)
        seen = _take_observed(other_features, index)
        track = self.step(torch.cat([seen, steps], dim=-1)) * weight[..., None]
        track = track.sum(1) / (weight.sum(1)[..., None] + _NO_TRACK)
        velocity = self._correct(track, query, scores, found, selected, fitted, weight, axis)
        velocity = velocity * moves
        content: Tensor = self.content(
            torch.cat([track, rotate_2d_back(velocity, axis) / _SPEED_UNIT_M_S], dim=-1)
        )
        still = velocity.detach()
        heading = face_forward(codes[..., 6:8].flip(-1), still).flip(-1)
        linked = torch.cat([center, codes[..., 2:6], heading, still], dim=-1)
        anchors = Anchors(linked, current.logits[:, 0])
        return LinkedProposals(anchors, content, velocity, scores, found.velocity)

    def _score(
        self, query: Tensor, found: _Candidates, source: Tensor, others: FrameProposals, features: Tensor
    ) -> Tensor:
        """Return the logits (B, I, V) of candidates, from queries (B, I, S)."""
        near = _nearest_frames(others.time)
        seen = self.from_source(_take_frames(features, near)) + self.from_source_box(source)
        seen = seen.flatten(1, 2)
        seen = torch.cat([torch.zeros_like(seen[:, :1]), seen], dim=1)  # standing still has no source
        index = found.source.flatten(1)[..., None].expand(-1, -1, seen.shape[-1])
        seen = torch.unflatten(seen.gather(1, index), 1, found.source.shape[1:])
        hidden = query[:, :, None] + seen + self.from_motion(found.features)
        scores: Tensor = self.score(hidden)[..., 0]
        return torch.where(found.possible, scores, IMPOSSIBLE)

    def _correct(
        self, track: Tensor, query: Tensor, scores: Tensor, found: _Candidates, selected: Tensor,
        fitted: Tensor, weight: Tensor, axis: Tensor,
    ) -> Tensor:  # fmt: skip
        """Return velocities (B, I, 2) from the line fit, a gain per direction and a correction."""
        share = scores.softmax(-1)
        mean = (share[..., None] * found.velocity).sum(2)
        in_view = [rotate_2d_back(each, axis) / _SPEED_UNIT_M_S for each in (selected, mean, fitted)]
        certainty = torch.stack([share.amax(-1), weight.sum(1)], dim=-1)
        change = self.correct(torch.cat([track, query, *in_view, certainty], dim=-1))
        gain = _LARGEST_GAIN * change[..., :2].sigmoid()
        velocity = rotate_2d_back(fitted, axis) * gain + _CORRECTION_M_S * change[..., 2:]
        return rotate_2d(velocity, axis)


def _network(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, outputs)
    )


def _nearest_frames(time: Tensor) -> Tensor:
    """Return the indices (B, 2) of the frames nearest in time (B, T), those that repeat the current last."""
    return (time.abs() + 1e6 * (time.abs() < SAME_TIME_S)).argsort(dim=1)[:, :_NEAR_FRAMES]


def _take_frames(values: Tensor, frames: Tensor) -> Tensor:
    """Return values (B, T, J, ...) of the frames with index (B, F), as (B, F, J, ...)."""
    index = frames.view(*frames.shape, *[1] * (values.ndim - 2))
    return values.gather(1, index.expand(-1, -1, *values.shape[2:]))


def _find_candidates(
    own: Observations, observed: Observations, time: Tensor, real: Tensor, codes: Tensor, moves: Tensor
) -> _Candidates:
    """Return the best supported candidates with their features."""
    velocity = candidate_velocities(own, observed, time, _NEAR_FRAMES) * moves[..., None]
    agreement = _agreement(own, observed, time, real, velocity, 1.0)
    moving = velocity.norm(dim=-1) > 0
    rank = torch.where(moving, agreement.sum(-1), -1.0)
    rank = torch.cat([torch.full_like(rank[..., :1], torch.inf), rank[..., 1:]], dim=-1)
    source = rank.topk(min(_CANDIDATES, rank.shape[-1]), dim=-1).indices
    velocity = _take(velocity, source)
    strict = _agreement(own, observed, time, real, velocity, _STRICT)
    motion = _motion_features(velocity, codes)
    possible = (velocity.norm(dim=-1) > 0) | (source == 0)
    features = torch.cat([_take(agreement, source), strict, motion], dim=-1)
    return _Candidates(velocity, features, source, possible)


def _take(values: Tensor, index: Tensor) -> Tensor:
    """Return values (B, I, V, F) of the candidates with index (B, I, W), as (B, I, W, F)."""
    return values.gather(2, index[..., None].expand(-1, -1, -1, values.shape[-1]))


def _agreement(
    own: Observations, observed: Observations, time: Tensor, real: Tensor, velocity: Tensor, strictness: float
) -> Tensor:
    """Return the support (B, I, V, T) of each frame for each candidate; 0 of frames that repeat the current
    one."""
    frames = []
    for t in range(time.shape[1]):
        frame = Observations(*(value[:, t] for value in observed))
        frame = frame._replace(spread=frame.spread * strictness)
        expected = own.points[:, :, None] + velocity * time[:, t, None, None, None]
        frames.append(support(own.label, expected, frame) * real[:, t, None, None])
    return torch.stack(frames, dim=-1)


def _motion_features(velocity: Tensor, codes: Tensor) -> Tensor:
    """Return features (B, I, V, 8) of candidate velocities (B, I, V, 2) of boxes (B, I, 10)."""
    axis = line_of_sight(codes[..., :3])[:, :, None].expand_as(velocity)
    heading = codes[..., 6:8].flip(-1)
    heading = (heading / heading.norm(dim=-1, keepdim=True).clamp(min=1e-3))[:, :, None]
    along = (velocity * heading).sum(-1) / _SPEED_UNIT_M_S
    across = (velocity[..., 0] * heading[..., 1] - velocity[..., 1] * heading[..., 0]) / _SPEED_UNIT_M_S
    speed = velocity.norm(dim=-1) / _SPEED_UNIT_M_S
    numbers = [along, across.abs(), speed, (speed > 0).float(), along.abs(), torch.log1p(speed)]
    return torch.cat([rotate_2d_back(velocity, axis) / _SPEED_UNIT_M_S, torch.stack(numbers, dim=-1)], dim=-1)


def _box_features(current: FrameProposals, own: Observations, axis: Tensor, real: Tensor) -> Tensor:
    """Return features (B, I, K + 8 + T) of the current proposals."""
    codes, distance = current.codes[:, 0], own.points.norm(dim=-1, keepdim=True)
    heading = codes[..., 6:8].flip(-1)
    heading = heading / heading.norm(dim=-1, keepdim=True).clamp(min=1e-3)
    frames = real[:, None].expand(-1, codes.shape[1], -1)
    return torch.cat(
        [
            current.logits[:, 0].sigmoid(), rotate_2d_back(heading, axis), codes[..., 3:6],
            distance / _DISTANCE_UNIT_M, torch.log1p(distance), own.score[..., None], frames,
        ],
        dim=-1,
    )  # fmt: skip


def _source_features(others: FrameProposals) -> Tensor:
    """Return features (B, F, J, 6) of the proposals of the frames that candidates lead to."""
    near = _nearest_frames(others.time)
    codes = _take_frames(others.codes, near)
    score = _take_frames(others.logits, near).amax(-1, keepdim=True).sigmoid()
    time = others.time.gather(1, near)[:, :, None, None].expand_as(score)
    distance = codes[..., :2].norm(dim=-1, keepdim=True) / _DISTANCE_UNIT_M
    return torch.cat([codes[..., 3:6], score, time, distance], dim=-1)


def _along_track(
    own: Observations, observed: Observations, others: FrameProposals, velocity: Tensor, axis: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return features (B, T, I, K + 12) of the proposals nearest to a motion (B, I, 2), their weights and
    their indices (B, T, I)."""
    weight, index = nearest_observations(own, observed, others.time, velocity)
    axis = axis[:, None].expand(-1, weight.shape[1], -1, -1)
    expected = own.points[:, None] + velocity[:, None] * others.time[:, :, None, None]
    time = others.time[:, :, None, None].expand(*weight.shape, 1)
    gap = torch.where(time.abs() < SAME_TIME_S, 1.0, time)
    spread = observed.spread.gather(2, index)[..., None]
    off = rotate_2d_back(_take_observed(observed.points, index) - expected, axis)
    turned = rotate_2d_back(_take_observed(others.codes[..., 6:8], index).flip(-1), axis)
    speed = rotate_2d_back(velocity, axis[:, 0])[:, None].expand_as(off) / _SPEED_UNIT_M_S
    numbers = [
        _take_observed(others.logits, index).sigmoid(), off / spread,
        (off / gap).clamp(-20.0, 20.0) / _SPEED_UNIT_M_S, time, weight[..., None], spread / 3.0, turned,
        speed, time.abs(),
    ]  # fmt: skip
    return torch.cat(numbers, dim=-1), weight, index


def _take_observed(values: Tensor, index: Tensor) -> Tensor:
    """Return values (B, T, J, F) of the proposals with index (B, T, I), as (B, T, I, F)."""
    return values.gather(2, index[..., None].expand(-1, -1, -1, values.shape[-1]))
