# SPDX-License-Identifier: Apache-2.0
"""Transforms of one frame relative to its parent: over time, or static.

Stamps are int nanoseconds; stamp 0 selects the latest transform.
"""

from bisect import bisect_right
from typing import NamedTuple

from ._exceptions import ExtrapolationException
from ._rotation import Rigid, interpolate


class Sample(NamedTuple):
    """`parent_from_child` at one time."""

    stamp: int
    parent: str
    transform: Rigid


def seconds(stamp: int) -> str:
    """Format nanoseconds as seconds without rounding."""
    return f"{stamp // 10**9}.{stamp % 10**9:09d}"


class StaticCache:
    """One transform that is valid at any time."""

    def __init__(self) -> None:
        self._sample: Sample | None = None

    def insert(self, sample: Sample) -> bool:
        """Replace the transform; return True."""
        self._sample = sample._replace(stamp=0)
        return True

    def at(self, stamp: int) -> Sample:
        """Return the transform with the given stamp."""
        if self._sample is None:
            raise ExtrapolationException(f"no transform is in the buffer at {seconds(stamp)} s")
        return self._sample._replace(stamp=stamp)

    def latest(self) -> Sample | None:
        """Return the transform with stamp 0, which does not limit the latest common time."""
        return self._sample

    def clear(self) -> None:
        """Do nothing: static transforms are kept when the buffer is cleared, as in tf2."""

    def span(self) -> tuple[int, int, int]:
        """Return the oldest stamp, the latest stamp and the number of samples."""
        return 0, 0, 1


class TimeCache:
    """Transforms of the last `cache_time` nanoseconds, interpolated but never extrapolated."""

    def __init__(self, cache_time: int) -> None:
        self._cache_time = cache_time
        self._stamps: list[int] = []  # ascending; equal stamps in order of insertion
        self._samples: list[Sample] = []

    def insert(self, sample: Sample) -> bool:
        """Store a sample; return False if it is older than the latest by more than the cache time.

        Outdated samples are dropped first, relative to the latest sample before this one. As in tf2, a new
        latest sample therefore outdates others only when the next sample arrives.
        """
        if self._stamps:
            oldest_kept = self._stamps[-1] - self._cache_time
            outdated = next(index for index, stamp in enumerate(self._stamps) if stamp >= oldest_kept)
            del self._stamps[:outdated], self._samples[:outdated]
            if sample.stamp < oldest_kept:
                return False
        position = bisect_right(self._stamps, sample.stamp)
        same_time = position
        while same_time and self._stamps[same_time - 1] == sample.stamp:
            same_time -= 1
            if self._samples[same_time] == sample:
                return True
        self._stamps.insert(position, sample.stamp)
        self._samples.insert(position, sample)
        return True

    def at(self, stamp: int) -> Sample:
        """Return the transform at `stamp`. Raises ExtrapolationException outside the range of the samples."""
        if not self._samples:
            raise ExtrapolationException(f"no transform is in the buffer at {seconds(stamp)} s")
        if stamp == 0 or stamp == self._stamps[-1]:
            return self._samples[-1]
        if stamp == self._stamps[0]:
            return self._samples[0]
        self._refuse_extrapolation(stamp)
        newer_index = bisect_right(self._stamps, stamp)
        older, newer = self._samples[newer_index - 1], self._samples[newer_index]
        if older.parent != newer.parent:
            # The parent changed between the samples: the older one is valid until the newer one.
            return older._replace(stamp=stamp)
        ratio = (stamp - older.stamp) / (newer.stamp - older.stamp)
        return Sample(stamp, older.parent, interpolate(older.transform, newer.transform, ratio))

    def _refuse_extrapolation(self, stamp: int) -> None:
        first, last = self._stamps[0], self._stamps[-1]
        if first <= stamp <= last:
            return
        if len(self._stamps) == 1:
            known = f"extrapolation, and only {seconds(first)} s"
        elif stamp > last:
            known = f"extrapolation into the future, and nothing after {seconds(last)} s"
        else:
            known = f"extrapolation into the past, and nothing before {seconds(first)} s"
        raise ExtrapolationException(f"a transform at {seconds(stamp)} s would need {known} is in the buffer")

    def latest(self) -> Sample | None:
        """Return the latest sample, or None."""
        return self._samples[-1] if self._samples else None

    def clear(self) -> None:
        """Delete all samples."""
        self._stamps.clear()
        self._samples.clear()

    def span(self) -> tuple[int, int, int]:
        """Return the oldest stamp, the latest stamp and the number of samples; zeros if empty."""
        if not self._stamps:
            return 0, 0, 0
        return self._stamps[0], self._stamps[-1], len(self._stamps)
