# SPDX-License-Identifier: Apache-2.0
"""Size of the noise of denoising queries, which queries and their losses share."""

import math
from typing import Final, NamedTuple

from ftkd_core.config import DetectorConfig, SparseBEVConfig


class NoiseScale(NamedTuple):
    """centre: largest displacement along each axis, in halves of the box size; positive: a longer
    displacement in these units makes a negative, which must be classified as background."""

    centre: float
    positive: float

    @property
    def positive_share(self) -> float:
        """Expected share of positives: the volume of the sphere `positive` in the cube of the
        displacements."""
        return min(1.0, math.pi / 6 * self.positive**3)


STREAM_PETR_NOISE: Final = NoiseScale(1.0, 0.75)  # StreamPETR code
SPARSE_BEV_NOISE: Final = NoiseScale(0.5, math.inf)  # SparseBEV code


def noise_scale(config: DetectorConfig | SparseBEVConfig) -> NoiseScale:
    """Return the noise of a model: its own with `decoder.as_published`, otherwise StreamPETR's [ours]."""
    sparse = isinstance(config, SparseBEVConfig) and config.decoder.as_published
    return SPARSE_BEV_NOISE if sparse else STREAM_PETR_NOISE
