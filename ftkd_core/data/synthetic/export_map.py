# SPDX-License-Identifier: Apache-2.0
"""Map mask of drivable ground, which the devkit draws under lidar sweeps.

A mask covers the global frame from its origin with ten pixels per metre, x to the right and y up. Scenes are
therefore placed at positive coordinates.
"""

from pathlib import Path
from typing import Final

import cv2
import numpy as np
from numpy.typing import NDArray

from ftkd_core.data.synthetic.ground import X_RANGE, Y_RANGE
from ftkd_core.data.synthetic.roads import CROSSINGS_X, ROAD_HALF
from ftkd_core.data.synthetic.world import Scene
from ftkd_core.geometry import transform_points

_MARGIN_M: Final = 100.0
_PIXELS_PER_M: Final = 10


def write_map(path: Path, scene: Scene) -> None:
    """Write the roads around the drive as PNG: 255 on the road, 0 elsewhere."""
    times = np.arange(0.0, scene.duration_s, 0.5)
    drive = np.stack([scene.ego_pose(float(time))[:2, 3] for time in times])  # (T, 2) metres
    width, height = (np.ceil(drive.max(axis=0) + _MARGIN_M) * _PIXELS_PER_M).astype(int)
    mask = np.zeros((height, width), dtype=np.uint8)
    for road in _roads(scene):
        pixels = np.stack([road[:, 0] * _PIXELS_PER_M, height - road[:, 1] * _PIXELS_PER_M], axis=-1)
        cv2.fillConvexPoly(mask, pixels.round().astype(np.int32), (255.0,))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(cv2.imencode(".png", mask)[1].tobytes())


def _roads(scene: Scene) -> list[NDArray[np.float64]]:
    """Return the corners (4, 2) of each road in the global frame."""
    strips = [(X_RANGE, (-ROAD_HALF, ROAD_HALF))]
    strips += [((x - ROAD_HALF, x + ROAD_HALF), Y_RANGE) for x in CROSSINGS_X]
    roads = []
    for (left, right), (low, high) in strips:
        corners = np.array([[left, low, 0.0], [right, low, 0.0], [right, high, 0.0], [left, high, 0.0]])
        roads.append(transform_points(scene.global_from_local, corners)[:, :2])
    return roads
