# SPDX-License-Identifier: Apache-2.0
"""A simple 32-beam sweep: every beam against the ground and the boxes in its way; buildings and vehicles
occlude.

The vehicle is taken as standing during the sweep. Symbols: R beams, A azimuth steps, M actors, P points.
"""

from functools import lru_cache
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


@lru_cache(maxsize=1)
def _azimuths() -> NDArray[np.float64]:
    """Angles (A,) of the azimuth steps in the ego frame; they start behind the vehicle."""
    return -np.pi + (np.arange(_AZIMUTHS) + 0.5) * 2 * np.pi / _AZIMUTHS


@lru_cache(maxsize=1)
def _directions() -> NDArray[np.float64]:
    """Unit vectors (R, A, 3) of the beams in the ego frame."""
    cos = np.cos(_ELEVATIONS)[:, None]
    z = np.broadcast_to(np.sin(_ELEVATIONS)[:, None], (len(_ELEVATIONS), _AZIMUTHS))
    return np.stack([cos * np.cos(_azimuths()), cos * np.sin(_azimuths()), z], axis=-1)


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
    for row in range(len(solid)):
        size = solid[row, 3:6]
        window = _window(centers[row], headings[row], size)
        if window is None:
            continue
        actor = row if row < len(boxes) else -1
        _cast(window, centers[row], float(headings[row]), size, actor, ranges, hits)
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
    window: NDArray[np.int64],
    center: NDArray[np.float64],
    heading: float,
    size: NDArray[np.float64],
    actor: int,
    ranges: NDArray[np.float64],
    hits: NDArray[np.int64],
) -> None:
    """Slab test of the window's beams against one box standing on the ground; keeps what is nearer.

    The upright sides are met at the same distance along the ground by all beams of an azimuth step, so that only
    floor and roof need a test beam by beam, and only beams that can reach between floor and roof are tested at all.
    """
    enter, leave = _along_ground(window, center, heading, size)
    crossed = (enter <= leave) & (leave > 0)
    window, enter, leave = window[crossed], np.maximum(enter[crossed], 0.0), leave[crossed]
    if not len(window):
        return
    low, high = -EGO_FROM_LIDAR[2, 3], size[2] - EGO_FROM_LIDAR[2, 3]
    nearest, farthest = max(float(enter.min()), 1e-3), float(leave.max())
    first = np.searchsorted(_ELEVATIONS, np.arctan2(low, nearest) - 1e-6)
    last = np.searchsorted(_ELEVATIONS, np.arctan2(high, nearest if high > 0 else farthest) + 1e-6)
    cos, sin = np.cos(_ELEVATIONS[first:last, None]), np.sin(_ELEVATIONS[first:last, None])
    floor, roof = low / sin, high / sin
    entry = np.maximum(enter / cos, np.minimum(floor, roof))
    departure = np.minimum(leave / cos, np.maximum(floor, roof))
    part = np.ix_(np.arange(first, last), window)
    current = ranges[part]
    met = (entry <= departure) & (entry > 0.3) & (entry < current) & (entry <= _RANGE_M)
    ranges[part] = np.where(met, entry, current)
    hits[part] = np.where(met, actor, hits[part])


def _along_ground(
    window: NDArray[np.int64], center: NDArray[np.float64], heading: float, size: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Metres along the ground (W,) at which the window's azimuth steps enter and leave the footprint's slabs."""
    turned = _azimuths()[window] - heading
    along = np.stack([np.cos(turned), np.sin(turned)])
    along = np.where(np.abs(along) < 1e-9, 1e-9, along)
    cos, sin = np.cos(heading), np.sin(heading)
    origin = np.array([[-(cos * center[0] + sin * center[1])], [sin * center[0] - cos * center[1]]])
    half = size[:2, None] / 2
    near, far = (-half - origin) / along, (half - origin) / along
    return np.minimum(near, far).max(axis=0), np.maximum(near, far).min(axis=0)
