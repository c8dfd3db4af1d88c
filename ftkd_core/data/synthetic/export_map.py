# SPDX-License-Identifier: Apache-2.0
"""The place of a scene in a data set's global frame, and the mask of drivable ground that the devkit draws.

The devkit's masks have ten pixels a metre, x to the right and y up from the lower left corner, so that all
coordinates of a scene must be positive: a scene is moved to start at a fixed point.
"""

from pathlib import Path
from typing import Final

import cv2
import numpy as np
from numpy.typing import NDArray

from ftkd_core.data.synthetic.world import Scene
from ftkd_core.geometry import make_transform

_START_M: Final = 500.0
_MARGIN_M: Final = 100.0
_PIXELS_PER_M: Final = 10
_LANE_WIDTH_M: Final = 7.0


def global_from_world(scene: Scene) -> NDArray[np.float64]:
    """Translation (4, 4) that puts the vehicle at (500, 500) m when the scene starts; headings stay."""
    start = scene.ego_pose(0.0)[:2, 3]
    matrix: NDArray[np.float64] = make_transform(translation=[_START_M - start[0], _START_M - start[1], 0.0])
    return matrix


def write_map(path: Path, scene: Scene) -> None:
    """Write the mask as PNG, 255 on the strip that the vehicle drives along and 0 elsewhere."""
    shift = global_from_world(scene)[:2, 3]
    times = np.arange(0.0, scene.duration_s + 0.05, 0.1)
    drive = np.stack([scene.ego_pose(float(time))[:2, 3] for time in times]) + shift  # (T, 2) metres
    width, height = (np.ceil(drive.max(axis=0) + _MARGIN_M) * _PIXELS_PER_M).astype(int)
    mask = np.zeros((height, width), dtype=np.uint8)
    pixels = np.stack([drive[:, 0] * _PIXELS_PER_M, height - drive[:, 1] * _PIXELS_PER_M], axis=-1)
    line = pixels.round().astype(np.int32)
    cv2.polylines(mask, [line], False, 255, thickness=round(_LANE_WIDTH_M * _PIXELS_PER_M))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(cv2.imencode(".png", mask)[1].tobytes())
