# SPDX-License-Identifier: Apache-2.0
"""SurroundSynchronizer: a message_filters filter that gives rounds of N cameras.

`SurroundMatcher` is the logic (offsets, then rounds), free of ROS; `SurroundSynchronizer` puts it behind the
API of message_filters. Stock ApproximateTimeSynchronizer on nuScenes stamps mixes two rounds in up to 83 % of
its sets and stops when one camera stops (docs/explanation/synchronisation-and-time.md); this filter
does neither.
"""

import threading
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Any, Final, Generic, TypeVar

import message_filters

from ftkd_ros.convert.from_ros import stamp_to_ns
from ftkd_ros.sync.matcher import JUMP_NS, MatchedRound, RoundMatcher
from ftkd_ros.sync.time_offsets import MIN_STAMPS, estimate_offset_ns, estimate_offsets_ns, shortest_period_ns

M = TypeVar("M")

SLOP_OF_PERIOD: Final = 0.4
"""Largest slop, as a share of the shortest period, for which two rounds cannot be mixed."""
_PATIENCE_NS: Final = 3_500_000_000
_HISTORY: Final = 64


class SurroundMatcher(Generic[M]):
    """Time offsets, then rounds: `add` every message, `poll` now and then; both give finished rounds, oldest
    first.

    `offsets_ns`: one a camera, or None to estimate them at start-up: messages wait until each camera has sent
    six (or 3.5 s of stamps have passed), then all of them are matched, none is lost. A camera that has no
    common rhythm with the others (another clock) stays out and is counted as `unaligned`; one that starts
    later joins after six messages.
    """

    def __init__(
        self,
        cameras: Sequence[str],
        *,
        slop_ns: int,
        deadline_ns: int,
        offsets_ns: Sequence[int] | None = None,
        min_cameras: int = 1,
    ) -> None:
        if offsets_ns is not None and len(offsets_ns) != len(cameras):
            raise ValueError(
                f"{len(offsets_ns)} time offsets for {len(cameras)} cameras; expected one each, or none"
            )
        self.cameras = tuple(cameras)
        self._matcher: RoundMatcher[M] = RoundMatcher(
            num_cameras=len(self.cameras), slop_ns=slop_ns, deadline_ns=deadline_ns, min_cameras=min_cameras
        )
        self._offsets_ns: list[int | None] = (
            [None] * len(self.cameras) if offsets_ns is None else list(offsets_ns)
        )
        self._reference: int | None = None
        self._history: list[deque[int]] = [deque(maxlen=_HISTORY) for _ in self.cameras]
        self._waiting: list[tuple[int, int, M, int]] = []
        self.received: Counter[str] = Counter()

    @property
    def counts(self) -> Counter[str]:
        """Rounds (complete, partial, too_few_cameras) and messages that were not used, by cause."""
        return self._matcher.counts

    @property
    def offsets_ns(self) -> tuple[int | None, ...]:
        """Time offset of each camera in use, None where not known (yet)."""
        return tuple(self._offsets_ns)

    def clear(self) -> None:
        """Rebuild the queues, as after a jump of the clock; known offsets stay."""
        self._matcher.clear()
        self._waiting.clear()
        for history in self._history:
            history.clear()

    def add(self, camera: int, stamp_ns: int, message: M, now_ns: int) -> list[MatchedRound[M]]:
        """Take a message of camera number `camera`, exposed at `stamp_ns`, received at `now_ns` (any steady
        clock).
        """
        self.received[self.cameras[camera]] += 1
        if stamp_ns > 0:
            self._remember(camera, stamp_ns)
        offset = self._offsets_ns[camera]
        if offset is not None or stamp_ns <= 0:
            return self._matcher.add(camera, stamp_ns, message, now_ns, offset or 0)
        if self._reference is None:
            self._waiting.append((camera, stamp_ns, message, now_ns))
            return self._estimate(now_ns) if self._can_estimate() else []
        self._join_late(camera)
        offset = self._offsets_ns[camera]
        if offset is None:
            self.counts["unaligned"] += 1
            return []
        return self._matcher.add(camera, stamp_ns, message, now_ns, offset)

    def poll(self, now_ns: int) -> list[MatchedRound[M]]:
        """Masked rounds whose deadline has passed."""
        return self._matcher.poll(now_ns)

    def warnings(self) -> list[str]:
        """Sentences on bounds that are broken, for the operator."""
        periods = [period for history in self._history if (period := shortest_period_ns(history)) is not None]
        limit = SLOP_OF_PERIOD * min(periods) if periods else None
        slop = self._matcher.slop_ns
        found = []
        if (
            limit is not None and slop > 1.1 * limit
        ):  # jitter makes the shortest period look shorter than it is
            found.append(
                f"sync slop of {slop / 1e6:.0f} ms is more than {SLOP_OF_PERIOD} of the shortest period "
                f"({min(periods) / 1e6:.0f} ms): rounds may be mixed; set it to {limit / 1e6:.0f} ms or less"
            )
        if self._reference is not None:
            out = [
                name for name, offset in zip(self.cameras, self._offsets_ns, strict=True) if offset is None
            ]
            found += [
                f"{name}: its stamps have no common rhythm with {self.cameras[self._reference]}; "
                "it is left out until they do (is its clock synchronised?)"
                for name in out
                if self.received[name] >= MIN_STAMPS
            ]
        return found

    def _remember(self, camera: int, stamp_ns: int) -> None:
        history = self._history[camera]
        if history and abs(stamp_ns - history[-1]) > 20 * JUMP_NS:
            history.clear()  # another stream: its stamps say nothing about the rhythm of this one
        if not history or stamp_ns > history[-1]:
            history.append(stamp_ns)
        elif stamp_ns < history[-1] - JUMP_NS:
            history.clear()
            history.append(stamp_ns)

    def _can_estimate(self) -> bool:
        counts = [len(history) for history in self._history]
        longest = max(history[-1] - history[0] for history in self._history if history)
        return min(counts) >= MIN_STAMPS or (max(counts) >= MIN_STAMPS and longest >= _PATIENCE_NS)

    def _estimate(self, now_ns: int) -> list[MatchedRound[M]]:
        self._offsets_ns = estimate_offsets_ns([list(history) for history in self._history])
        self._reference = self._offsets_ns.index(0)
        waiting, self._waiting = self._waiting, []
        rounds: list[MatchedRound[M]] = []
        for camera, stamp_ns, message, _ in waiting:
            offset = self._offsets_ns[camera]
            if offset is None:
                self.counts["unaligned"] += 1
            else:
                rounds += self._matcher.add(camera, stamp_ns, message, now_ns, offset)
        return rounds

    def _join_late(self, camera: int) -> None:
        assert self._reference is not None
        self._offsets_ns[camera] = estimate_offset_ns(self._history[self._reference], self._history[camera])


