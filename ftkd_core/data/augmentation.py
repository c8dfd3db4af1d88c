# SPDX-License-Identifier: Apache-2.0
"""Random augmentation of training samples: ranges and drawn values."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ftkd_core.errors import UserError


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Ranges of the augmentation. UserError for values out of range.

    Per segment, equal for all its frames: mirror with probability flip, rotate about z by up to `rotation`
    radians, scale the world by up to `scale`, change colours by up to `colour` (brightness, contrast, each
    channel), and draw images zoom_least to zoom_most times as large (StreamPETR: 0.86 to 1.25). Per frame:
    drop one camera with probability camera_dropout. Per step: mask all images of the student with probability
    grid_mask (grid_mask.py).
    """

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
    """One drawn augmentation.

    mirror: flip images and world left-right. angle: rotation of the ego frame about z, radians. gain: per
    colour channel (3,). offset: added to all channels. zoom and left: size factor of the images and the
    fraction of the surplus width that is cut at the left. scale: size factor of the world.
    """

    mirror: bool = False
    angle: float = 0.0
    gain: tuple[float, float, float] = (1.0, 1.0, 1.0)
    offset: float = 0.0
    zoom: float = 1.0
    left: float = 0.5
    scale: float = 1.0


def draw_augmentation(config: AugmentConfig, random: np.random.Generator) -> Augmentation:
    """Draw one augmentation. The number of random draws does not depend on the config, so streams stay
    aligned across configs."""
    mirror, angle = random.random() < config.flip, random.uniform(-1, 1) * config.rotation
    gains = (1 + random.uniform(-1, 1) * config.colour) * (1 + random.uniform(-0.5, 0.5, 3) * config.colour)
    red, green, blue = (float(gain) for gain in gains)
    offset = float(random.uniform(-64, 64) * config.colour)
    zoom, left = random.uniform(config.zoom_least, config.zoom_most), random.random()
    left = 0.5 if zoom == 1.0 else left
    scale = 1 + float(random.uniform(-1, 1)) * config.scale
    return Augmentation(mirror, float(angle), (red, green, blue), offset, float(zoom), float(left), scale)
