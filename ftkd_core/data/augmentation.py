# SPDX-License-Identifier: Apache-2.0
"""How training changes what it shows: within what limits, and by how much this time."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ftkd_core.errors import UserError


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Per segment, the same for all its frames: mirror with probability flip, turn about z by up to
    rotation radians, the world larger or smaller by up to `scale`, colours by up to `colour` (brightness,
    contrast, each channel), images drawn between zoom_least and zoom_most times as large (StreamPETR: 0.86
    to 1.25); per frame one camera missing with camera_dropout, and per step, with probability grid_mask, a
    grid of squares blank in all images of the student (grid_mask.py). Errors: UserError for values out of
    range."""

    flip: float = 0.5
    rotation: float = 0.3925
    colour: float = 0.2
    camera_dropout: float = 0.05
    zoom_least: float = 1.0
    zoom_most: float = 1.0
    scale: float = 0.0
    grid_mask: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.scale <= 0.5:
            raise UserError(f"augment.scale {self.scale}: expected 0 to 0.5")
        if not 0.0 <= self.grid_mask <= 1.0:
            raise UserError(f"augment.grid_mask {self.grid_mask}: expected a probability, 0 to 1")
        if not 0.5 <= self.zoom_least <= self.zoom_most <= 2.0:
            raise UserError(
                f"augment.zoom_least {self.zoom_least} and zoom_most {self.zoom_most}: expected 0.5 to 2.0, "
                "the least first"
            )


class Augmentation(NamedTuple):
    """mirror: images and world left-right; angle (radians): the ego frame turned about z; gain and offset
    (3,) a colour; zoom and left: the images drawn larger, and which part of them is kept; scale: the world so
    many times as large."""

    mirror: bool = False
    angle: float = 0.0
    gain: tuple[float, float, float] = (1.0, 1.0, 1.0)
    offset: float = 0.0
    zoom: float = 1.0
    left: float = 0.5
    scale: float = 1.0


def draw_augmentation(config: AugmentConfig, random: np.random.Generator) -> Augmentation:
    """One augmentation; the same draws are made whatever the config, so that streams stay aligned across
    configs."""
    mirror, angle = random.random() < config.flip, random.uniform(-1, 1) * config.rotation
    gains = (1 + random.uniform(-1, 1) * config.colour) * (1 + random.uniform(-0.5, 0.5, 3) * config.colour)
    red, green, blue = (float(gain) for gain in gains)
    offset = float(random.uniform(-64, 64) * config.colour)
    zoom, left = random.uniform(config.zoom_least, config.zoom_most), random.random()
    left = 0.5 if zoom == 1.0 else left
    scale = 1 + float(random.uniform(-1, 1)) * config.scale
    return Augmentation(mirror, float(angle), (red, green, blue), offset, float(zoom), float(left), scale)
