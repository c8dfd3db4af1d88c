# SPDX-License-Identifier: Apache-2.0
"""What is known of one frame: its transforms from its parent over time, or the one that always holds.

Stamps are int nanoseconds; a request at 0 means the latest.
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
    """Nanoseconds as text in seconds, with nothing lost."""
    return f"{stamp // 10**9}.{stamp % 10**9:09d}"


class StaticCache:
    """A transform that holds at any time; the last one that was set."""

    def __init__(self) -> None:
        self._sample: Sample | None = None

    def insert(self, sample: Sample) -> bool:
        """Replace the transform; always accepted."""
        self._sample = sample._replace(stamp=0)
        return True

    def at(self, stamp: int) -> Sample:
        """The transform, at whatever time."""
        if self._sample is None:
            raise ExtrapolationException(f"no transform is in the buffer at {seconds(stamp)} s")
        return self._sample._replace(stamp=stamp)

    def latest(self) -> Sample | None:
        """The transform with stamp 0: it puts no bound on the latest common time."""
        return self._sample

    def clear(self) -> None:
        """Nothing: what is static survives a clearing of the buffer, as in tf2."""

    def span(self) -> tuple[int, int, int]:
        """Oldest stamp, latest stamp, number of samples."""
        return 0, 0, 1


class TimeCache:
    """Transforms of the last `cache_time` nanoseconds, interpolated between stamps, never extrapolated."""

    def __init__(self, cache_time: int) -> None:
        self._cache_time = cache_time
        self._stamps: list[int] = []  # ascending; equal stamps in the order of their insertion
        self._samples: list[Sample] = []

    def insert(self, sample: Sample) -> bool:
        """Store a sample; False if it is older than the latest by more than the cache time.

        Samples out of date are dropped before that, measured from the latest sample until now: as in tf2, the
        newest one outdates others only when the next arrives.
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
        """The transform at `stamp`; raises ExtrapolationException where the samples don't enclose it."""
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
            # The frame changed its parent in between: the older tree holds until the newer sample.
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
        """The newest sample, or None."""
        return self._samples[-1] if self._samples else None

    def clear(self) -> None:
        """Forget every sample."""
        self._stamps.clear()
        self._samples.clear()

    def span(self) -> tuple[int, int, int]:
        """Oldest stamp, latest stamp, number of samples; zeros when empty."""
        if not self._stamps:
            return 0, 0, 0
        return self._stamps[0], self._stamps[-1], len(self._stamps)
