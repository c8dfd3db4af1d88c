# SPDX-License-Identifier: Apache-2.0
"""Distinguishes drifting clocks from cameras without a common trigger.

Both change the time offsets. If only a clock drifts, the images still arrive together: the lag (arrival minus
stamp) changes against the offset. If the exposures move, the lag is constant. Pure logic.
"""

from collections.abc import Sequence
from statistics import median
from typing import Final

_SMOOTHING: Final = 0.05  # weight of a new lag; averages the jitter of the transport
_SETTLED: Final = 40  # images until the mean of the lags is used


class PhaseMonitor:
    """Compares the change of each time offset with the change of the mean lag."""

    def __init__(self, num_cameras: int) -> None:
        self._num_cameras = num_cameras
        self.clear()

    def clear(self) -> None:
        """Start again, as after a jump of the clock or a corrected offset."""
        self._lags_ns: list[float | None] = [None] * self._num_cameras
        self._counts = [0] * self._num_cameras
        self._start: dict[int, tuple[float, float]] = {}

    def add(self, camera: int, lag_ns: int) -> None:
        """Add the lag of one image."""
        mean = self._lags_ns[camera]
        self._lags_ns[camera] = lag_ns if mean is None else mean + _SMOOTHING * (lag_ns - mean)
        self._counts[camera] += 1

    def moved_ns(self, offsets_ns: Sequence[float | None]) -> dict[int, float]:
        """Return by camera how far its exposures have moved against the median of all cameras."""
        sums = {}
        for camera, offset in enumerate(offsets_ns):
            lag = self._lags_ns[camera]
            if offset is None or lag is None or self._counts[camera] < _SETTLED:
                continue
            offset_start, lag_start = self._start.setdefault(camera, (offset, lag))
            sums[camera] = (offset - offset_start) + (lag - lag_start)
        center = median(sums.values()) if sums else 0.0
        return {camera: total - center for camera, total in sums.items()}
