# SPDX-License-Identifier: Apache-2.0
"""Anchored queries: boxes with class scores that decoder layers refine.

Ours, after Sparse4D (Lin et al. 2022) and SparseBEV. Box changes are predicted in the *view frame* of the
query: the ego frame rotated so that x points from the vehicle to the query. The appearance of an object
depends on its heading relative to the line of sight, so in this frame equal appearance means equal output in
every direction. Symbols: B batch, Q queries, K classes.
"""

from typing import Final, NamedTuple

import torch
from torch import Tensor

from ftkd_core.boxes import CODE_DIM
from ftkd_core.geometry import line_of_sight, rotate_2d, rotate_2d_back

VELOCITY_UNIT: Final = 3.0
"""Velocities are predicted and embedded in units of this many m/s."""
MIN_AGE_S: Final = 0.02
"""A query younger than this is new, not from memory."""
_FORWARD_MOTION_M_S: Final = 1.0


class Anchors(NamedTuple):
    """Boxes with class evidence.

    codes (B, Q, 10) in ego, see `boxes.encode_boxes`; logits (B, Q, K), added to the classifier's. A point
    without further information has zeros: a 1 m box without heading or velocity.
    """

    codes: Tensor
    logits: Tensor


def points_as_anchors(points_ego: Tensor, num_classes: int) -> Anchors:
    """Return anchors at points (B, Q, 3), all other attributes zero."""
    codes = torch.cat([points_ego, points_ego.new_zeros(*points_ego.shape[:2], CODE_DIM - 3)], dim=-1)
    return Anchors(codes, points_ego.new_zeros(*points_ego.shape[:2], num_classes))


def concatenate(*parts: Anchors) -> Anchors:
    """Concatenate anchors along Q."""
    return Anchors(*(torch.cat(values, dim=1) for values in zip(*parts, strict=True)))


def anchor_features(anchors: Anchors) -> Tensor:
    """Return features (B, Q, 7 + K) of anchors: log sizes, heading and velocity in the view frame, class
    scores."""
    codes = anchors.codes
    axis = line_of_sight(codes[..., :3])
    heading = rotate_2d_back(codes[..., 6:8].flip(-1), axis)
    velocity = rotate_2d_back(codes[..., 8:10], axis) / VELOCITY_UNIT
    return torch.cat([codes[..., 3:6], heading, velocity, anchors.logits.sigmoid()], dim=-1)


def refine_anchors(codes: Tensor, change: Tensor, gain: Tensor, age: Tensor) -> Tensor:
    """Return codes (B, Q, 10) after the decoder's prediction `change` (B, Q, 10).

    change is laid out as the code, in the view frame: offset of the centre in units that grow with distance
    (1 m near, 3 m at 40 m, as depth errors do), change of the log sizes, of (sin, cos) of the heading, and of
    the velocity. As in an alpha-beta filter, the offset of a box from memory also corrects its velocity:
    `gain` (B, Q, 2), along and across the line of sight, is the fraction of offset / age that is added. age
    (B, Q) is in seconds, 0 for new queries.
    """
    axis = line_of_sight(codes[..., :3])
    reach = 1 + 0.05 * codes[..., :2].norm(dim=-1, keepdim=True)
    move = change[..., :2] * reach
    center = codes[..., :2] + rotate_2d(move, axis)
    heading = codes[..., 6:8].flip(-1) + rotate_2d(change[..., 6:8].flip(-1), axis)
    from_memory = (age > MIN_AGE_S)[..., None]
    velocity_error = torch.where(from_memory, move.detach() / age.clamp(min=MIN_AGE_S)[..., None], 0.0)
    velocity = codes[..., 8:10] + rotate_2d(change[..., 8:10] * VELOCITY_UNIT + gain * velocity_error, axis)
    middle = codes[..., 2:6] + change[..., 2:6]
    return torch.cat([center, middle, heading.flip(-1), velocity], dim=-1)


def face_forward(heading: Tensor, velocity: Tensor) -> Tensor:
    """Return headings (..., 2) (cosine, sine), reversed if the object would move backwards at more than
    walking speed.

    Objects usually move forwards, and front and rear are easily confused.
    """
    along = (heading * velocity).sum(-1, keepdim=True)
    return torch.where(along < -_FORWARD_MOTION_M_S, -heading, heading)
