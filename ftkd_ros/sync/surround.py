# SPDX-License-Identifier: Apache-2.0
"""SurroundMatcher: offsets, then rounds, for cameras of one rate; pure logic, every call gets the time."""

from collections import Counter, deque
from collections.abc import Sequence
from statistics import median
from typing import Final, Generic, TypeVar

from ftkd_ros.sync.clock_check import ClockCheck
from ftkd_ros.sync.matcher import JUMP_NS, MatchedRound, RoundMatcher
from ftkd_ros.sync.phases import PhaseMonitor
from ftkd_ros.sync.time_offsets import (
    MIN_STAMPS,
    SLOW_NS,
    different_rates,
    estimate_offsets_ns,
    nearest_offset_ns,
    shortest_period_ns,
)

M = TypeVar("M")

SLOP_OF_PERIOD: Final = 0.4
"""Largest slop, as a share of the shortest period, that never mixes two rounds."""
START_UP_NS: Final = 900_000_000
"""Time after the first image at which offsets are estimated without the missing cameras."""
_MAX_WAITING: Final = 16  # messages per camera that are held back at start-up
_HISTORY: Final = 64  # stamps per camera
_CHECK_NS: Final = 500_000_000  # between two checks of slop and offsets
_CHECK_MESSAGES: Final = 8  # images of a camera from which its share of rounds is judged
_MIN_TOGETHER: Final = 0.7  # share of the images of a camera that must be in rounds with most cameras
_GAIN: Final = 0.05  # share of a deviation by which an offset follows
_FREE_RUNNING: Final = 0.25  # movement of the exposures, as a share of the period
_DRIFT_WARNING_NS: Final = 20_000_000
_NOT_CONSTANT: Final = "its stamps have no constant offset to those of the other cameras"
_UNSTABLE_NS: Final = 10_000_000_000  # an offset that needs two corrections within this time is not constant


