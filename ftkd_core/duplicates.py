# SPDX-License-Identifier: Apache-2.0
"""Suppression of boxes that lie on a stronger one, for displays."""

import numpy as np
from numpy.typing import NDArray

from ftkd_core.types import ObjectList


def without_duplicates(objects: ObjectList) -> ObjectList:
    """Return the objects without those whose centre lies in the footprint of a stronger one of any class.

    Footprints are rectangles seen from above; boxes that do not overlap in height are kept. Published
    detections are not changed: the metrics rank such boxes themselves.
    """
    order = np.argsort(-objects.scores, kind="stable")
    inside = _centre_inside(objects.boxes[order])
    keep = np.ones(len(order), dtype=bool)
    for index in range(len(order)):
        keep[index] = not (inside[:index, index] & keep[:index]).any()
    return objects.select(np.sort(order[keep]))


def _centre_inside(boxes: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return (M, M): whether the centre of box j is in the footprint of box i and both overlap in height."""
    offset = boxes[None, :, :3] - boxes[:, None, :3]
    cos, sin = np.cos(boxes[:, 6])[:, None], np.sin(boxes[:, 6])[:, None]
    along = np.abs(cos * offset[..., 0] + sin * offset[..., 1])
    across = np.abs(cos * offset[..., 1] - sin * offset[..., 0])
    heights = (boxes[:, None, 5] + boxes[None, :, 5]) / 2
    inside: NDArray[np.bool_] = (
        (along <= boxes[:, None, 3] / 2)
        & (across <= boxes[:, None, 4] / 2)
        & (np.abs(offset[..., 2]) < heights)
    )
    return inside
