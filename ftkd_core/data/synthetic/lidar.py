# SPDX-License-Identifier: Apache-2.0
"""Simulation of a 32-beam lidar sweep: all beams are intersected with the ground and with the boxes of actors
and fixtures.

The vehicle does not move during a sweep. Symbols: R beams, A azimuth steps, M actors, P points, W pairs of
box and azimuth step.
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
    """Return points (P, 5) as x, y, z in LIDAR_TOP, intensity and ring, and for each point the row of the
    actor it hit or -1."""
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
    """Count the returns (M,) from each actor; rows as in `Scene.actors_at`."""
    _, hits = _range_image(scene, time_s)
    return np.bincount(hits[hits >= 0], minlength=len(scene.actors))


@lru_cache(maxsize=1)
def _azimuths() -> NDArray[np.float64]:
    """Angles (A,) of the azimuth steps in the ego frame, beginning behind the vehicle."""
    return -np.pi + (np.arange(_AZIMUTHS) + 0.5) * 2 * np.pi / _AZIMUTHS


@lru_cache(maxsize=1)
def _directions() -> NDArray[np.float64]:
    """Unit vectors (R, A, 3) of the beams in the ego frame."""
    cos = np.cos(_ELEVATIONS)[:, None]
    z = np.broadcast_to(np.sin(_ELEVATIONS)[:, None], (len(_ELEVATIONS), _AZIMUTHS))
    return np.stack([cos * np.cos(_azimuths()), cos * np.sin(_azimuths()), z], axis=-1)


def _range_image(scene: Scene, time_s: float) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return ranges (R, A) in metres, inf for no return, and the actor hit, -1 for ground and fixtures."""
    x, y, yaw, _ = scene.ego.at(time_s)
    ego_from_local = invert_rigid(yaw_transform(yaw, (x, y, 0.0)))
    boxes = scene.actor_boxes_local(time_s)
    solid = np.concatenate([boxes[:, [0, 1, 6, 3, 4, 5]], scene.fixture_solids])
    centers = np.column_stack([solid[:, :2], np.zeros(len(solid))])
    centers = centers @ ego_from_local[:3, :3].T + ego_from_local[:3, 3] - EGO_FROM_LIDAR[:3, 3]
    sines = np.sin(_ELEVATIONS)
    ground = np.where(sines < 0, EGO_FROM_LIDAR[2, 3] / np.maximum(-sines, 1e-6), np.inf)
    ranges = np.repeat(np.where(ground <= _RANGE_M, ground, np.inf)[:, None], _AZIMUTHS, axis=1)
    hits = np.full(ranges.shape, -1, dtype=np.int64)
    box, column = _candidate_pairs(centers, solid[:, 3:5])
    enter, leave = _along_ground(centers[box], solid[box, 2] - yaw, solid[box, 3:5], column)
    crossed = (enter <= leave) & (leave > 0)
    _cast_rays(box[crossed], column[crossed], enter[crossed], leave[crossed], solid[:, 5], ranges, hits)
    hits[hits >= len(boxes)] = -1
    return ranges, hits


def _candidate_pairs(
    centers: NDArray[np.float64], sizes: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return pairs (W,) of boxes and azimuth steps that may intersect, box by box; boxes beyond range are
    left out."""
    radius = np.hypot(sizes[:, 0], sizes[:, 1]) / 2
    distance = np.hypot(centers[:, 0], centers[:, 1])
    around = distance <= radius
    half = np.where(around, np.pi, np.arcsin(np.minimum(1.0, radius / np.maximum(distance, 1e-9))))
    middle = np.arctan2(centers[:, 1], centers[:, 0])
    first, last = (
        np.floor((middle + side * half + np.pi) / (2 * np.pi) * _AZIMUTHS).astype(np.int64)
        for side in (-1, 1)
    )
    counts = np.where(distance - radius > _RANGE_M, 0, np.minimum(last - first + 1, _AZIMUTHS))
    box = np.repeat(np.arange(len(centers)), counts)
    within = np.arange(len(box)) - np.repeat(np.cumsum(counts) - counts, counts)
    return box, (first[box] + within) % _AZIMUTHS


def _along_ground(
    centers: NDArray[np.float64],
    headings: NDArray[np.float64],
    sizes: NDArray[np.float64],
    column: NDArray[np.int64],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the distances along the ground (W,) at which an azimuth step enters and leaves a box; for a
    miss, the entry lies beyond the exit."""
    turned = _azimuths()[column] - headings
    along = np.stack([np.cos(turned), np.sin(turned)])
    along = np.where(np.abs(along) < 1e-9, 1e-9, along)
    cos, sin = np.cos(headings), np.sin(headings)
    origin = np.stack(
        [-(cos * centers[:, 0] + sin * centers[:, 1]), sin * centers[:, 0] - cos * centers[:, 1]]
    )
    near, far = (-sizes.T / 2 - origin) / along, (sizes.T / 2 - origin) / along
    return np.minimum(near, far).max(axis=0), np.maximum(near, far).min(axis=0)


def _cast_rays(
    box: NDArray[np.int64],
    column: NDArray[np.int64],
    enter: NDArray[np.float64],
    leave: NDArray[np.float64],
    heights: NDArray[np.float64],
    ranges: NDArray[np.float64],
    hits: NDArray[np.int64],
) -> None:
    """Test all beams of the azimuth steps against the boxes they cross (slab test) and keep the nearest
    return of each.

    All beams of an azimuth step meet the upright sides at the same distance along the ground, so only floor
    and roof are tested per beam.
    """
    cos, sin = np.cos(_ELEVATIONS)[:, None], np.sin(_ELEVATIONS)[:, None]
    floor, roof = -EGO_FROM_LIDAR[2, 3] / sin, (heights - EGO_FROM_LIDAR[2, 3])[box] / sin  # (R, W)
    entry = np.maximum(enter / cos, np.minimum(floor, roof))
    departure = np.minimum(leave / cos, np.maximum(floor, roof))
    met = (entry <= departure) & (entry > 0.3) & (entry < ranges[:, column]) & (entry <= _RANGE_M)
    beam, pair = np.nonzero(met)
    rays, distances = beam * _AZIMUTHS + column[pair], entry[beam, pair]
    flat_ranges, flat_hits = ranges.reshape(-1), hits.reshape(-1)
    np.minimum.at(flat_ranges, rays, distances)
    nearest = distances == flat_ranges[rays]
    flat_hits[rays[nearest][::-1]] = box[pair[nearest]][::-1]