class SurroundMatcher(Generic[M]):
    """Estimates and tracks time offsets, and matches messages to rounds, oldest first.

    `offsets_ns`: one per camera, or None to estimate them at start-up. Then messages are held back until each
    camera has sent six, one has sent twelve, or 0.9 s have passed; none is lost. Offsets follow the stamps,
    so clocks may drift. An offset that contradicts the stamps, a given one too, is replaced and reported. A
    camera without a constant offset to the others is excluded and counted as `unaligned`; a camera that
    starts later joins after six messages. The slop is limited to 0.4 of the shortest period.
    """

    policy = "surround"

    def __init__(
        self,
        cameras: Sequence[str],
        *,
        slop_ns: int,
        deadline_ns: int,
        offsets_ns: Sequence[int] | None = None,
        min_cameras: int = 1,
        hold_misfit: bool = False,
    ) -> None:
        """`hold_misfit`: at start-up, release nothing if `misfit` is set; see `take_held`."""
        if offsets_ns is not None and len(offsets_ns) != len(cameras):
            raise ValueError(
                f"{len(offsets_ns)} time offsets for {len(cameras)} cameras; expected one per camera, or None"
            )
        self.cameras = tuple(cameras)
        self._matcher: RoundMatcher[M] = RoundMatcher(
            num_cameras=len(self.cameras), slop_ns=slop_ns, deadline_ns=deadline_ns, min_cameras=min_cameras
        )
        self._max_slop_ns = slop_ns
        self._wait_ns = deadline_ns
        self._phases = PhaseMonitor(len(self.cameras))
        self._offsets_ns: list[float | None] = (
            [None] * len(self.cameras) if offsets_ns is None else list(offsets_ns)
        )
        self._first_offsets_ns = list(self._offsets_ns)
        self._given = offsets_ns is not None
        self._contradicted: set[int] = set()
        self.is_started = self._given
        self._hold_misfit = hold_misfit
        self._clocks = ClockCheck(len(self.cameras))
        self._history: list[deque[int]] = [deque(maxlen=_HISTORY) for _ in self.cameras]
        self._waiting: list[tuple[int, int, M, int]] = []
        self._first_now_ns: int | None = None
        self._checked_ns: int | None = None
        self._added = [0] * len(self.cameras)
        self._together = [0] * len(self.cameras)
        self._corrected_ns: list[int | None] = [None] * len(self.cameras)
        self._events: list[str] = []
        self._limited_slop = False
        self.misfit: str | None = None
        self.received: Counter[str] = Counter()

    @property
    def counts(self) -> Counter[str]:
        """Numbers of rounds (complete, partial, too_few_cameras) and of unused messages by cause."""
        return self._matcher.counts

    @property
    def offsets_ns(self) -> tuple[int | None, ...]:
        """Time offset of each camera; None if unknown."""
        return tuple(None if offset is None else round(offset) for offset in self._offsets_ns)

    @property
    def slop_ns(self) -> int:
        """Slop in use: the given one, limited to 0.4 of the shortest period."""
        return self._matcher.slop_ns

    @property
    def held(self) -> int:
        """Number of messages that are held back."""
        return len(self._waiting) + self._matcher.held

    def clear(self) -> None:
        """Clear the queues, as after a jump of the clock; known offsets are kept."""
        self._matcher.clear()
        self._waiting.clear()
        self._clocks.clear()
        self._phases.clear()
        self._first_now_ns = self._checked_ns = None
        self._added, self._together = [0] * len(self.cameras), [0] * len(self.cameras)
        for history in self._history:
            history.clear()

    def add(self, camera: int, stamp_ns: int, message: M, now_ns: int) -> list[MatchedRound[M]]:
        """Add a message of camera index `camera`, exposed at `stamp_ns` and received at `now_ns`."""
        self.received[self.cameras[camera]] += 1
        unusable = self._clocks.add(camera, stamp_ns, now_ns)
        if unusable is not None:
            self.counts[unusable] += 1
            return self.poll(now_ns)
        self._store_stamp(camera, stamp_ns)
        if not self.is_started:
            self._waiting.append((camera, stamp_ns, message, now_ns))
            if len(self._waiting) > _MAX_WAITING * len(self.cameras):
                self._waiting.pop(0)
                self.counts["start_up"] += 1
            self._first_now_ns = now_ns if self._first_now_ns is None else min(self._first_now_ns, now_ns)
            return self._start(now_ns) if self._can_start(now_ns) else []
        self._added[camera] += 1
        self._phases.add(camera, now_ns - stamp_ns)
        self._check(now_ns)
        if self._offsets_ns[camera] is None:
            self._join_late(camera, now_ns)
        offset = self._offsets_ns[camera]
        if offset is None:
            self.counts["unaligned"] += 1
            return self.poll(now_ns)
        return self._track(self._matcher.add(camera, stamp_ns, message, now_ns, round(offset)), now_ns)

    def poll(self, now_ns: int) -> list[MatchedRound[M]]:
        """Return incomplete rounds whose deadline has passed, and all rounds at the end of the start-up."""
        if not self.is_started:
            return self._start(now_ns) if self._waiting and self._can_start(now_ns) else []
        return self._track(self._matcher.poll(now_ns), now_ns)

    def take_events(self) -> list[str]:
        """Return sentences about decisions and corrections and clear them; the node logs them."""
        events, self._events = self._events, []
        return events

    def take_held(self) -> list[tuple[int, int, M, int]]:
        """Return and clear the messages (camera, stamp, message, arrival) that are held back at start-up."""
        waiting, self._waiting = self._waiting, []
        return waiting

    def fault(self, camera: int) -> str | None:
        """Return why the images of a camera are in no round; None if they are or if it sends nothing."""
        fault = self._clocks.fault(camera)
        is_excluded = self.is_started and self._offsets_ns[camera] is None
        if fault is None and is_excluded and len(self._history[camera]) >= MIN_STAMPS:
            return f"{_NOT_CONSTANT}; check trigger, rate and clock, or set sync_policy: anchor"
        return fault

    def warnings(self) -> list[str]:
        """Return warnings about clocks and offsets."""
        found = []
        for camera, name in enumerate(self.cameras):
            fault = self.fault(camera)
            if fault is not None:
                found.append(f"{name}: {fault}; the camera is left out")
            drift_ns = self._drift_ns(camera)
            if drift_ns is not None and abs(drift_ns) > _DRIFT_WARNING_NS:
                found.append(
                    f"{name}: its stamps have drifted by {drift_ns / 1e6:.0f} ms against the other cameras; "
                    "synchronise the clocks (PTP or NTP)"
                )
        if self._contradicted:
            names = ", ".join(self.cameras[camera] for camera in sorted(self._contradicted))
            found.append(
                f"parameter camera_time_offsets_s contradicts the stamps of {names}; measured offsets are "
                "used; remove the parameter or correct it"
            )
        return found

    # -- start-up --------------------------------------------------------------------------------------------

    def _store_stamp(self, camera: int, stamp_ns: int) -> None:
        history = self._history[camera]
        if history and abs(stamp_ns - history[-1]) > 20 * JUMP_NS:
            history.clear()  # a new stream: its period may differ
        if not history or stamp_ns > history[-1]:
            history.append(stamp_ns)
        elif stamp_ns < history[-1] - JUMP_NS:
            history.clear()
            history.append(stamp_ns)

    def _can_start(self, now_ns: int) -> bool:
        counts = [len(history) for history in self._history]
        assert self._first_now_ns is not None
        if min(counts) >= MIN_STAMPS or max(counts) >= 2 * MIN_STAMPS:
            return True
        return max(counts) >= 2 and not 0 <= now_ns - self._first_now_ns < START_UP_NS

    def _start(self, now_ns: int) -> list[MatchedRound[M]]:
        self._offsets_ns = [*estimate_offsets_ns([list(history) for history in self._history], 2)]
        self._first_offsets_ns = list(self._offsets_ns)
        self.is_started = True
        self._limit_slop()
        self._extend_deadline()
        self.misfit = self._misfit_at_start()
        if self.misfit is not None and self._hold_misfit:
            return []
        self._events.append(f"time offsets: {self._describe_offsets()}")
        rounds: list[MatchedRound[M]] = []
        for camera, stamp_ns, message, arrival_ns in self.take_held():
            offset = self._offsets_ns[camera]
            if offset is None:
                self.counts["unaligned"] += 1
            else:
                rounds += self._matcher.add(camera, stamp_ns, message, arrival_ns, round(offset))
        return self._track(rounds + self._matcher.poll(now_ns), now_ns)

    def _misfit_at_start(self) -> str | None:
        different = different_rates(self.cameras, self._history)
        if different is not None:
            return different
        for camera, name in enumerate(self.cameras):
            if self._offsets_ns[camera] is None and len(self._history[camera]) >= MIN_STAMPS:
                return f"the stamps of {name} have no constant offset to those of the other cameras"
        return None

    def _describe_offsets(self) -> str:
        return ", ".join(
            f"{name} {'unknown' if offset is None else f'{offset / 1e6:.1f} ms'}"
            for name, offset in zip(self.cameras, self._offsets_ns, strict=True)
        )

    # -- tracking and checks ---------------------------------------------------------------------------------

    def _track(self, rounds: list[MatchedRound[M]], now_ns: int) -> list[MatchedRound[M]]:
        """Let the offsets follow the stamps of released rounds; count images in rounds with most cameras."""
        alive = sum(self._clocks.is_alive(camera, now_ns) for camera in range(len(self.cameras)))
        for matched in rounds:
            compensated = {
                camera: stamp_ns - offset
                for camera, (stamp_ns, offset) in enumerate(
                    zip(matched.stamps_ns, self._offsets_ns, strict=True)
                )
                if stamp_ns is not None and offset is not None
            }
            if not compensated:
                continue
            base = min(compensated.values())  # differences keep the precision of floats
            center = median(stamp - base for stamp in compensated.values())
            for camera, stamp in compensated.items():
                self._together[camera] += 2 * len(compensated) > alive
                offset = self._offsets_ns[camera]
                if len(compensated) > 1 and offset is not None:
                    self._offsets_ns[camera] = offset + _GAIN * (stamp - base - center)
        return rounds

    def _check(self, now_ns: int) -> None:
        """At most every 0.5 s: limit the slop, and correct offsets of cameras that are seldom in rounds."""
        if self._checked_ns is not None and 0 <= now_ns - self._checked_ns < _CHECK_NS:
            return
        self._checked_ns = now_ns
        self._limit_slop()
        self._extend_deadline()
        self._find_free_running()
        apart = []
        for camera, added in enumerate(self._added):
            if added < _CHECK_MESSAGES:
                continue
            settled = added - self._matcher.held_of(camera) - 1  # 1: the message that is being added
            if self._offsets_ns[camera] is not None and self._together[camera] < _MIN_TOGETHER * settled:
                apart.append(camera)
            self._added[camera] = self._together[camera] = 0
        if apart:
            self._correct(apart, now_ns)

    def _correct(self, apart: Sequence[int], now_ns: int) -> None:
        reference = self._reference(now_ns, apart)
        if reference is None:
            return
        for camera in apart:
            if camera == reference:
                continue
            before = self._offsets_ns[camera]
            after = self._measure_offset(camera, reference, MIN_STAMPS, apart)
            if before is not None and after is not None and abs(after - before) <= self.slop_ns / 2:
                continue
            self._set_corrected(camera, before, after, now_ns)

    def _measure_offset(
        self, camera: int, reference: int, min_stamps: int, apart: Sequence[int]
    ) -> float | None:
        """Return the offset of a camera that fits its stamps and is nearest to the others, except `apart`."""
        others = [
            round(offset)
            for index, offset in enumerate(self._offsets_ns)
            if offset is not None and index != camera and (index == reference or index not in apart)
        ]
        stamps = list(self._history[camera])[-2 * MIN_STAMPS :]
        base = round(self._offsets_ns[reference] or 0)
        return nearest_offset_ns(self._history[reference], base, stamps, others, min_stamps)

    def _set_corrected(self, camera: int, before: float | None, after: float | None, now_ns: int) -> None:
        name, last = self.cameras[camera], self._corrected_ns[camera]
        self._corrected_ns[camera] = now_ns
        self._offsets_ns[camera] = self._first_offsets_ns[camera] = after
        self._phases.clear()
        if self._given:
            self._contradicted.add(camera)
        if after is None or (last is not None and now_ns - last < _UNSTABLE_NS):
            different = different_rates(self.cameras, self._history)
            self.misfit = (
                different or f"the stamps of {name} have no constant offset to those of the other cameras"
            )
        if after is not None:
            was = "unknown" if before is None else f"{before / 1e6:.1f} ms"
            self._events.append(
                f"{name}: time offset {was} does not fit its stamps; {after / 1e6:.1f} ms is used from now on"
            )

    def _reference(self, now_ns: int, apart: Sequence[int]) -> int | None:
        """Return a living camera with an offset to which others are aligned, preferably not in `apart`."""
        known = [
            camera
            for camera, offset in enumerate(self._offsets_ns)
            if offset is not None
            and self._clocks.is_alive(camera, now_ns)
            and self._clocks.fault(camera) is None
        ]
        return min(known, key=lambda c: (c in apart, -len(self._history[c]), c), default=None)

    def _limit_slop(self) -> None:
        periods = [period for history in self._history if (period := shortest_period_ns(history)) is not None]
        if not periods:
            return
        limit = round(1.1 * SLOP_OF_PERIOD * min(periods))  # 10 %: jitter shortens the measured period
        self._matcher.slop_ns = min(self._max_slop_ns, limit)
        if limit < self._max_slop_ns and not self._limited_slop:
            self._limited_slop = True
            self._events.append(
                f"sync_slop_s of {self._max_slop_ns / 1e6:.0f} ms is limited to {limit / 1e6:.0f} ms, "
                f"because the shortest period is {min(periods) / 1e6:.0f} ms"
            )

    def _extend_deadline(self) -> None:
        """Leave at least half of the deadline after the exposure of the last camera."""
        known = [offset for offset in self._offsets_ns if offset is not None]
        span_ns = round(max(known) - min(known)) if known else 0
        self._matcher.deadline_ns = max(self._wait_ns, span_ns + self._wait_ns // 2)

    def _find_free_running(self) -> None:
        """Set `misfit` if exposures move against each other: the offset changes but the lag does not."""
        moved = self._phases.moved_ns(self._offsets_ns)
        for camera, shift in moved.items():
            period = shortest_period_ns(self._history[camera])
            if period is not None and abs(shift) > _FREE_RUNNING * period:
                self.misfit = (
                    f"the exposures of {self.cameras[camera]} have moved by {shift / 1e6:.0f} ms against "
                    "those of the other cameras, so there is no common trigger"
                )

    def _join_late(self, camera: int, now_ns: int) -> None:
        history = self._history[camera]
        reference = self._reference(now_ns, ())
        if reference is None:  # no other camera is left: this one sets the time
            self._offsets_ns[camera] = self._first_offsets_ns[camera] = 0
            return
        base = self._history[reference]
        slow = len(base) > 1 and base[-1] - base[-2] > SLOW_NS
        offset = self._measure_offset(camera, reference, 2 if slow else MIN_STAMPS, ())
        if offset is not None:
            self._offsets_ns[camera] = self._first_offsets_ns[camera] = offset
            self._events.append(f"{self.cameras[camera]}: joined with time offset {offset / 1e6:.1f} ms")
        elif len(history) >= 2 * MIN_STAMPS:
            self.misfit = self._misfit_at_start()

    def _drift_ns(self, camera: int) -> float | None:
        """Return by how much an offset has changed since it was estimated, against the median of all."""
        changes = {
            index: now - first
            for index, (now, first) in enumerate(zip(self._offsets_ns, self._first_offsets_ns, strict=True))
            if now is not None and first is not None
        }
        return changes[camera] - median(changes.values()) if camera in changes else None
