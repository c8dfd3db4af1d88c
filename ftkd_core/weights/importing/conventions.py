# SPDX-License-Identifier: Apache-2.0
"""Differences between the public models' boxes and frame and ours.

Differences of boxes are linear and are folded into the weights once; the frame becomes part of the
configuration.

Public box codes, read from the public code: [x, y, z, log a, log b, log h, sin, cos, vx, vy] in the frame of
nuScenes' LIDAR_TOP, metres and m/s.

- mmdet3d 1.0 and later (StreamPETR; SparseBEV unless the file names another version): a is the length along
  the heading, b the width, and the angle is the heading from the x axis, anticlockwise; ours except for the
  order.
- mmdet3d 0.17 (SparseBEV files with version "v0.17.1"): a is the width, b the length, and the heading is
  -angle - pi/2.

SparseBEV's head reorders its outputs to [x, y, a, b, z, ...] after its last layer; its weights are in the
order above.
"""

from typing import Final

from torch import Tensor

from ftkd_core.classes import CLASS_NAMES
from ftkd_core.config import Matrix
from ftkd_core.geometry import invert_rigid, make_transform

PUBLIC_CLASSES: Final = CLASS_NAMES
"""Class order of both public configurations."""

NEW_BOXES: Final = "v1.0.0"
OLD_BOXES: Final = "v0.17.1"

_EGO_FROM_LIDAR: Final = make_transform(
    (0.7077955119163518, -0.006492242056004365, 0.010646214713995808, -0.7063073142877817),
    (0.943713, 0.0, 1.84023),
)
"""Mount of LIDAR_TOP on nuScenes' Singapore vehicle: x to the right, y forward, z up, 1.4 degrees of tilt.
That of the Boston vehicle differs by 4 cm and about 1 degree; the models were trained with both."""

_OURS_FROM_NEW: Final = ((0, 1, 2, 4, 3, 5, 6, 7, 8, 9), (1, 1, 1, 1, 1, 1, 1, 1, 1, 1))
_OURS_FROM_OLD: Final = ((0, 1, 2, 3, 4, 5, 7, 6, 8, 9), (1, 1, 1, 1, 1, 1, -1, -1, 1, 1))
_CODES: Final = {NEW_BOXES: _OURS_FROM_NEW, OLD_BOXES: _OURS_FROM_OLD}


def model_from_ego() -> Matrix:
    """Return the public models' frame in the form of the configuration."""
    return tuple(tuple(float(value) for value in row) for row in invert_rigid(_EGO_FROM_LIDAR))


def our_codes(codes: Tensor, boxes: str) -> Tensor:
    """Convert public codes (..., 10) of a box convention, NEW_BOXES or OLD_BOXES, to our order and angles."""
    order, signs = _CODES[boxes]
    return codes[..., list(order)] * codes.new_tensor(signs)


def our_regressor(parameter: Tensor, boxes: str) -> Tensor:
    """Convert weight (10, C) or bias (10,) of a layer that predicts public codes, so that it predicts
    ours."""
    return our_codes(parameter.movedim(0, -1), boxes).movedim(-1, 0)


def our_offsets(parameter: Tensor, boxes: str) -> Tensor:
    """Convert weight (3 P, C) or bias (3 P,) of SparseBEV's sampling offsets to the axes length, width,
    height of our boxes.

    Offsets of the old convention are along width, length and height of a box that rotates clockwise.
    """
    if boxes == NEW_BOXES:
        return parameter
    width, length, height = parameter.view(-1, 3, *parameter.shape[1:]).unbind(1)
    along = (-length, width, height)
    result = parameter.new_empty(len(width), 3, *parameter.shape[1:])
    for axis, values in enumerate(along):
        result[:, axis] = values
    return result.flatten(0, 1)
