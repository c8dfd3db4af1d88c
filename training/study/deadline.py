# SPDX-License-Identifier: Apache-2.0
"""The time limit of one call of the experiment command."""

import time
from collections.abc import Callable


class OutOfTime(Exception):  # noqa: N818  (not an error: the same command resumes)
    """The time limit of the call has passed."""


class Deadline:
    """A time limit in minutes from now on; None for no limit. `clock` returns seconds."""

    def __init__(self, minutes: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self.minutes, self._clock = minutes, clock
        self._began = clock()

    def remaining(self) -> float | None:
        """Return the seconds that are left, at least 0; None for no limit. Raise OutOfTime if none is
        left."""
        if self.minutes is None:
            return None
        left = 60 * self.minutes - (self._clock() - self._began)
        if left <= 0:
            raise OutOfTime(f"--minutes {self.minutes:g} are over")
        return left
