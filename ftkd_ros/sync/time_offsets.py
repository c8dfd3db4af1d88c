# SPDX-License-Identifier: Apache-2.0
"""Estimation of the time offset of each camera from stamps.

The cameras of a rig are exposed at fixed offsets after a common trigger. The offset of a camera is the most
frequent difference between its stamps and those of a reference camera. If the period alternates (nuScenes: 50
and 100 ms), only the true offset repeats. If the period is constant, offsets that differ by a period are
equally frequent, and the smallest is selected.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

MIN_STAMPS: Final = 6
"""Number of stamps per camera for a reliable offset; fewer may agree by chance."""
_SAME_RATE: Final = 1.3  # ratio of the shortest periods from which two cameras have different rates
_FEWEST: Final = 2  # stamps for a first guess
_TIE: Final = 0.75  # offsets with this share of the best support compete
_MIN_SUPPORT: Final = 0.5  # pairs that must agree, as a share of the stamps
_WINDOW_OF_PERIOD: Final = 0.2  # tolerance between agreeing pairs, as a share of the shortest interval


def shortest_period_ns(stamps_ns: Sequence[int]) -> int | None:
    """Return the shortest interval between stamps; None for fewer than three.

    It is the 10th percentile of the intervals, so that a single outlier has no effect.
    """
    intervals = np.diff(np.unique(np.asarray(stamps_ns, dtype=np.int64)))
    if len(intervals) < 2:
        return None
    return int(np.percentile(intervals, 10, method="lower"))


def different_rates(cameras: Sequence[str], stamps_ns: Sequence[Sequence[int]]) -> str | None:
    """Return a sentence that names the fastest and the slowest camera; None if all have about one rate."""
    periods = {
        name: period
        for name, stamps in zip(cameras, stamps_ns, strict=True)
        if (period := shortest_period_ns(stamps)) is not None
    }
    if not periods:
        return None
    fastest, slowest = min(periods, key=periods.__getitem__), max(periods, key=periods.__getitem__)
    if periods[slowest] < _SAME_RATE * periods[fastest]:
        return None
    return (
        f"{fastest} sends an image every {periods[fastest] / 1e6:.0f} ms and {slowest} every "
        f"{periods[slowest] / 1e6:.0f} ms"
    )


def estimate_offset_ns(
    reference_ns: Sequence[int], camera_ns: Sequence[int], min_stamps: int = MIN_STAMPS
) -> int | None:
    """Return the nanoseconds by which a camera's stamps follow those of the reference camera.

    Gaps in the sequences are allowed, and only the time that both sequences cover is used. None means fewer
    than `min_stamps` (at least two) stamps, or a camera with another clock or rate.
    """
    reference = np.unique(np.asarray(reference_ns, dtype=np.int64))
    camera = np.unique(np.asarray(camera_ns, dtype=np.int64))
    least = max(min_stamps, _FEWEST)
    if min(len(reference), len(camera)) < least:
        return None
    reach = int(max(np.median(np.diff(reference)), np.median(np.diff(camera))))
    reference, camera = _overlap(reference, camera, reach), _overlap(camera, reference, reach)
    if min(len(reference), len(camera)) < least:
        return None
    window = int(_WINDOW_OF_PERIOD * min(np.diff(reference).min(), np.diff(camera).min()))
    differences = np.sort((camera[:, None] - reference[None, :]).ravel())
    differences = differences[np.abs(differences) <= reach]
    if len(differences) == 0:
        return None
    ends = np.searchsorted(differences, differences + window, side="right")
    support = ends - np.arange(len(differences))
    if support.max() < max(_FEWEST, _MIN_SUPPORT * min(len(reference), len(camera))):
        return None
    starts = np.flatnonzero(support >= _TIE * support.max())
    centers = [int(np.median(differences[start : ends[start]])) for start in starts]
    # All overlapping windows of a cluster qualify; the one with the most pairs is at its middle.
    smallest = min(centers, key=abs)
    near = [(int(support[start]), center) for start, center in zip(starts, centers, strict=True)]
    return max((s, -abs(c), c) for s, c in near if abs(c - smallest) <= window)[2]


def estimate_offsets_ns(stamps_ns: Sequence[Sequence[int]], min_stamps: int = MIN_STAMPS) -> list[int | None]:
    """Return the offsets of N cameras to the first camera with the most stamps; None if unknown."""
    reference = max(range(len(stamps_ns)), key=lambda index: (len(stamps_ns[index]), -index))
    return [
        0 if index == reference else estimate_offset_ns(stamps_ns[reference], stamps, min_stamps)
        for index, stamps in enumerate(stamps_ns)
    ]


def _overlap(stamps: NDArray[np.int64], other: NDArray[np.int64], reach: int) -> NDArray[np.int64]:
    """Return the stamps within the time range of `other`, extended by `reach`."""
    if len(other) == 0:
        return stamps[:0]
    inside: NDArray[np.bool_] = (stamps >= other[0] - reach) & (stamps <= other[-1] + reach)
    return stamps[inside]
