# SPDX-License-Identifier: Apache-2.0
"""Brightness and sky colours by day and at night."""

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

_DAY_SKY: Final = np.array([[205, 214, 226], [120, 160, 215]], dtype=np.float32)
_NIGHT_SKY: Final = np.array([[34, 34, 44], [10, 11, 20]], dtype=np.float32)
Floats = NDArray[np.floating[Any]]


def brightness_at(night: bool, distance: Floats, x_ego: Floats) -> NDArray[np.float32]:
    """Brightness of the ground or of a body: 1 by day; at night street light plus the ego's headlights.

    distance: metres from the ego. x_ego: metres ahead of the ego.
    """
    if not night:
        return np.ones_like(distance, dtype=np.float32)
    ahead = np.clip(x_ego / np.maximum(distance, 1.0) - 0.55, 0, 1) * 2.2
    beam = 0.9 * ahead * np.exp(-np.asarray(distance) / 30.0)
    return np.asarray(0.32 + beam, dtype=np.float32)


def sky_colors(night: bool) -> NDArray[np.float32]:
    """RGB colours (2, 3) at the horizon, which is also the colour of fog, and at the zenith."""
    return _NIGHT_SKY if night else _DAY_SKY
