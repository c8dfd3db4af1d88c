# SPDX-License-Identifier: Apache-2.0
"""3-D boxes: their two representations, conversion, and transformation between frames.

Boxes, (..., 9): `[x, y, z, length, width, height, yaw, vx, vy]`; centre in metres (z is the middle of the
box), length along the heading, yaw in radians about z (0 = along x), velocity over ground in m/s along the
axes of the frame of the box. Codes, (..., 10), which networks predict: `[cx, cy, cz, log w, log l, log h, sin
yaw, cos yaw, vx, vy]`.
"""

from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ftkd_core.geometry import yaw_of

BOX_DIM: Final = 9
CODE_DIM: Final = 10
BOX_EDGES: Final = (
    *((0, 1), (1, 2), (2, 3), (3, 0)),
    *((4, 5), (5, 6), (6, 7), (7, 4)),
    *((0, 4), (1, 5), (2, 6), (3, 7)),
)
"""Pairs of corners, numbered as in `box_corners`, that are connected: front face, rear face, between the
faces."""
# Networks can predict any logarithm; sizes outside 1 cm .. 150 m are never right and would overflow float16.
_LOG_SIZE_RANGE: Final = (-4.6, 5.0)


def encode_boxes(boxes: Tensor) -> Tensor:
    """Return codes (..., 10) of boxes (..., 9) with positive sizes. Source: StreamPETR's box code, centres in
    metres."""
    x, y, z, length, width, height, yaw, vx, vy = boxes.unbind(-1)
    return torch.stack(
        [x, y, z, width.log(), length.log(), height.log(), yaw.sin(), yaw.cos(), vx, vy], dim=-1
    )


def decode_boxes(codes: Tensor) -> Tensor:
    """Return boxes (..., 9) of codes (..., 10); the inverse of `encode_boxes`."""
    x, y, z, log_w, log_l, log_h, sin, cos, vx, vy = codes.unbind(-1)
    width, length, height = (v.clamp(*_LOG_SIZE_RANGE).exp() for v in (log_w, log_l, log_h))
    return torch.stack([x, y, z, length, width, height, torch.atan2(sin, cos), vx, vy], dim=-1)


def transform_boxes(dst_from_src: Tensor, boxes_src: Tensor) -> Tensor:
    """Return boxes (..., M, 9) of frame src in frame dst; `dst_from_src` (..., 4, 4) rotates mainly about z.

    The yaw of the transform is added to headings, so boxes stay upright as in nuScenes.
    """
    rotation = dst_from_src[..., :3, :3]
    centers = boxes_src[..., :3] @ rotation.mT + dst_from_src[..., None, :3, 3]
    yaw = boxes_src[..., 6:7] + yaw_of(dst_from_src)[..., None, None]
    velocity = torch.cat([boxes_src[..., 7:9], torch.zeros_like(yaw)], dim=-1) @ rotation.mT
    return torch.cat([centers, boxes_src[..., 3:6], wrap_angle(yaw), velocity[..., :2]], dim=-1)


def transform_codes(dst_from_src: Tensor, codes_src: Tensor) -> Tensor:
    """Return codes (..., 10) of frame src in frame dst, in the precision of the codes; dst_from_src (4, 4).

    Headings and velocities are rotated as vectors in the ground plane, as by the nuScenes devkit; for
    rotations about z the result equals that of `transform_boxes`.
    """
    matrix = dst_from_src.to(codes_src)
    centers = codes_src[..., :3] @ matrix[:3, :3].mT + matrix[:3, 3]
    heading = codes_src[..., 6:8].flip(-1) @ matrix[:2, :2].mT  # (cos, sin)
    velocity = codes_src[..., 8:10] @ matrix[:2, :2].mT
    return torch.cat([centers, codes_src[..., 3:6], heading.flip(-1), velocity], dim=-1)


def wrap_angle(angle: Tensor) -> Tensor:
    """Return the angle in [-pi, pi)."""
    return torch.remainder(angle + torch.pi, 2 * torch.pi) - torch.pi


def box_corners(boxes: NDArray[Any]) -> NDArray[np.float64]:
    """Return corners (M, 8, 3) of boxes (M, 9): the front face (right-top, left-top, left-bottom,
    right-bottom seen along the heading), then the rear face in the same order."""
    boxes = np.asarray(boxes, dtype=np.float64).reshape(-1, BOX_DIM)
    signs = np.array(
        [[1, -1, 1], [1, 1, 1], [1, 1, -1], [1, -1, -1], [-1, -1, 1], [-1, 1, 1], [-1, 1, -1], [-1, -1, -1]]
    )
    local = signs[None] * boxes[:, None, 3:6] / 2
    cos, sin = np.cos(boxes[:, 6])[:, None], np.sin(boxes[:, 6])[:, None]
    x = cos * local[..., 0] - sin * local[..., 1]
    y = sin * local[..., 0] + cos * local[..., 1]
    corners: NDArray[np.float64] = np.stack([x, y, local[..., 2]], axis=-1) + boxes[:, None, :3]
    return corners
