# SPDX-License-Identifier: Apache-2.0
"""Training targets of one frame: ground truth in range and its projections into the cameras.

Symbols: M objects, N cameras.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ftkd_core.boxes import box_corners
from ftkd_core.classes import CAMERA_CHANNELS
from ftkd_core.config import TOKEN_STRIDE
from ftkd_core.geometry import invert_rigid, transform_points
from ftkd_core.types import Targets

Array = NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class ClipObjects:
    """Ground truth of one frame: boxes (M, 9) in ego at the key frame's time, labels (M,), visible (M,)
    visible fraction of the object over all cameras, num_points (M,) lidar returns (the devkit scores objects
    with at least one)."""

    boxes: Array
    labels: Array
    visible: Array
    num_points: Array


def make_targets(
    boxes: Array,
    objects: ClipObjects,
    intrinsics: Array,
    ego_from_camera: Array,
    present: Array,
    image_size: tuple[int, int],
    range_m: float = 61.2,
    min_visible: float = 0.15,
    visible: NDArray[np.bool_] | None = None,
) -> Targets:
    """Make the targets of one frame from objects that have a lidar return and lie in range.

    If a camera of CAMERA_CHANNELS is missing or sees a part of its image only (visible (N, H/16, W/16), its
    tokens), objects that no present camera sees are left out as well. boxes (M, 9) in ego; image_size
    (height, width). An object has a 2-D target in a camera if its centre lies ahead of the camera and on a
    visible token, its clipped 2-D box has an area above 1 pixel, and its visible fraction exceeds
    min_visible.
    """
    keep = (objects.num_points > 0) & (np.abs(boxes[:, :2]).max(axis=1, initial=0.0) < range_m)
    boxes_2d, centers, depths = project_boxes(boxes, intrinsics, ego_from_camera, image_size)
    area = (boxes_2d[..., 2] - boxes_2d[..., 0]) * (boxes_2d[..., 3] - boxes_2d[..., 1])
    in_view = (depths > 0.5) & (area > 1.0)
    seen = in_view & present[:, None]
    has_center = seen
    if visible is not None:
        has_center = seen & _on_visible_token(centers, visible)
        seen = seen & _meets_visible_token(boxes_2d, visible)
    if visible is not None or not present.all() or len(present) < len(CAMERA_CHANNELS):
        keep &= seen.any(axis=0)
    mask_2d = has_center & (objects.visible > min_visible)
    return Targets(
        boxes=torch.from_numpy(boxes[keep]).float()[None],
        labels=torch.from_numpy(objects.labels[keep].astype(np.int64))[None],
        mask=torch.ones(1, int(keep.sum()), dtype=torch.bool),
        boxes_2d=torch.from_numpy(boxes_2d[:, keep]).float()[None],
        centers_2d=torch.from_numpy(centers[:, keep]).float()[None],
        depths=torch.from_numpy(depths[:, keep]).float()[None],
        mask_2d=torch.from_numpy(mask_2d[:, keep])[None],
    )


def _on_visible_token(points: Array, visible: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return whether pixels (N, M, 2) lie on a visible token (N, h, w); the nearest one for a pixel outside
    the image."""
    last = np.array(visible.shape[:0:-1]) - 1
    cells = np.clip(np.nan_to_num(points // TOKEN_STRIDE), 0, last).astype(int)
    return np.asarray(visible[np.arange(len(visible))[:, None], cells[..., 1], cells[..., 0]])


def _meets_visible_token(boxes_2d: Array, visible: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return whether boxes (N, M, 4) in pixels overlap a visible token (N, h, w)."""
    sums = np.pad(visible.astype(np.int64).cumsum(1).cumsum(2), ((0, 0), (1, 0), (1, 0)))
    limits = np.array(visible.shape[:0:-1])
    low = np.clip(np.floor(boxes_2d[..., :2] / TOKEN_STRIDE), 0, limits).astype(int)
    high = np.clip(np.ceil(boxes_2d[..., 2:] / TOKEN_STRIDE), 0, limits).astype(int)
    camera = np.arange(len(visible))[:, None]
    inside = sums[camera, high[..., 1], high[..., 0]] + sums[camera, low[..., 1], low[..., 0]]
    inside -= sums[camera, low[..., 1], high[..., 0]] + sums[camera, high[..., 1], low[..., 0]]
    return np.asarray(inside > 0)


def project_boxes(
    boxes: Array, intrinsics: Array, ego_from_camera: Array, image_size: tuple[int, int]
) -> tuple[Array, Array, Array]:
    """Project boxes (M, 9) into N cameras: clipped 2-D boxes (N, M, 4) as x1 y1 x2 y2, centres (N, M, 2) in
    pixels and depths (N, M).

    Corners behind a camera are moved to 10 cm ahead of it, which keeps boxes next to the camera on their
    side.
    """
    points = np.concatenate([box_corners(boxes), boxes[:, None, :3].astype(np.float64)], axis=1)  # (M, 9, 3)
    camera_from_ego = invert_rigid(ego_from_camera)
    local = transform_points(
        camera_from_ego, np.broadcast_to(points.reshape(1, -1, 3), (len(intrinsics), points.size // 3, 3))
    )
    depth = local[..., 2:]
    pixels = local[..., :2] / np.maximum(depth, 0.1) * intrinsics[:, None, (0, 1), (0, 1)]
    pixels = (pixels + intrinsics[:, None, :2, 2]).reshape(len(intrinsics), -1, 9, 2)
    height, width = image_size
    limit = np.array([width, height], dtype=np.float64)
    corners = np.clip(pixels[:, :, :8], 0.0, limit)
    boxes_2d = np.concatenate([corners.min(axis=2), corners.max(axis=2)], axis=-1)
    return boxes_2d, pixels[:, :, 8], depth.reshape(len(intrinsics), -1, 9)[:, :, 8]
