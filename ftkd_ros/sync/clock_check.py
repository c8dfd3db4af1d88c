# SPDX-License-Identifier: Apache-2.0
"""Detection of stamps that cannot be used: zero, frozen, or of another clock than those of the other cameras.

The lag of an image is its time of arrival minus its stamp. The lags of cameras with one clock are similar,
because exposure and transport take similar times. The largest group of cameras with similar lags is right; a
camera outside of it has a wrong clock. A slow drift is followed, because time offsets follow it too. Pure
logic without ROS and without a clock.
"""

from collections import deque
from collections.abc import Sequence
from typing import Final

LIMIT_NS: Final = 500_000_000
"""Lags that differ by more belong to different clocks."""
ALIVE_NS: Final = 2_000_000_000
"""A camera without an image for this long has no vote."""
_MESSAGES: Final = 6  # images in a row that must deviate; a loop of a bag takes one image of each camera
_FOLLOW: Final = 0.02  # share by which the usual shift of a camera follows a slow drift of its clock
_REPEATS: Final = 3  # images in a row with an equal stamp
_SMOOTHED: Final = 3  # number of lags; the smallest counts, because transport only delays

ZERO: Final = "zero_stamp"
FROZEN: Final = "frozen_stamp"
WRONG_CLOCK: Final = "wrong_clock"


class ClockCheck:
    """Judges each image of N cameras by its stamp and its time of arrival."""

    def __init__(self, num_cameras: int) -> None:
        self._cameras = range(num_cameras)
        self.clear()

    def clear(self) -> None:
        """Clear all lags, as after a jump of the clock."""
        num_cameras = len(self._cameras)
        self._lags: list[deque[int]] = [deque(maxlen=_SMOOTHED) for _ in self._cameras]
        self._deviating = [0] * num_cameras
        self._shift_ns = [0] * num_cameras
        self._usual_ns = [0.0] * num_cameras
        self._stamp_ns: list[int | None] = [None] * num_cameras
        self._repeats = [0] * num_cameras
        self._zeros = [0] * num_cameras
        self._arrival_ns: list[int | None] = [None] * num_cameras

    def add(self, camera: int, stamp_ns: int, now_ns: int) -> str | None:
        """Return why an image cannot be used: ZERO, FROZEN or WRONG_CLOCK; None if it can."""
        last_arrival = self._arrival_ns[camera]
        if last_arrival is not None and now_ns < last_arrival:
            self.clear()
        self._arrival_ns[camera] = now_ns
        self._zeros[camera] = self._zeros[camera] + 1 if stamp_ns <= 0 else 0
        if stamp_ns <= 0:
            return ZERO
        self._repeats[camera] = self._repeats[camera] + 1 if stamp_ns == self._stamp_ns[camera] else 0
        self._stamp_ns[camera] = stamp_ns
        if self._repeats[camera] >= _REPEATS:
            return FROZEN
        lags = self._lags[camera]
        lags.append(now_ns - stamp_ns)
        if max(lags) - min(lags) > LIMIT_NS:  # the clock or the transport has changed
            lags.clear()
            lags.append(now_ns - stamp_ns)
        self._shift_ns[camera] = self._lag(camera) - self._common_lag(now_ns)
        change = self._shift_ns[camera] - self._usual_ns[camera]
        deviates = abs(change) > LIMIT_NS
        if not deviates:
            self._usual_ns[camera] += _FOLLOW * change
        self._deviating[camera] = self._deviating[camera] + 1 if deviates else 0
        return WRONG_CLOCK if self._deviating[camera] >= _MESSAGES else None

    def is_alive(self, camera: int, now_ns: int) -> bool:
        """Return True if the camera has sent an image within the last two seconds."""
        arrival = self._arrival_ns[camera]
        return arrival is not None and now_ns - arrival <= ALIVE_NS

    def fault(self, camera: int) -> str | None:
        """Return the fault of the stamps of a camera and what to do; None for usable stamps."""
        if self._zeros[camera] >= _REPEATS:
            return "its stamps are zero; set header.stamp to the time of exposure in the driver"
        if self._repeats[camera] >= _REPEATS:
            return (
                f"its stamp has not changed for {self._repeats[camera] + 1} images; "
                "restart the driver and check header.stamp"
            )
        if self._deviating[camera] >= _MESSAGES:
            shift_s = self._shift_ns[camera] * 1e-9
            side = "behind" if shift_s > 0 else "ahead of"
            return (
                f"its stamps are {abs(shift_s):.1f} s {side} those of the other cameras; "
                "synchronise the clocks (PTP or NTP)"
            )
        return None

    def _lag(self, camera: int) -> int:
        return min(self._lags[camera])

    def _common_lag(self, now_ns: int) -> int:
        """Return the lag that the most living cameras share; of equal groups, the smallest absolute lag."""
        alive = [c for c in self._cameras if self._lags[c] and self.is_alive(c, now_ns)]
        lags = [self._lag(c) for c in alive]
        return max(lags, key=lambda lag: (_group_size(lag, lags), -abs(lag)))


def _group_size(lag: int, lags: Sequence[int]) -> int:
    return sum(abs(other - lag) <= LIMIT_NS for other in lags)
