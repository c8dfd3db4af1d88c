# SPDX-License-Identifier: Apache-2.0
"""Augmentation of training data: the settings, and the augmentation that is drawn for one segment."""

from typing import Annotated, NamedTuple

import numpy as np
from pydantic import Field

from ftkd_core.config_class import NotNegative, Probability, config_class, require

_Zoom = Annotated[float, Field(ge=0.5, le=2)]


@config_class
class AugmentConfig:
    """Augmentation of training. Each value is drawn once per segment, for all its frames, unless stated
    otherwise."""

    flip: Probability = 0.5
    """Probability of mirroring images and world [public code]."""
    rotation: NotNegative = 0.3925
    """Largest angle in radians by which the world turns about z [public code]."""
    colour: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """Largest relative change of brightness, contrast and each channel [ours]."""
    camera_dropout: Probability = 0.05
    """Probability per frame that one camera is missing [ours]."""
    zoom: tuple[_Zoom, _Zoom] = (1.0, 1.0)
    """Smallest and largest scale of the images; StreamPETR: 0.86 and 1.25 [public code]."""
    scale: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    """Largest relative change of the size of the world; StreamPETR: 0.05 [public code]."""
    grid_mask: Probability = 0.0
    """Probability per step that a grid of squares is blank in all images of the student; StreamPETR: 0.7
    [public code; grid_mask.py]."""
    views: Annotated[int, Field(ge=0)] = 0
    """Number of geometric augmentations per scene, drawn once with a fixed seed, so that a teacher cache can
    hold them; each segment or window takes one of them. 0 draws new ones without end [ours]."""
    as_published: bool = False
    """Augments as the public code: mirroring flips images and cameras but not the world; streams draw anew
    for every frame, except `scale`; `colour` changes each image on its own and with probability one half
    brightness (up to 64 `colour` grey levels), contrast, saturation, hue (36 `colour` degrees) and the order
    of channels."""

    def __post_init__(self) -> None:
        require(
            self.zoom[0] <= self.zoom[1],
            f"zoom {list(self.zoom)}: expected the smallest scale first",
        )


class Augmentation(NamedTuple):
    """Augmentation of one segment.

    mirror flips images left-right, and the world too if mirror_world is set; angle (radians) turns the ego
    frame about z; gain, per RGB channel, and offset change the colours; zoom scales the images, and left, 0
    to 1, places the crop; scale enlarges the world. distortion and seed: strength and seed of the photometric
    changes of each image (photometric.py).
    """

    mirror: bool = False
    angle: float = 0.0
    gain: tuple[float, float, float] = (1.0, 1.0, 1.0)
    offset: float = 0.0
    zoom: float = 1.0
    left: float = 0.5
    scale: float = 1.0
    mirror_world: bool = True
    distortion: float = 0.0
    seed: int = 0

    @property
    def world_mirrored(self) -> bool:
        """Whether the world is mirrored."""
        return self.mirror and self.mirror_world


def seeded_view(config: AugmentConfig, clip: int, view: int) -> Augmentation:
    """Return the geometric augmentation of one of the `views` of a clip; it does not depend on the seed of a
    run."""
    drawn = draw_augmentation(config, np.random.default_rng([clip, view]))
    plain = Augmentation()
    return drawn._replace(gain=plain.gain, offset=plain.offset, distortion=0.0, seed=0)


def in_view(drawn: Augmentation, config: AugmentConfig, clip: int, view: int) -> Augmentation:
    """Return an augmentation with the geometry of a view and the colours of `drawn`."""
    colours = {name: getattr(drawn, name) for name in ("gain", "offset", "distortion", "seed")}
    return seeded_view(config, clip, view)._replace(**colours)


def draw_augmentation(config: AugmentConfig, random: np.random.Generator) -> Augmentation:
    """Draw one augmentation. Every config makes the same number of draws, so that random streams agree across
    configs."""
    mirror, angle = random.random() < config.flip, random.uniform(-1, 1) * config.rotation
    gains = (1 + random.uniform(-1, 1) * config.colour) * (1 + random.uniform(-0.5, 0.5, 3) * config.colour)
    red, green, blue = (float(gain) for gain in gains)
    offset = float(random.uniform(-64, 64) * config.colour)
    zoom, left = random.uniform(*config.zoom), random.random()
    left = 0.5 if zoom == 1.0 else left
    scale = 1 + float(random.uniform(-1, 1)) * config.scale
    plain = Augmentation(mirror, float(angle), zoom=float(zoom), left=float(left), scale=scale)
    if not config.as_published:
        return plain._replace(gain=(red, green, blue), offset=offset)
    seed = int(random.integers(2**32))
    return plain._replace(mirror_world=False, distortion=config.colour, seed=seed)