class SurroundSynchronizer(message_filters.SimpleFilter):
    """Filter over N camera filters; its callbacks get one `MatchedRound` of messages.

    Composes like the stock synchronizers: `SurroundSynchronizer([Subscriber(...), ...], ...)`, then
    `registerCallback`. Call `poll` from a timer (10 ms) so that partial rounds leave at their deadline.
    `now_ns` reads the clock that the deadline is counted in. Messages without a header are an error of the
    caller; whatever goes wrong in a callback is given to `on_error` and counted, because an exception in a
    subscription would end the executor.
    """

    def __init__(
        self,
        filters: Sequence[Any],
        matcher: SurroundMatcher[Any],
        *,
        now_ns: Callable[[], int],
        on_error: Callable[[Exception], None],
    ) -> None:
        super().__init__()
        if len(filters) != len(matcher.cameras):
            raise ValueError(f"{len(filters)} filters for {len(matcher.cameras)} cameras; expected one each")
        self.matcher = matcher
        self._now_ns = now_ns
        self._on_error = on_error
        self._lock = threading.Lock()
        self.connectInput(filters)

    def connectInput(self, filters: Sequence[Any]) -> None:  # noqa: N802 (the name message_filters uses)
        """Listen to the filters, in camera order."""
        self.input_connections = [
            camera_filter.registerCallback(self.add, index) for index, camera_filter in enumerate(filters)
        ]

    def add(self, message: Any, camera: int) -> None:
        """Take a message; passes on the rounds it finishes."""
        with self._lock:
            rounds = self.matcher.add(camera, stamp_to_ns(message.header.stamp), message, self._now_ns())
        self._signal(rounds)

    def poll(self) -> None:
        """Pass on the rounds whose deadline has passed."""
        with self._lock:
            rounds = self.matcher.poll(self._now_ns())
        self._signal(rounds)

    def clear(self) -> None:
        """Rebuild the queues, as after a jump of the clock."""
        with self._lock:
            self.matcher.clear()

    def _signal(self, rounds: Sequence[MatchedRound[Any]]) -> None:
        """Outside the lock: a callback that fails or calls back must not leave the filter locked."""
        for matched in rounds:
            try:
                self.signalMessage(matched)
            except Exception as error:
                self.matcher.counts["callback_errors"] += 1
                self._on_error(error)
