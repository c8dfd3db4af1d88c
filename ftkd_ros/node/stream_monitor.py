# SPDX-License-Identifier: Apache-2.0
"""Detection of a new stream: when the detector's memory no longer fits the incoming rounds."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ftkd_core.types import CameraRound

_SLACK_M: Final = 5.0  # allowance for localisation errors


@dataclass
class StreamMonitor:
    """Decides per round whether the detector's memory must be reset.

    A few dropped rounds need no reset, because the memory is aligned by pose and time. A gap longer than
    `max_gap_s` and a pose change faster than `max_speed_m_s` (plus 5 m) start a new stream.
    """

    max_gap_s: float = 3.0
    max_speed_m_s: float = 70.0
    explanation: str = ""
    """Figures of the last cause, for the log."""
    _stamp_ns: int | None = None
    _position: NDArray[np.float64] | None = None

    def state(self) -> tuple[int | None, list[float] | None]:
        """Return stamp and position of the last round, as JSON values."""
        return self._stamp_ns, None if self._position is None else self._position.tolist()

    def restore(self, state: Sequence[Any]) -> None:
        """Continue from a state."""
        self._stamp_ns, position = state
        self._position = None if position is None else np.asarray(position)

    def cause_of_reset(self, camera_round: CameraRound) -> str | None:
        """Return `backward_time`, `gap` or `pose_jump`; None if the round continues the stream or is the
        first.
        """
        stamp_ns, position = camera_round.reference_stamp_ns, camera_round.global_from_ego[:3, 3]
        last_ns, last_position = self._stamp_ns, self._position
        self._stamp_ns, self._position = stamp_ns, position.copy()
        if last_ns is None or last_position is None:
            return None
        elapsed_s = (stamp_ns - last_ns) * 1e-9
        distance_m = float(np.linalg.norm(position - last_position))
        if elapsed_s < 0:
            self.explanation = f"the stamp is {-elapsed_s:.3f} s before that of the previous round"
            return "backward_time"
        if elapsed_s > self.max_gap_s:
            self.explanation = f"{elapsed_s:.1f} s without a round (memory_max_gap_s {self.max_gap_s:g})"
            return "gap"
        if distance_m > self.max_speed_m_s * elapsed_s + _SLACK_M:
            self.explanation = (
                f"the vehicle pose changed by {distance_m:.1f} m in {elapsed_s:.2f} s "
                f"(memory_max_speed {self.max_speed_m_s:g} m/s)"
            )
            return "pose_jump"
        return None
