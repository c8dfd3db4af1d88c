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

VELOCITY_UNIT: Final = 3.0
"""Velocities are answered and embedded in units of this many m/s."""
LEAST_AGE_S: Final = 0.02
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


def join(*parts: Anchors) -> Anchors:
    """Anchors one after the other along Q."""
    return Anchors(*(torch.cat(values, dim=1) for values in zip(*parts, strict=True)))


def view_axis(points_ego: Tensor) -> Tensor:
    """Unit vectors (..., 2) in the ground plane from the vehicle to points (..., 3); x for the origin
    itself."""
    towards = points_ego[..., :2]
    distance = towards.norm(dim=-1, keepdim=True)
    forward = torch.eye(2, device=towards.device)[0]  # made on the device: a list would be copied there
    return torch.where(distance > 1e-3, towards / distance.clamp(min=1e-3), forward)


def turn(vectors: Tensor, axis: Tensor) -> Tensor:
    """Vectors (..., 2) turned by the angle of the unit vectors `axis` (..., 2)."""
    (x, y), (cos, sin) = vectors.unbind(-1), axis.unbind(-1)
    return torch.stack([x * cos - y * sin, x * sin + y * cos], dim=-1)


def turn_back(vectors: Tensor, axis: Tensor) -> Tensor:
    """The inverse of `turn`."""
    return turn(vectors, torch.stack([axis[..., 0], -axis[..., 1]], dim=-1))


def anchor_features(anchors: Anchors) -> Tensor:
    """What a query is told of its anchor, (B, Q, 7 + K): log sizes, heading and velocity in the view frame,
    class scores."""
    codes = anchors.codes
    axis = view_axis(codes[..., :3])
    heading = turn_back(codes[..., 6:8].flip(-1), axis)
    velocity = turn_back(codes[..., 8:10], axis) / VELOCITY_UNIT
    return torch.cat([codes[..., 3:6], heading, velocity, anchors.logits.sigmoid()], dim=-1)


def change_anchors(codes: Tensor, change: Tensor, gain: Tensor, age: Tensor) -> Tensor:
    """Codes (B, Q, 10) after the decoder's answer `change` (B, Q, 10).

    The answer is laid out as the code, in the view frame: the centre's move in units that grow with distance
    (1 m near, 3 m at 40 m, as errors of depth do), log sizes, (sin, cos) of the heading, velocity. A
    remembered box that had to be moved was not as fast as thought: its velocity also takes up the share
    `gain` (B, Q, 2), along and across the line of sight, of that move over its age (B, Q) in seconds, as an
    alpha-beta filter does; a query of age 0 has none.
    """
    axis = view_axis(codes[..., :3])
    reach = 1 + 0.05 * codes[..., :2].norm(dim=-1, keepdim=True)
    move = change[..., :2] * reach
    center = codes[..., :2] + turn(move, axis)
    heading = codes[..., 6:8].flip(-1) + turn(change[..., 6:8].flip(-1), axis)
    remembered = (age > LEAST_AGE_S)[..., None]
    missed = torch.where(remembered, move.detach() / age.clamp(min=LEAST_AGE_S)[..., None], 0.0)
    velocity = codes[..., 8:10] + turn(change[..., 8:10] * VELOCITY_UNIT + gain * missed, axis)
    middle = codes[..., 2:6] + change[..., 2:6]
    return torch.cat([center, middle, heading.flip(-1), velocity], dim=-1)


def face_forward(heading: Tensor, velocity: Tensor) -> Tensor:
    """Headings (..., 2) (cosine, sine), reversed where the object drives backwards faster than a walk: what
    moves moves forwards, and front and rear are easily mistaken for each other."""
    along = (heading * velocity).sum(-1, keepdim=True)
    return torch.where(along < -_DRIVING_M_S, -heading, heading)
