# SPDX-License-Identifier: Apache-2.0
"""A simple 32-beam sweep: every beam against the ground and the boxes in its way; buildings and vehicles
occlude.

The vehicle is taken as standing during the sweep. Symbols: R beams, A azimuth steps, M actors, P points.
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

from ftkd_core.data.synthetic.rig import EGO_FROM_LIDAR
from ftkd_core.data.synthetic.world import Scene
from ftkd_core.geometry import invert_rigid, yaw_transform

_ELEVATIONS: Final = np.deg2rad(np.linspace(-30.67, 10.67, 32))
_AZIMUTHS: Final = 1080
_RANGE_M: Final = 70.0


def simulate_sweep(scene: Scene, time_s: float) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Points (P, 5) x, y, z in LIDAR_TOP, intensity, ring; and for each the row of the actor it lies on, or
    -1."""
    ranges, hits = _range_image(scene, time_s)
    ring, column = np.nonzero(np.isfinite(ranges))
    directions = _directions()[ring, column]
    points_ego = directions * ranges[ring, column, None] + EGO_FROM_LIDAR[:3, 3]
    lidar_from_ego = invert_rigid(EGO_FROM_LIDAR)
    points = points_ego @ lidar_from_ego[:3, :3].T + lidar_from_ego[:3, 3]
    rows = hits[ring, column]
    intensity = np.where(rows >= 0, 40.0, 10.0)
    sweep = np.column_stack([points, intensity, ring]).astype(np.float32)
    return sweep, rows


def lidar_hits(scene: Scene, time_s: float) -> NDArray[np.int64]:
    """Number of returns (M,) from each actor, rows as in `Scene.actors_at`."""
    _, hits = _range_image(scene, time_s)
    return np.bincount(hits[hits >= 0], minlength=len(scene.actors))


def _directions() -> NDArray[np.float64]:
    """Unit vectors (R, A, 3) of the beams in the ego frame; azimuth steps start behind the vehicle."""
    azimuth = -np.pi + (np.arange(_AZIMUTHS) + 0.5) * 2 * np.pi / _AZIMUTHS
    cos = np.cos(_ELEVATIONS)[:, None]
    z = np.broadcast_to(np.sin(_ELEVATIONS)[:, None], (len(_ELEVATIONS), _AZIMUTHS))
    return np.stack([cos * np.cos(azimuth), cos * np.sin(azimuth), z], axis=-1)


def _range_image(scene: Scene, time_s: float) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Range (R, A) in metres, inf where nothing answers, and the actor hit, -1 for ground and fixtures."""
    x, y, yaw, _ = scene.ego.at(time_s)
    ego_from_local = invert_rigid(yaw_transform(yaw, (x, y, 0.0)))
    boxes = scene.actor_boxes_local(time_s)
    solid = np.concatenate([boxes[:, [0, 1, 6, 3, 4, 5]], _fixture_rows(scene)])
    centers = np.column_stack([solid[:, :2], np.zeros(len(solid))])
    centers = centers @ ego_from_local[:3, :3].T + ego_from_local[:3, 3] - EGO_FROM_LIDAR[:3, 3]
    headings = solid[:, 2] - yaw
    height = EGO_FROM_LIDAR[2, 3]
    down = np.sin(_ELEVATIONS) < 0
    ground = np.where(down, height / np.maximum(-np.sin(_ELEVATIONS), 1e-6), np.inf)
    ranges = np.repeat(np.where(ground <= _RANGE_M, ground, np.inf)[:, None], _AZIMUTHS, axis=1)
    hits = np.full(ranges.shape, -1, dtype=np.int64)
    directions = _directions()
    for row in range(len(solid)):
        size = solid[row, 3:6]
        window = _window(centers[row], headings[row], size)
        if window is None:
            continue
        actor = row if row < len(boxes) else -1
        _cast(directions, window, centers[row], float(headings[row]), size, actor, ranges, hits)
    return ranges, hits


def _fixture_rows(scene: Scene) -> NDArray[np.float64]:
    rows = [[*fixture.pose, *fixture.size] for fixture in scene.fixtures]
    return np.array(rows, dtype=np.float64).reshape(-1, 6)


def _window(
    center: NDArray[np.float64], heading: float, size: NDArray[np.float64]
) -> NDArray[np.int64] | None:
    """Azimuth steps that can meet a box; None beyond range."""
    radius = float(np.hypot(size[0], size[1])) / 2
    distance = float(np.hypot(center[0], center[1]))
    if distance - radius > _RANGE_M:
        return None
    if distance <= radius:
        return np.arange(_AZIMUTHS)
    half = np.arcsin(min(1.0, radius / distance))
    middle = np.arctan2(center[1], center[0])
    first, last = (int(np.floor((middle + s * half + np.pi) / (2 * np.pi) * _AZIMUTHS)) for s in (-1, 1))
    return np.arange(first, last + 1) % _AZIMUTHS


def _cast(
    directions: NDArray[np.float64],
    window: NDArray[np.int64],
    center: NDArray[np.float64],
    heading: float,
    size: NDArray[np.float64],
    actor: int,
    ranges: NDArray[np.float64],
    hits: NDArray[np.int64],
) -> None:
    """Slab test of the window's beams against one box standing on the ground; keeps what is nearer."""
    rays = directions[:, window]
    cos, sin = np.cos(heading), np.sin(heading)
    lift = size[2] / 2 - EGO_FROM_LIDAR[2, 3]
    origin = np.array([-(cos * center[0] + sin * center[1]), sin * center[0] - cos * center[1], -lift])
    local = np.stack(
        [cos * rays[..., 0] + sin * rays[..., 1], -sin * rays[..., 0] + cos * rays[..., 1], rays[..., 2]],
        axis=-1,
    )
    safe = np.where(np.abs(local) < 1e-9, 1e-9, local)
    near, far = (-size / 2 - origin) / safe, (size / 2 - origin) / safe
    entry, leave = np.minimum(near, far).max(-1), np.maximum(near, far).min(-1)
    current = ranges[:, window]
    met = (entry <= leave) & (entry > 0.3) & (entry < current) & (entry <= _RANGE_M)
    ranges[:, window] = np.where(met, entry, current)
    hits[:, window] = np.where(met, actor, hits[:, window])
