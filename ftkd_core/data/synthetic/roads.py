# SPDX-License-Identifier: Apache-2.0
"""Layout of the roads in the local frame, in metres: one main road along x and three crossings."""

from typing import Final

LANE_WIDTH: Final = 3.5
ROAD_HALF: Final = 7.0
SIDEWALK: Final = 4.0
CROSSINGS_X: Final = (-110.0, 0.0, 110.0)


def is_on_road(x: float, y: float) -> bool:
    return abs(y) < ROAD_HALF or min(abs(x - c) for c in CROSSINGS_X) < ROAD_HALF
