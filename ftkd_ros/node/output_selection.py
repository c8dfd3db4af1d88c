# SPDX-License-Identifier: Apache-2.0
"""Thresholds and range limits of the published detections; without ROS."""

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np

from ftkd_core.classes import CLASS_NAMES
from ftkd_core.types import ObjectList
from ftkd_ros.node.parameters import DetectorParameters


def select_output(
    objects: ObjectList,
    parameters: DetectorParameters,
    recommended: Mapping[str, float] = MappingProxyType({}),
) -> ObjectList:
    """Return the objects above the score threshold of their class and within the range limits.

    `recommended`: thresholds of the weights, used if parameter score_threshold is negative.
    """
    limits = parameters.class_thresholds(recommended)
    thresholds = np.array([limits[name] for name in CLASS_NAMES])
    distance = np.hypot(objects.boxes[:, 0], objects.boxes[:, 1])
    keep = (objects.scores >= thresholds[objects.labels]) & (distance >= parameters.min_range_m)
    if parameters.max_range_m > 0:
        keep &= distance <= parameters.max_range_m
    return objects if keep.all() else objects.select(keep)
