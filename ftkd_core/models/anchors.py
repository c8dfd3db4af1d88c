# SPDX-License-Identifier: Apache-2.0
"""Queries that are boxes: what a query believes before it looks, and how the decoder's answer changes it.

Ours, after Sparse4D (Lin et al. 2022) and SparseBEV, whose queries are boxes too; used where
`DecoderConfig.anchored` is set. StreamPETR's queries are points. Everything is answered in the *view frame*
of the query, the ego frame turned so that x points from the vehicle to the query: what a camera sees of an
object depends on its heading relative to the line of sight, so a network that answers in this frame learns
the same thing in every direction. Symbols: B batch, Q queries, K classes.
"""

from typing import Final, NamedTuple

import torch
from torch import Tensor

from ftkd_core.boxes import CODE_DIM
from ftkd_core.geometry import line_of_sight, rotate_2d, rotate_2d_back

VELOCITY_UNIT: Final = 3.0
"""Velocities are answered and embedded in units of this many m/s."""
MIN_AGE_S: Final = 0.02
"""A query that is younger was not remembered."""
_DRIVING_M_S: Final = 1.0


class Anchors(NamedTuple):
    """codes (B, Q, 10) in ego, as `boxes.encode_boxes`; logits (B, Q, K) that the classifier's are added to.
    Zeros (a box of one metre, no heading, no speed) where nothing is known."""

    codes: Tensor
    logits: Tensor


def points_as_anchors(points_ego: Tensor, num_classes: int) -> Anchors:
    """Anchors of which nothing but the centre (B, Q, 3) is known."""
    codes = torch.cat([points_ego, points_ego.new_zeros(*points_ego.shape[:2], CODE_DIM - 3)], dim=-1)
    return Anchors(codes, points_ego.new_zeros(*points_ego.shape[:2], num_classes))


def concatenate(*parts: Anchors) -> Anchors:
    """Anchors one after the other along Q."""
    return Anchors(*(torch.cat(values, dim=1) for values in zip(*parts, strict=True)))


def anchor_features(anchors: Anchors) -> Tensor:
    """What a query is told of its anchor, (B, Q, 7 + K): log sizes, heading and velocity in the view frame,
    class scores."""
    codes = anchors.codes
    axis = line_of_sight(codes[..., :3])
    heading = rotate_2d_back(codes[..., 6:8].flip(-1), axis)
    velocity = rotate_2d_back(codes[..., 8:10], axis) / VELOCITY_UNIT
    return torch.cat([codes[..., 3:6], heading, velocity, anchors.logits.sigmoid()], dim=-1)


def refine_anchors(codes: Tensor, change: Tensor, gain: Tensor, age: Tensor) -> Tensor:
    """Codes (B, Q, 10) after the decoder's answer `change` (B, Q, 10).

    The answer is laid out as the code, in the view frame: the centre's move in units that grow with distance
    (1 m near, 3 m at 40 m, as errors of depth do), log sizes, (sin, cos) of the heading, velocity. A
    remembered box that had to be moved was not as fast as thought: its velocity also takes up the share
    `gain` (B, Q, 2), along and across the line of sight, of that move over its age (B, Q) in seconds, as an
    alpha-beta filter does; a query of age 0 has none.
    """
    axis = line_of_sight(codes[..., :3])
    reach = 1 + 0.05 * codes[..., :2].norm(dim=-1, keepdim=True)
    move = change[..., :2] * reach
    center = codes[..., :2] + rotate_2d(move, axis)
    heading = codes[..., 6:8].flip(-1) + rotate_2d(change[..., 6:8].flip(-1), axis)
    remembered = (age > MIN_AGE_S)[..., None]
    missed = torch.where(remembered, move.detach() / age.clamp(min=MIN_AGE_S)[..., None], 0.0)
    velocity = codes[..., 8:10] + rotate_2d(change[..., 8:10] * VELOCITY_UNIT + gain * missed, axis)
    middle = codes[..., 2:6] + change[..., 2:6]
    return torch.cat([center, middle, heading.flip(-1), velocity], dim=-1)


def face_forward(heading: Tensor, velocity: Tensor) -> Tensor:
    """Headings (..., 2) (cosine, sine), reversed where the object drives backwards faster than a walk: what
    moves moves forwards, and front and rear are easily mistaken for each other."""
    along = (heading * velocity).sum(-1, keepdim=True)
    return torch.where(along < -_DRIVING_M_S, -heading, heading)
