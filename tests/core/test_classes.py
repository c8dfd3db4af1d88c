# SPDX-License-Identifier: Apache-2.0
"""nuScenes attributes by class and speed."""

import pytest

from ftkd_core.classes import CLASS_NAMES, attribute_for

ATTRIBUTES = {  # at rest, moving: rule of mmdet3d's NuScenesDataset, which public baselines use
    "car": ("vehicle.parked", "vehicle.moving"),
    "truck": ("vehicle.parked", "vehicle.moving"),
    "construction_vehicle": ("vehicle.parked", "vehicle.moving"),
    "bus": ("vehicle.stopped", "vehicle.moving"),
    "trailer": ("vehicle.parked", "vehicle.moving"),
    "barrier": ("", ""),
    "motorcycle": ("cycle.without_rider", "cycle.with_rider"),
    "bicycle": ("cycle.without_rider", "cycle.with_rider"),
    "pedestrian": ("pedestrian.standing", "pedestrian.moving"),
    "traffic_cone": ("", ""),
}


@pytest.mark.parametrize("name", CLASS_NAMES)
def test_class_and_speed_determine_the_attribute(name: str) -> None:
    standing, moving = ATTRIBUTES[name]
    assert attribute_for(name, 0.0) == attribute_for(name, 0.2) == standing
    assert attribute_for(name, 0.21) == attribute_for(name, 15.0) == moving


def test_an_unknown_class_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown class 'lorry'; expected one of car"):
        attribute_for("lorry", 1.0)
