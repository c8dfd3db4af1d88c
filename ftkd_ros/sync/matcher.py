# SPDX-License-Identifier: Apache-2.0
"""Messages of N cameras -> rounds, as pure logic (no ROS, no clock of its own).

Cameras of one round are not exposed at the same moment: they follow the lidar sweep, or a trigger chain. So
each camera has a time offset that is subtracted before matching; the true stamps stay in the round, for
geometry. With the offsets removed, the stamps of one round differ by jitter only and rounds are a whole
period apart: a slop of at most 0.4 of the shortest period cannot mix two of them, in whatever order the
messages arrive.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import Final, Generic, TypeVar

M = TypeVar("M")

JUMP_NS: Final = 500_000_000
"""A stamp this far behind the stream is a new stream (a looped bag), not a late message."""
_MISSES_UNTIL_SILENT: Final = 5
_MAX_OPEN: Final = 16
_MAX_STALE: Final = 32


@dataclass(frozen=True, kw_only=True)
class MatchedRound(Generic[M]):
    """One round: messages and true stamps in camera order, None where a camera is missing.

    `after_jump` is True for the first round after the stamps jumped backwards.
    """

    messages: tuple[M | None, ...]
    stamps_ns: tuple[int | None, ...]
    after_jump: bool = False

    @property
    def is_complete(self) -> bool:
        return None not in self.stamps_ns


@dataclass(frozen=True)
class _Arrival(Generic[M]):
    """A message on its way in; `compensated_ns` is its stamp without the camera's offset."""

    camera: int
    stamp_ns: int
    compensated_ns: int
    message: M


@dataclass(eq=False)
class _OpenRound(Generic[M]):
    """A round that still waits for cameras. `center_ns`: compensated stamp of its first message."""

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
    """Groups messages into rounds, oldest first, each message in one round at most.

    A round leaves when it is complete; when every camera it lacks has already sent something newer (it can't
    become complete any more); when all that it lacks have been silent for five rounds; or, masked,
    `deadline_ns` after its first message (`poll`). Rounds of fewer than `min_cameras` are only counted.
    `counts` names everything that was not used.
    """

    num_cameras: int
    slop_ns: int
    deadline_ns: int
    min_cameras: int = 1
    counts: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        if self.num_cameras < 1 or not 1 <= self.min_cameras <= self.num_cameras:
            raise ValueError(
                f"min_cameras {self.min_cameras} of {self.num_cameras} cameras; expected 1 to all of them"
            )
        if self.slop_ns < 0 or self.deadline_ns <= 0:
            raise ValueError(f"slop {self.slop_ns} ns, deadline {self.deadline_ns} ns; expected >= 0 and > 0")
        self.clear()

    def clear(self) -> None:
        """Forget all queues, as after a jump of time; offsets belong to the caller, counts stay."""
        self._open: list[_OpenRound[M]] = []
        self._newest: list[int | None] = [None] * self.num_cameras
        self._suspects: list[_Arrival[M]] = []
        self._stale_left = [0] * self.num_cameras
        self._misses = [0] * self.num_cameras
        self._front_ns: int | None = None  # compensated stamp of the last round that left
        self._after_jump = False

    def add(
        self, camera: int, stamp_ns: int, message: M, now_ns: int, offset_ns: int = 0
    ) -> list[MatchedRound[M]]:
        """Take one message; gives the rounds that are finished by it, oldest first."""
        arrival = _Arrival(camera, stamp_ns, stamp_ns - offset_ns, message)
        if stamp_ns <= 0:
            self.counts["zero_stamp"] += 1
        elif self._is_from_before_jump(arrival):
            self.counts["stale"] += 1
        elif self._jumps_back(arrival):
            return self._suspect(arrival, now_ns)
        else:
            return self._accept(arrival, now_ns)
        return []

    def poll(self, now_ns: int) -> list[MatchedRound[M]]:
        """Rounds whose deadline has passed, masked."""
        return self._release(now_ns)

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
        """Whether a stream may have started anew: this camera is behind its own past and behind the rounds
        that left.

        Behind its own past alone, it had sent a stray stamp from the future; behind the rounds alone, it is
        slow.
        """
        newest = self._newest[arrival.camera]
        behind_itself = newest is not None and arrival.compensated_ns < newest - JUMP_NS
        return behind_itself and (self._front_ns is None or arrival.compensated_ns < self._front_ns - JUMP_NS)

    def _suspect(self, arrival: _Arrival[M], now_ns: int) -> list[MatchedRound[M]]:
        """Believe in a jump when a second camera confirms it: one camera alone has a wrong clock, not a new
        stream.
        """
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

    def _is_from_before_jump(self, arrival: _Arrival[M]) -> bool:
        """Whether a camera that hasn't jumped yet still delivers the end of the old stream (only so many
        messages).
        """
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
        """Everything up to the newest round that need not wait, so that rounds leave in order of time."""
        for waiting in self._open:
            waiting.opened_ns = min(
                waiting.opened_ns, now_ns
            )  # a clock that went back must not stretch the deadline
        # Stray stamps leave by themselves: they must not push out the rounds before them.
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
        return [matched for waiting in leaving if (matched := self._leave(waiting)) is not None]

    def _is_over(self, waiting: _OpenRound[M], now_ns: int) -> bool:
        """Whether nothing more can or may come: all missing cameras are past it, or its deadline is."""
        hopeless = all(self._has_passed(camera, waiting.center_ns) for camera in self._missing(waiting))
        return hopeless or now_ns - waiting.opened_ns >= self.deadline_ns

    def _is_finished(self, waiting: _OpenRound[M], now_ns: int) -> bool:
        if waiting.size < self.min_cameras:
            return False
        silent = all(self._misses[camera] >= _MISSES_UNTIL_SILENT for camera in self._missing(waiting))
        return silent or self._is_over(waiting, now_ns)

    def _missing(self, waiting: _OpenRound[M]) -> list[int]:
        return [camera for camera in range(self.num_cameras) if waiting.lacks(camera)]

    def _has_passed(self, camera: int, center_ns: int) -> bool:
        newest = self._newest[camera]
        return newest is not None and newest > center_ns + self.slop_ns

    def _leave(self, waiting: _OpenRound[M]) -> MatchedRound[M] | None:
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
