# SPDX-License-Identifier: Apache-2.0
"""Per-camera time offsets, estimated from stamps alone.

The cameras of a rig are exposed at fixed moments after a common trigger. From a few stamps of each camera the
offset to a reference camera is the difference that most pairs of stamps agree on: when the rhythm is
irregular (nuScenes: 50 and 100 ms in turn) only the true one repeats; when it is regular, offsets a whole
period apart agree equally well and the smallest is taken.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np

MIN_STAMPS: Final = 6
"""Stamps of a camera from which an offset can be told; fewer agree by accident."""
_TIE: Final = 0.75
_MIN_SUPPORT: Final = 0.5
_WINDOW_OF_PERIOD: Final = 0.2


def shortest_period_ns(stamps_ns: Sequence[int]) -> int | None:
    """Shortest interval (10th percentile, so that one duplicate does not decide) of ascending stamps; None
    below three.
    """
    intervals = np.diff(np.unique(np.asarray(stamps_ns, dtype=np.int64)))
    if len(intervals) < 2:
        return None
    return int(np.percentile(intervals, 10, method="lower"))


def estimate_offset_ns(reference_ns: Sequence[int], camera_ns: Sequence[int]) -> int | None:
    """Nanoseconds by which a camera's stamps follow the reference camera's; None where they have no common
    rhythm.

    Gaps in either sequence do no harm. None means too few stamps, or a camera with another clock or rate.
    """
    reference = np.unique(np.asarray(reference_ns, dtype=np.int64))
    camera = np.unique(np.asarray(camera_ns, dtype=np.int64))
    if min(len(reference), len(camera)) < MIN_STAMPS:
        return None
    window = int(_WINDOW_OF_PERIOD * min(np.diff(reference).min(), np.diff(camera).min()))
    reach = int(max(np.median(np.diff(reference)), np.median(np.diff(camera))))
    differences = np.sort((camera[:, None] - reference[None, :]).ravel())
    differences = differences[np.abs(differences) <= reach]
    if len(differences) == 0:
        return None
    ends = np.searchsorted(differences, differences + window, side="right")
    support = ends - np.arange(len(differences))
    if support.max() < _MIN_SUPPORT * min(len(reference), len(camera)):
        return None
    starts = np.flatnonzero(support >= _TIE * support.max())
    centers = [int(np.median(differences[start : ends[start]])) for start in starts]
    # Overlapping windows of one cluster all qualify: the best supported near the smallest offset is its
    # middle.
    smallest = min(centers, key=abs)
    near = [(int(support[start]), center) for start, center in zip(starts, centers, strict=True)]
    return max((s, -abs(c), c) for s, c in near if abs(c - smallest) <= window)[2]


def estimate_offsets_ns(stamps_ns: Sequence[Sequence[int]]) -> list[int | None]:
    """Offsets of N cameras to the one with the most stamps (the first of them, with offset 0); None where
    unknown.
    """
    reference = max(range(len(stamps_ns)), key=lambda index: (len(stamps_ns[index]), -index))
    return [
        0 if index == reference else estimate_offset_ns(stamps_ns[reference], stamps)
        for index, stamps in enumerate(stamps_ns)
    ]
