# SPDX-License-Identifier: Apache-2.0
"""3D boxes: the house form, the regression code of StreamPETR, and moves between frames.

House form, (..., 9): `[x, y, z, length, width, height, yaw, vx, vy]`; centre in metres (z is the middle of
the box), length along the heading, yaw in radians about z (0 = along x), velocity over ground in m/s along
the axes of the frame the box is expressed in. Code form, (..., 10): `[cx, cy, cz, log w, log l, log h, sin
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
"""Pairs of corners, numbered as in `box_corners`, that an edge joins: front face, rear face, between."""
# Networks can answer any logarithm; sizes outside 1 cm .. 150 m are never right and would overflow float16.
_LOG_SIZE_RANGE: Final = (-4.6, 5.0)


def encode_boxes(boxes: Tensor) -> Tensor:
    """Code form (..., 10) of boxes (..., 9). Sizes must be positive. Source: StreamPETR's 10-d code,
    centres in metres."""
    x, y, z, length, width, height, yaw, vx, vy = boxes.unbind(-1)
    return torch.stack(
        [x, y, z, width.log(), length.log(), height.log(), yaw.sin(), yaw.cos(), vx, vy], dim=-1
    )


def decode_boxes(codes: Tensor) -> Tensor:
    """Boxes (..., 9) of codes (..., 10); the inverse of `encode_boxes`."""
    x, y, z, log_w, log_l, log_h, sin, cos, vx, vy = codes.unbind(-1)
    width, length, height = (v.clamp(*_LOG_SIZE_RANGE).exp() for v in (log_w, log_l, log_h))
    return torch.stack([x, y, z, length, width, height, torch.atan2(sin, cos), vx, vy], dim=-1)


def transform_boxes(dst_from_src: Tensor, boxes_src: Tensor) -> Tensor:
    """Boxes (..., M, 9) of frame src expressed in frame dst; `dst_from_src` (..., 4, 4) turns mainly about z.

    Headings are turned by the yaw of the transform, as nuScenes boxes are kept upright.
    """
    rotation = dst_from_src[..., :3, :3]
    centers = boxes_src[..., :3] @ rotation.mT + dst_from_src[..., None, :3, 3]
    yaw = boxes_src[..., 6:7] + yaw_of(dst_from_src)[..., None, None]
    velocity = torch.cat([boxes_src[..., 7:9], torch.zeros_like(yaw)], dim=-1) @ rotation.mT
    return torch.cat([centers, boxes_src[..., 3:6], wrap_angle(yaw), velocity[..., :2]], dim=-1)


def transform_codes(dst_from_src: Tensor, codes_src: Tensor) -> Tensor:
    """Codes (..., 10) of frame src expressed in frame dst; dst_from_src (4, 4); in the codes' precision.

    Headings and velocities are turned as vectors in the ground plane, as the nuScenes devkit turns boxes; for
    a turn about z this is what `transform_boxes` does.
    """
    matrix = dst_from_src.to(codes_src)
    centers = codes_src[..., :3] @ matrix[:3, :3].mT + matrix[:3, 3]
    heading = codes_src[..., 6:8].flip(-1) @ matrix[:2, :2].mT  # (cos, sin)
    velocity = codes_src[..., 8:10] @ matrix[:2, :2].mT
    return torch.cat([centers, codes_src[..., 3:6], heading.flip(-1), velocity], dim=-1)


def wrap_angle(angle: Tensor) -> Tensor:
    """The same angle in [-pi, pi)."""
    return torch.remainder(angle + torch.pi, 2 * torch.pi) - torch.pi


def box_corners(boxes: NDArray[Any]) -> NDArray[np.float64]:
    """Corners (M, 8, 3) of boxes (M, 9): the four of the front face first (right-top, left-top,
    left-bottom, right-bottom seen along the heading), then the same four of the rear face."""
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
