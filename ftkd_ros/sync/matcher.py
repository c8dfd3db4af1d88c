# SPDX-License-Identifier: Apache-2.0
"""Messages of N cameras -> rounds, as pure logic without ROS and without a clock.

The cameras of a round are exposed at different times, because they follow the lidar sweep or a trigger chain.
The matcher subtracts the time offset of each camera; the round keeps the true stamps for the geometry. After
the subtraction, the stamps of a round differ only by jitter, and rounds are a period apart. A slop of at most
0.4 of the shortest period therefore never mixes two rounds, in any order of arrival.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import Final, Generic, TypeVar

M = TypeVar("M")

JUMP_NS: Final = 500_000_000
"""A message this far behind the stream starts a new stream (a looped bag); a smaller distance is a late
message.
"""
_MISSES_UNTIL_LOST: Final = 5  # rounds that a camera must miss in a row to count as lost
_MAX_OPEN: Final = 16  # open rounds
_MAX_STALE: Final = 32  # messages of the previous stream, per camera, that are dropped after a jump


@dataclass(frozen=True, kw_only=True)
class MatchedRound(Generic[M]):
    """One round: messages and true stamps in the order of the cameras; None for a missing camera.

    `after_jump` is True for the first round after the stamps have jumped backwards. `anchor_ns` is the stamp
    of the anchor camera in rounds of `AnchorMatcher`.
    """

    messages: tuple[M | None, ...]
    stamps_ns: tuple[int | None, ...]
    after_jump: bool = False
    anchor_ns: int | None = None

    @property
    def is_complete(self) -> bool:
        return None not in self.stamps_ns


@dataclass(frozen=True)
class _Arrival(Generic[M]):
    """An incoming message; `compensated_ns` is its stamp minus the offset of the camera."""

    camera: int
    stamp_ns: int
    compensated_ns: int
    message: M


@dataclass(eq=False)
class _OpenRound(Generic[M]):
    """A round that waits for cameras; `center_ns` is the compensated stamp of its first message."""

    center_ns: int
    opened_ns: int
    messages: list[M | None]
    stamps_ns: list[int | None]

    def lacks(self, camera: int) -> bool:
        return self.stamps_ns[camera] is None

    @property
    def size(self) -> int:
        return sum(stamp is not None for stamp in self.stamps_ns)


@dataclass
class RoundMatcher(Generic[M]):
    """Groups messages into rounds and returns them oldest first; a message belongs to at most one round.

    A round is released when one of these is true: it is complete; each missing camera has already sent a
    newer message; each missing camera has missed five rounds in a row; `deadline_ns` has passed since its
    first message (see `poll`). Rounds of fewer than `min_cameras` are only counted. `counts` has the unused
    messages by cause.
    """

    num_cameras: int
    slop_ns: int
    deadline_ns: int
    min_cameras: int = 1
    counts: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        if self.num_cameras < 1 or not 1 <= self.min_cameras <= self.num_cameras:
            raise ValueError(
                f"min_cameras {self.min_cameras} of {self.num_cameras} cameras; "
                f"expected 1 to {self.num_cameras}"
            )
        if self.slop_ns < 0 or self.deadline_ns <= 0:
            raise ValueError(f"slop {self.slop_ns} ns, deadline {self.deadline_ns} ns; expected >= 0 and > 0")
        self.clear()

    def clear(self) -> None:
        """Clear all queues, as after a jump of time; counts are kept."""
        self._open: list[_OpenRound[M]] = []
        self._newest: list[int | None] = [None] * self.num_cameras
        self._suspects: list[_Arrival[M]] = []
        self._stale_left = [0] * self.num_cameras
        self._misses = [0] * self.num_cameras
        self._front_ns: int | None = None  # compensated stamp of the last released round
        self._after_jump = False

    def add(
        self, camera: int, stamp_ns: int, message: M, now_ns: int, offset_ns: int = 0
    ) -> list[MatchedRound[M]]:
        """Add one message. Returns the rounds that it completes, oldest first."""
        arrival = _Arrival(camera, stamp_ns, stamp_ns - offset_ns, message)
        if stamp_ns <= 0:
            self.counts["zero_stamp"] += 1
        elif self._is_of_previous_stream(arrival):
            self.counts["stale"] += 1
        elif self._jumps_back(arrival):
            return self._suspect(arrival, now_ns)
        else:
            return self._accept(arrival, now_ns)
        return []

    def poll(self, now_ns: int) -> list[MatchedRound[M]]:
        """Return incomplete rounds whose deadline has passed."""
        return self._release(now_ns)

    @property
    def held(self) -> int:
        """Number of messages in open rounds."""
        return sum(waiting.size for waiting in self._open) + len(self._suspects)

    def held_of(self, camera: int) -> int:
        """Number of messages of one camera in open rounds."""
        return sum(not waiting.lacks(camera) for waiting in self._open)

    def _accept(self, arrival: _Arrival[M], now_ns: int) -> list[MatchedRound[M]]:
        newest = self._newest[arrival.camera]
        if newest is None or arrival.compensated_ns > newest or arrival.compensated_ns < newest - JUMP_NS:
            self._newest[arrival.camera] = arrival.compensated_ns
        if self._front_ns is not None and arrival.compensated_ns <= self._front_ns + self.slop_ns:
            self.counts["late"] += 1
            self._misses[arrival.camera] = 0
            return []
        self._place(arrival, now_ns)
        return self._release(now_ns)

    # -- time jumps ------------------------------------------------------------------------------------------

    def _jumps_back(self, arrival: _Arrival[M]) -> bool:
        """Return True if a camera is behind both its own newest stamp and the released rounds.

        Behind its own stamps only, the camera has sent a wrong stamp in the future. Behind the rounds only,
        it is slow.
        """
        newest = self._newest[arrival.camera]
        behind_itself = newest is not None and arrival.compensated_ns < newest - JUMP_NS
        return behind_itself and (self._front_ns is None or arrival.compensated_ns < self._front_ns - JUMP_NS)

    def _suspect(self, arrival: _Arrival[M], now_ns: int) -> list[MatchedRound[M]]:
        """Accept a jump when a second camera confirms it; a single camera may have a wrong clock."""
        near = [old for old in self._suspects if abs(old.compensated_ns - arrival.compensated_ns) <= JUMP_NS]
        self.counts["late"] += len(self._suspects) - len(near)
        self._suspects = [*near, arrival]
        alive = sum(newest is not None for newest in self._newest)
        if len({suspect.camera for suspect in self._suspects}) < min(2, alive):
            return []
        suspects = self._suspects
        self.counts["backward_jump"] += 1
        self.counts["lost_in_jump"] += sum(waiting.size for waiting in self._open)
        self.clear()
        self._stale_left = [_MAX_STALE] * self.num_cameras
        self._jumped_to_ns = arrival.compensated_ns
        self._after_jump = True
        rounds: list[MatchedRound[M]] = []
        for suspect in suspects:
            self._stale_left[suspect.camera] = 0
            rounds += self._accept(suspect, now_ns)
        return rounds

    def _is_of_previous_stream(self, arrival: _Arrival[M]) -> bool:
        """Return True if a camera still delivers the end of the previous stream (at most 32 messages)."""
        if self._stale_left[arrival.camera] == 0:
            return False
        front = self._front_ns if self._front_ns is not None else self._jumped_to_ns
        if arrival.compensated_ns > front + JUMP_NS:
            self._stale_left[arrival.camera] -= 1
            return True
        self._stale_left[arrival.camera] = 0
        return False

    # -- matching --------------------------------------------------------------------------------------------

    def _place(self, arrival: _Arrival[M], now_ns: int) -> None:
        stamp = arrival.compensated_ns
        near = [waiting for waiting in self._open if abs(stamp - waiting.center_ns) <= self.slop_ns]
        vacant = [waiting for waiting in near if waiting.lacks(arrival.camera)]
        if near and not vacant:
            self.counts["duplicate"] += 1
            return
        if vacant:
            target = min(vacant, key=lambda waiting: abs(stamp - waiting.center_ns))
        else:
            target = _OpenRound(stamp, now_ns, [None] * self.num_cameras, [None] * self.num_cameras)
            self._open.append(target)
            self._open.sort(key=lambda waiting: waiting.center_ns)
        target.messages[arrival.camera] = arrival.message
        target.stamps_ns[arrival.camera] = arrival.stamp_ns

    def _release(self, now_ns: int) -> list[MatchedRound[M]]:
        """Release all rounds up to the newest finished one, so that rounds keep the order of time."""
        for waiting in self._open:  # a clock that jumps back must not extend the deadline
            waiting.opened_ns = min(waiting.opened_ns, now_ns)
        # Rounds of stray stamps are removed first: releasing them would release all earlier rounds.
        strays = [
            waiting
            for waiting in self._open
            if waiting.size < self.min_cameras and self._is_over(waiting, now_ns)
        ]
        for stray in strays:
            self._open.remove(stray)
            self.counts["too_few_cameras"] += 1
        finished = [index for index, waiting in enumerate(self._open) if self._is_finished(waiting, now_ns)]
        last = max([*finished, len(self._open) - _MAX_OPEN - 1])
        leaving, self._open = self._open[: last + 1], self._open[last + 1 :]
        return [matched for waiting in leaving if (matched := self._close(waiting)) is not None]

    def _is_over(self, waiting: _OpenRound[M], now_ns: int) -> bool:
        """Return True if all missing cameras have sent newer messages, or if the deadline has passed."""
        overtaken = all(self._has_passed(camera, waiting.center_ns) for camera in self._missing(waiting))
        return overtaken or now_ns - waiting.opened_ns >= self.deadline_ns

    def _is_finished(self, waiting: _OpenRound[M], now_ns: int) -> bool:
        if waiting.size < self.min_cameras:
            return False
        lost = all(self._misses[camera] >= _MISSES_UNTIL_LOST for camera in self._missing(waiting))
        return lost or self._is_over(waiting, now_ns)

    def _missing(self, waiting: _OpenRound[M]) -> list[int]:
        return [camera for camera in range(self.num_cameras) if waiting.lacks(camera)]

    def _has_passed(self, camera: int, center_ns: int) -> bool:
        newest = self._newest[camera]
        return newest is not None and newest > center_ns + self.slop_ns

    def _close(self, waiting: _OpenRound[M]) -> MatchedRound[M] | None:
        if waiting.size < self.min_cameras:
            self.counts["too_few_cameras"] += 1
            return None
        for camera in range(self.num_cameras):
            self._misses[camera] = self._misses[camera] + 1 if waiting.lacks(camera) else 0
        self._front_ns = waiting.center_ns
        matched = MatchedRound(
            messages=tuple(waiting.messages), stamps_ns=tuple(waiting.stamps_ns), after_jump=self._after_jump
        )
        self._after_jump = False
        self.counts["complete" if matched.is_complete else "partial"] += 1
        return matched
