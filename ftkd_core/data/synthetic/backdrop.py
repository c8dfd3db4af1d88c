# SPDX-License-Identifier: Apache-2.0
"""Ground and sky of a camera image: each pixel's ray is intersected with the plane z = 0.

Symbols: H/W image size.
"""

import itertools
from functools import lru_cache
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from ftkd_core.data.synthetic.ground import METRES_PER_PIXEL, NUM_LEVELS, X_RANGE, Y_RANGE, ground_texture
from ftkd_core.data.synthetic.light import brightness_at, sky_colors
from ftkd_core.data.synthetic.rig import SurroundRig
from ftkd_core.data.synthetic.world import Scene


class _View(NamedTuple):
    """Rays of a mounted camera and their intersections with the ground plane, as (H, W) arrays; constant for
    a rig.

    sky_rows: number of rows from the top that contain sky. bands: (first row, end row, mip level of the
    ground texture).
    """

    x_ego: NDArray[np.float32]  # ground intersection, metres
    y_ego: NDArray[np.float32]
    distance: NDArray[np.float32]  # metres along the ray; 10 km above the horizon
    elevation: NDArray[np.float32]  # sine of the ray's elevation
    is_ground: NDArray[np.bool_]
    sky_rows: int
    bands: tuple[tuple[int, int, int], ...]


@lru_cache(maxsize=32)
def _view(key: bytes, width: int, height: int) -> _View:
    """Compute the view of one camera. key: bytes of intrinsics (3, 3) and ego_from_camera (4, 4), float64."""
    numbers = np.frombuffer(key, dtype=np.float64)
    intrinsics, ego_from_camera = numbers[:9].reshape(3, 3), numbers[9:].reshape(4, 4)
    u, v = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    rays = (
        np.stack([u, v, np.ones_like(u)], axis=-1) @ np.linalg.inv(intrinsics).T @ ego_from_camera[:3, :3].T
    )
    rays /= np.linalg.norm(rays, axis=-1, keepdims=True)
    down = rays[..., 2] < -2e-3
    scale = np.where(down, ego_from_camera[2, 3] / np.maximum(-rays[..., 2], 2e-3), 0.0)
    x = ego_from_camera[0, 3] + scale * rays[..., 0]
    y = ego_from_camera[1, 3] + scale * rays[..., 1]
    distance = np.where(down, scale, 1e4)
    # A pixel covers distance / focal metres across and more along the view; use their geometric mean.
    footprint = distance / intrinsics[0, 0] / np.sqrt(np.maximum(-rays[..., 2], 2e-3))
    level = np.clip(
        np.round(np.log2(np.maximum(footprint.mean(axis=1), 1e-6) / METRES_PER_PIXEL)), 0, NUM_LEVELS - 1
    )
    starts = [0, *(np.flatnonzero(np.diff(level)) + 1).tolist(), height]
    bands = tuple((a, b, int(level[a])) for a, b in itertools.pairwise(starts) if down[a:b].any())
    return _View(
        x.astype(np.float32), y.astype(np.float32),
        distance.astype(np.float32), rays[..., 2].astype(np.float32),
        down,
        int((~down.all(axis=1)).nonzero()[0].max(initial=-1)) + 1, bands,
    )  # fmt: skip


class _Backdrop(NamedTuple):
    """Parts of ground and sky that are equal in all frames of a drive: sky image and haze image (H, W, 3),
    brightness of the ground (H, W, 3) or None by day, and the weights (H, W) of ground colour and haze."""

    sky: NDArray[np.uint8]
    haze: NDArray[np.uint8]
    brightness: NDArray[np.float32] | None
    ground_weight: NDArray[np.float32]
    haze_weight: NDArray[np.float32]


@lru_cache(maxsize=32)
def _backdrop(key: bytes, width: int, height: int, fog_per_m: float, night: bool) -> _Backdrop:
    """Compute the backdrop of one camera; `key` as in `_view`."""
    view = _view(key, width, height)
    horizon, zenith = sky_colors(night)
    haze = np.empty((height, width, 3), dtype=np.uint8)
    haze[:] = horizon.astype(np.uint8)
    sky = haze.copy()
    blend = np.clip(view.elevation[: view.sky_rows] * 2.5, 0, 1)[..., None]
    sky[: view.sky_rows] = (horizon * (1 - blend) + zenith * blend).astype(np.uint8)
    clear = np.exp(-fog_per_m * view.distance).astype(np.float32)
    light = brightness_at(night, view.distance, view.x_ego)
    brightness = np.repeat(light[..., None], 3, axis=-1) if night else None
    return _Backdrop(sky, haze, brightness, clear, 1 - clear)


def paint_backdrop(
    scene: Scene, rig: SurroundRig, camera: int, local_from_ego: NDArray[np.float64]
) -> NDArray[np.uint8]:
    """Render ground and sky of one camera as a new image (H, W, 3) RGB; local_from_ego is (4, 4)."""
    key = np.concatenate([rig.intrinsics[camera].ravel(), rig.ego_from_camera[camera].ravel()]).tobytes()
    view = _view(key, rig.width, rig.height)
    backdrop = _backdrop(key, rig.width, rig.height, scene.fog_per_m, scene.night)
    texture = ground_texture(scene.seed)
    cos, sin = np.float32(local_from_ego[0, 0]), np.float32(local_from_ego[1, 0])
    offset = local_from_ego[:2, 3]
    image = backdrop.sky.copy()
    for top, bottom, level in view.bands:
        x, y = view.x_ego[top:bottom], view.y_ego[top:bottom]
        scale = np.float32(1.0 / (METRES_PER_PIXEL * 2**level))
        map_x, map_y = cos * x, sin * x
        for coordinate, across, start in (
            (map_x, -sin, offset[0] - X_RANGE[0]),
            (map_y, cos, offset[1] - Y_RANGE[0]),
        ):
            coordinate += across * y
            coordinate += np.float32(start)
            coordinate *= scale
            coordinate -= np.float32(0.5)
        band = cv2.remap(
            texture.levels[level], map_x, map_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
        )
        if backdrop.brightness is not None:  # blendLinear normalises its weights, so it cannot darken
            band = cv2.multiply(band, backdrop.brightness[top:bottom], dtype=cv2.CV_8U)
        weights = backdrop.ground_weight[top:bottom], backdrop.haze_weight[top:bottom]
        shaded = cv2.blendLinear(band, backdrop.haze[top:bottom], *weights)
        mixed = max(0, min(view.sky_rows, bottom) - top)
        image[top + mixed : bottom] = shaded[mixed:]
        ground = view.is_ground[top : top + mixed]
        image[top : top + mixed][ground] = shaded[:mixed][ground]
    return image
