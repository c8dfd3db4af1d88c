# SPDX-License-Identifier: Apache-2.0
"""Annotated objects of a scene and their states at one time."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ftkd_core.data.synthetic.mesh import Mesh
from ftkd_core.data.synthetic.paths import Motion


class ActorStates(NamedTuple):
    """All actors at one time: instance (M,) int64, labels (M,) int64 as indices into CLASS_NAMES,
    boxes_global (M, 9) float64, attributes (nuScenes names, "" for none)."""

    instance: NDArray[np.int64]
    labels: NDArray[np.int64]
    boxes_global: NDArray[np.float64]
    attributes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Actor:
    """One annotated object: class name, size (length, width, height), motion, body, and whether it has a
    rider."""

    name: str
    size: tuple[float, float, float]
    motion: Motion
    body: Mesh
    rider: bool = False

    def attribute(self, speed: float) -> str:
        """Return the nuScenes attribute at a speed in m/s."""
        if self.name in ("barrier", "traffic_cone"):
            return ""
        if self.name == "pedestrian":
            return "pedestrian.moving" if speed > 0.1 else "pedestrian.standing"
        if self.name in ("motorcycle", "bicycle"):
            return "cycle.with_rider" if self.rider else "cycle.without_rider"
        parked = max(s for _, s in self.motion.speed.knots) == 0.0
        return "vehicle.moving" if speed > 0.1 else "vehicle.parked" if parked else "vehicle.stopped"
