# SPDX-License-Identifier: Apache-2.0
"""Ground texture seen from above, with mip levels: asphalt, lane markings, sidewalks, grass and paving."""

from functools import lru_cache
from typing import Final, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from ftkd_core.data.synthetic.roads import CROSSINGS_X, LANE_WIDTH, ROAD_HALF, SIDEWALK

METRES_PER_PIXEL: Final = 0.2
X_RANGE: Final = (-260.0, 260.0)
Y_RANGE: Final = (-120.0, 120.0)
NUM_LEVELS: Final = 5

_ASPHALT: Final = (88, 88, 92)
_MARKING: Final = (225, 225, 220)
_SIDEWALK: Final = (150, 146, 140)
_KERB: Final = (185, 182, 176)
_GRASS: Final = (92, 118, 66)


class GroundTexture(NamedTuple):
    """RGB images, each half the size of the previous level; column 0 is X_RANGE[0], row 0 is Y_RANGE[0]."""

    levels: tuple[NDArray[np.uint8], ...]


@lru_cache(maxsize=8)
def ground_texture(seed: int) -> GroundTexture:
    """Draw the ground of a scene; textures of recent seeds are cached."""
    random = np.random.default_rng([seed, 11])
    width = round((X_RANGE[1] - X_RANGE[0]) / METRES_PER_PIXEL)
    height = round((Y_RANGE[1] - Y_RANGE[0]) / METRES_PER_PIXEL)
    image = np.empty((height, width, 3), dtype=np.uint8)
    shade = random.uniform(0.8, 1.15)
    image[:] = np.clip(np.array(_GRASS if random.random() < 0.6 else (140, 132, 118)) * shade, 0, 255)
    asphalt = np.clip(np.array(_ASPHALT) * random.uniform(0.8, 1.25), 0, 255)
    outer, kerb = ROAD_HALF + SIDEWALK, ROAD_HALF + 0.25
    for half, color in ((outer, _SIDEWALK), (kerb, _KERB), (ROAD_HALF, asphalt)):
        _strip(image, (X_RANGE[0], X_RANGE[1]), (-half, half), color)
        for crossing in CROSSINGS_X:
            _strip(image, (crossing - half, crossing + half), (Y_RANGE[0], Y_RANGE[1]), color)
    for crossing in CROSSINGS_X:  # repaint the main road over the kerbs of the crossings
        _strip(image, (crossing - ROAD_HALF, crossing + ROAD_HALF), (-outer, outer), asphalt)
    _markings(image)
    coarse = random.normal(0, 7, (height // 16 + 1, width // 16 + 1)).astype(np.float32)
    noise = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_LINEAR)
    noise = noise + random.normal(0, 4, (height, width)).astype(np.float32)
    levels = [np.clip(image + noise[..., None], 0, 255).astype(np.uint8)]
    for _ in range(NUM_LEVELS - 1):
        finer = levels[-1]
        half_size = (finer.shape[1] // 2, finer.shape[0] // 2)
        levels.append(np.asarray(cv2.resize(finer, half_size, interpolation=cv2.INTER_AREA), dtype=np.uint8))
    return GroundTexture(tuple(levels))


def _strip(image: NDArray[np.uint8], x: tuple[float, float], y: tuple[float, float], color: object) -> None:
    columns = [round((v - X_RANGE[0]) / METRES_PER_PIXEL) for v in x]
    rows = [round((v - Y_RANGE[0]) / METRES_PER_PIXEL) for v in y]
    image[max(rows[0], 0) : rows[1], max(columns[0], 0) : columns[1]] = color


def _markings(image: NDArray[np.uint8]) -> None:
    """Draw double centre lines, dashed lane lines, stop lines and zebra crossings, none within a crossing."""
    edges = [
        X_RANGE[0],
        *(v for c in CROSSINGS_X for v in (c - ROAD_HALF - 5, c + ROAD_HALF + 5)),
        X_RANGE[1],
    ]
    for start, end in zip(edges[::2], edges[1::2], strict=True):
        for offset in (-0.2, 0.2):
            _strip(image, (start, end), (offset - 0.1, offset + 0.1), (215, 190, 90))
        for lane in (-LANE_WIDTH, LANE_WIDTH):
            for x in np.arange(start, end - 3, 9.0):
                _strip(image, (float(x), float(x) + 3.0), (lane - 0.1, lane + 0.1), _MARKING)
    for crossing in CROSSINGS_X:
        for side in (-1, 1):
            near = crossing + side * (ROAD_HALF + 1.0)
            for y in np.arange(-ROAD_HALF + 0.5, ROAD_HALF - 0.5, 1.0):
                _strip(image, tuple(sorted((near, near + side * 2.6))), (float(y), float(y) + 0.5), _MARKING)  # type: ignore[arg-type]
            start, end = sorted((side * (ROAD_HALF + 5), float(Y_RANGE[(side + 1) // 2])))
            _strip(image, (crossing - 0.1, crossing + 0.1), (start, end), (215, 190, 90))
            for lane in (-LANE_WIDTH, LANE_WIDTH):
                for y in np.arange(start, end - 3, 9.0):
                    _strip(
                        image,
                        (crossing + lane - 0.1, crossing + lane + 0.1),
                        (float(y), float(y) + 3),
                        _MARKING,
                    )
