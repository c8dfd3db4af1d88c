# SPDX-License-Identifier: Apache-2.0
"""The ten nuScenes detection classes: order, attributes, and the ranges of the official metrics."""

from collections.abc import Sequence
from typing import Final

from ftkd_core.errors import UserError

CLASS_NAMES: Final[tuple[str, ...]] = (
    "car",
    "truck",
    "construction_vehicle",
    "bus",
    "trailer",
    "barrier",
    "motorcycle",
    "bicycle",
    "pedestrian",
    "traffic_cone",
)
"""Class order of datasets and of our checkpoints (that of StreamPETR and SparseBEV)."""

SYMMETRIC: Final = ("barrier",)
"""Classes that look the same from behind; the devkit scores their heading modulo half a turn."""

HEADINGLESS: Final = ("traffic_cone",)
"""Classes whose heading the devkit does not score."""

IMMOBILE: Final = ("barrier", "traffic_cone")
"""Classes that never move; the devkit does not score their velocity."""

CLASS_RANGES: Final[dict[str, float]] = {
    "car": 50.0,
    "truck": 50.0,
    "bus": 50.0,
    "trailer": 50.0,
    "construction_vehicle": 50.0,
    "pedestrian": 40.0,
    "motorcycle": 40.0,
    "bicycle": 40.0,
    "traffic_cone": 30.0,
    "barrier": 30.0,
}
"""Maximum distance in metres from the ego vehicle at which `detection_cvpr_2019` scores a class."""

CAMERA_CHANNELS: Final[tuple[str, ...]] = (
    "CAM_FRONT",
    "CAM_FRONT_RIGHT",
    "CAM_FRONT_LEFT",
    "CAM_BACK",
    "CAM_BACK_LEFT",
    "CAM_BACK_RIGHT",
)
"""Default camera order of models and arrays."""

_MOVING_SPEED_M_S: Final = 0.2


def our_labels(class_names: Sequence[str]) -> list[int]:
    """Return the index in CLASS_NAMES of each class of a model. Raises UserError for an unknown class."""
    unknown = [name for name in class_names if name not in CLASS_NAMES]
    if unknown:
        raise UserError(f"model has class {unknown[0]!r}; expected among {', '.join(CLASS_NAMES)}")
    return [CLASS_NAMES.index(name) for name in class_names]


def attribute_for(class_name: str, speed_m_s: float) -> str:
    """Return the nuScenes attribute of a detection from class and speed, by the rule of public baselines.

    It is "" for classes without attributes (barrier, traffic_cone).
    """
    moving = speed_m_s > _MOVING_SPEED_M_S
    if class_name in ("car", "truck", "construction_vehicle", "trailer"):
        return "vehicle.moving" if moving else "vehicle.parked"
    if class_name == "bus":
        return "vehicle.moving" if moving else "vehicle.stopped"
    if class_name in ("bicycle", "motorcycle"):
        return "cycle.with_rider" if moving else "cycle.without_rider"
    if class_name == "pedestrian":
        return "pedestrian.moving" if moving else "pedestrian.standing"
    if class_name in ("barrier", "traffic_cone"):
        return ""
    raise ValueError(f"unknown class {class_name!r}; expected one of {', '.join(CLASS_NAMES)}")
