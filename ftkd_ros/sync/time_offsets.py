# SPDX-License-Identifier: Apache-2.0
"""Estimation of the time offset of each camera from stamps.

The cameras of a rig are exposed at fixed offsets after a common trigger. The offset of a camera is the most
frequent difference between its stamps and those of a reference camera. If the period alternates (nuScenes: 50
and 100 ms), only the true offset repeats. If the period is constant, offsets that differ by a period are
equally frequent. Then the offsets of all cameras are selected together, so that the exposures of a round take
the least time. One camera alone does not decide: 0.5 and -0.5 of a period are equally likely.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Final

import numpy as np
from numpy.typing import NDArray

MIN_STAMPS: Final = 6
"""Number of stamps per camera for a reliable offset; fewer may agree by chance."""
SLOW_NS: Final = 150_000_000
"""Period from which an offset is guessed from few images and corrected later."""
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
    """Return a sentence that names the fastest and the slowest camera; None if all have about one rate.

    Both the shortest and the median interval must differ: a delayed image makes two short intervals, and the
    median of an alternating trigger is one of two intervals.
    """
    periods = {
        name: (period, int(np.median(np.diff(np.unique(np.asarray(stamps, dtype=np.int64))))))
        for name, stamps in zip(cameras, stamps_ns, strict=True)
        if (period := shortest_period_ns(stamps)) is not None
    }
    if not periods:
        return None
    fastest, slowest = min(periods, key=periods.__getitem__), max(periods, key=periods.__getitem__)
    if any(slow < _SAME_RATE * fast for fast, slow in zip(periods[fastest], periods[slowest], strict=True)):
        return None
    return (
        f"{fastest} sends an image every {periods[fastest][0] / 1e6:.0f} ms and {slowest} every "
        f"{periods[slowest][0] / 1e6:.0f} ms"
    )


def offset_candidates_ns(
    reference_ns: Sequence[int], camera_ns: Sequence[int], min_stamps: int = MIN_STAMPS
) -> list[int]:
    """Return the possible offsets of a camera: nanoseconds by which its stamps follow the reference camera.

    Gaps in the sequences are allowed, and only the time that both sequences cover is used. The list is empty
    for fewer than `min_stamps` (at least two) stamps, and for a camera with another clock or rate.
    """
    reference = np.unique(np.asarray(reference_ns, dtype=np.int64))
    camera = np.unique(np.asarray(camera_ns, dtype=np.int64))
    least = max(min_stamps, _FEWEST)
    if min(len(reference), len(camera)) < least:
        return []
    reach = int(max(np.median(np.diff(reference)), np.median(np.diff(camera))))
    reference, camera = _overlap(reference, camera, reach), _overlap(camera, reference, reach)
    if min(len(reference), len(camera)) < least:
        return []
    window = int(_WINDOW_OF_PERIOD * min(np.diff(reference).min(), np.diff(camera).min()))
    differences = np.sort((camera[:, None] - reference[None, :]).ravel())
    differences = differences[np.abs(differences) <= reach]
    if len(differences) == 0:
        return []
    ends = np.searchsorted(differences, differences + window, side="right")
    support = ends - np.arange(len(differences))
    if support.max() < max(_FEWEST, _MIN_SUPPORT * min(len(reference), len(camera))):
        return []
    starts = np.flatnonzero(support >= _TIE * support.max())
    return _strongest(
        [(int(support[start]), int(np.median(differences[start : ends[start]]))) for start in starts], window
    )


def choose_offsets_ns(candidates_ns: Sequence[Sequence[int]]) -> list[int | None]:
    """Return one candidate per camera so that all are within the shortest time; None without a candidate.

    Of equally short selections, the one with the smallest absolute offsets is returned.
    """
    known = [camera for camera, candidates in enumerate(candidates_ns) if candidates]
    starts = sorted({candidate for camera in known for candidate in candidates_ns[camera]})
    best: tuple[int, int, dict[int, int]] | None = None
    for start in starts:
        after = [[c for c in candidates_ns[camera] if c >= start] for camera in known]
        if not all(after):
            break
        chosen = {camera: min(candidates) for camera, candidates in zip(known, after, strict=True)}
        ranked = (max(chosen.values()) - start, sum(abs(c) for c in chosen.values()), chosen)
        best = ranked if best is None or ranked[:2] < best[:2] else best
    selected = {} if best is None else best[2]
    return [selected.get(camera) for camera in range(len(candidates_ns))]


def estimate_offsets_ns(stamps_ns: Sequence[Sequence[int]], min_stamps: int = MIN_STAMPS) -> list[int | None]:
    """Return the offsets of N cameras to the first camera with the most stamps; None if unknown.

    With `min_stamps` of two, the period of slow cameras is assumed to be constant, and one stamp is enough.
    """
    reference = max(range(len(stamps_ns)), key=lambda index: (len(stamps_ns[index]), -index))
    candidates = [offset_candidates_ns(stamps_ns[reference], stamps, min_stamps) for stamps in stamps_ns]
    intervals = [later - stamp for stamps in stamps_ns for stamp, later in pairwise(stamps)]
    period_ns = min((interval for interval in intervals if interval > 0), default=0)
    if min_stamps <= _FEWEST and period_ns > SLOW_NS:
        for own, stamps in zip(candidates, stamps_ns, strict=True):
            if len(stamps) == 1:
                own += [stamps[0] - stamp for stamp in stamps_ns[reference]]
            own += [offset + turn * period_ns for offset in own for turn in (-1, 1)]
    candidates[reference] = [0]
    return choose_offsets_ns(candidates)


def nearest_offset_ns(
    reference_ns: Sequence[int],
    base_ns: int,
    camera_ns: Sequence[int],
    others_ns: Sequence[int],
    min_stamps: int = MIN_STAMPS,
) -> int | None:
    """Return the offset of one more camera that keeps all within the shortest time; None if unknown.

    `base_ns` is the offset of the reference camera, `others_ns` are the known offsets.
    """
    own = [base_ns + found for found in offset_candidates_ns(reference_ns, camera_ns, min_stamps)]
    return choose_offsets_ns([own, *([other] for other in others_ns)])[0]


def estimate_offset_ns(
    reference_ns: Sequence[int], camera_ns: Sequence[int], min_stamps: int = MIN_STAMPS
) -> int | None:
    """Return the smallest possible offset of a camera to a reference camera; None if there is none."""
    return min(offset_candidates_ns(reference_ns, camera_ns, min_stamps), key=abs, default=None)


def _strongest(windows: Sequence[tuple[int, int]], width: int) -> list[int]:
    """Return the center of the window (support, center) with the most pairs in each cluster of windows."""
    centers: list[int] = []
    for _, center in sorted(windows, key=lambda window: (-window[0], abs(window[1]))):
        if all(abs(center - other) > width for other in centers):
            centers.append(center)
    return centers


def _overlap(stamps: NDArray[np.int64], other: NDArray[np.int64], reach: int) -> NDArray[np.int64]:
    """Return the stamps within the time range of `other`, extended by `reach`."""
    if len(other) == 0:
        return stamps[:0]
    inside: NDArray[np.bool_] = (stamps >= other[0] - reach) & (stamps <= other[-1] + reach)
    return stamps[inside]
