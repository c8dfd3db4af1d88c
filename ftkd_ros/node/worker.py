# SPDX-License-Identifier: Apache-2.0
"""The inference thread: newest round in, detections out, and an account of what was lost and why.

The mailbox holds one round. A detector that is slower than the cameras then works on the newest images, not
on a growing queue of old ones, and the overwritten rounds are counted.
"""

import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from ftkd_core.errors import UserError
from ftkd_core.percentiles import summarize
from ftkd_core.types import CameraRound, ObjectList
from ftkd_ros.sync.assembly import BuiltRound
from ftkd_ros.sync.matcher import MatchedRound

T = TypeVar("T")

_HISTORY: Final = 10_000
_SLACK_M: Final = 5.0


class StreamDetector(Protocol):
    """What the worker needs of `ftkd_core.runtime.detector.Detector`."""

    def step(self, camera_round: CameraRound) -> ObjectList: ...

    def reset(self) -> None: ...


class Mailbox(Generic[T]):
    """Holds one item, the newest. `put` never waits; `get` waits for an item or for `close`."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._item: T | None = None
        self._closed = False

    def put(self, item: T) -> bool:
        """Leave an item; True when it replaced one that nobody had fetched (or the box is closed)."""
        with self._condition:
            if self._closed:
                return True
            overwritten = self._item is not None
            self._item = item
            self._condition.notify()
            return overwritten

    def get(self) -> T | None:
        """The item, waiting for one; None once the box is closed."""
        with self._condition:
            self._condition.wait_for(lambda: self._item is not None or self._closed)
            item, self._item = self._item, None
            return None if self._closed else item

    def close(self) -> int:
        """Wake whoever waits; gives the number of items (0 or 1) nobody fetched."""
        with self._condition:
            left = 0 if self._closed or self._item is None else 1
            self._closed = True
            self._item = None
            self._condition.notify_all()
            return left


@dataclass
class StreamMonitor:
    """Decides when the detector's memory no longer belongs to what the cameras see.

    A few dropped rounds are no reason (`max_gap_s`): the memory is aligned by pose and time. A pose that no
    vehicle could have reached since the last round (`max_speed_m_s`, and 5 m of slack for localisation) is: a
    new scene.
    """

    max_gap_s: float = 3.0
    max_speed_m_s: float = 70.0
    _stamp_ns: int | None = None
    _position: NDArray[np.float64] | None = None

    def cause_of_reset(self, camera_round: CameraRound) -> str | None:
        """`backward_time`, `gap`, `pose_jump`, or None where the round continues the stream (or starts the
        first).
        """
        stamp_ns, position = camera_round.reference_stamp_ns, camera_round.global_from_ego[:3, 3]
        last_ns, last_position = self._stamp_ns, self._position
        self._stamp_ns, self._position = stamp_ns, position.copy()
        if last_ns is None or last_position is None:
            return None
        elapsed_s = (stamp_ns - last_ns) * 1e-9
        if elapsed_s < 0:
            return "backward_time"
        if elapsed_s > self.max_gap_s:
            return "gap"
        if np.linalg.norm(position - last_position) > self.max_speed_m_s * elapsed_s + _SLACK_M:
            return "pose_jump"
        return None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One detected round, as it goes to the publishers."""

    objects: ObjectList
    camera_round: CameraRound
    faults: dict[str, str]
    stage_ms: dict[str, float]
    submitted_s: float


@dataclass
class WorkerStatistics:
    """Counters and times since the start. in = detected + dropped + those under way."""

    rounds_in: int = 0
    rounds_detected: int = 0
    partial_rounds: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    resets: Counter[str] = field(default_factory=Counter)
    camera_faults: Counter[str] = field(default_factory=Counter)
    last_fault: dict[str, tuple[str, float]] = field(default_factory=dict)
    latency_ms: deque[float] = field(default_factory=lambda: deque(maxlen=_HISTORY))
    stage_ms: dict[str, deque[float]] = field(default_factory=dict)

    @property
    def rounds_dropped(self) -> int:
        return sum(self.dropped.values())

    def add_times(self, stage_ms: dict[str, float], latency_ms: float) -> None:
        """Note the milliseconds of one round by stage, and from its submission to its publication."""
        for stage, duration in stage_ms.items():
            self.stage_ms.setdefault(stage, deque(maxlen=_HISTORY)).append(duration)
        self.latency_ms.append(latency_ms)

    def summary(self) -> dict[str, Any]:
        """Plain numbers for JSON: counters, latency and stage percentiles in ms (None before the first
        round).
        """
        return {
            "rounds_in": self.rounds_in,
            "rounds_detected": self.rounds_detected,
            "rounds_dropped": self.rounds_dropped,
            "partial_rounds": self.partial_rounds,
            "dropped": dict(self.dropped),
            "resets": dict(self.resets),
            "camera_faults": dict(self.camera_faults),
            "latency_ms": percentiles(self.latency_ms),
            "stage_ms": {stage: percentiles(durations) for stage, durations in self.stage_ms.items()},
        }


def percentiles(values: deque[float]) -> dict[str, float | None]:
    """p50 and p95, rounded to microseconds; None for no values."""
    summary = summarize(list(values)).as_dict()
    return {"p50": summary["p50"], "p95": summary["p95"]}


class DetectionWorker:
    """Runs build -> detector.step -> publish on a thread of its own.

    build: matched round -> BuiltRound, UserError where it cannot be used. publish: called on the worker's
    thread with every Outcome. report: gets one sentence when something goes wrong. Whatever fails, the thread
    goes on.
    """

    def __init__(
        self,
        detector: StreamDetector,
        build: Callable[[MatchedRound[Any]], BuiltRound],
        publish: Callable[[Outcome], None],
        report: Callable[[str], None],
        monitor: StreamMonitor | None = None,
    ) -> None:
        self.statistics = WorkerStatistics()
        self._detector = detector
        self._build = build
        self._publish = publish
        self._report = report
        self._monitor = monitor if monitor is not None else StreamMonitor()
        self._mailbox: Mailbox[tuple[MatchedRound[Any], float]] = Mailbox()
        self._lock = threading.Lock()
        self._pending_reset: str | None = None
        self._thread = threading.Thread(target=self._run, name="inference", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self, timeout_s: float = 10.0) -> None:
        """Finish the round under way, drop the waiting one, end the thread."""
        with self._lock:
            self.statistics.dropped["shutdown"] += self._mailbox.close()
        if self._thread.is_alive():
            self._thread.join(timeout_s)
            if self._thread.is_alive():
                self._report(f"the inference thread did not finish within {timeout_s:g} s")

    def submit(self, matched: MatchedRound[Any]) -> None:
        """Hand over a round; returns at once, whatever the thread is doing."""
        with self._lock:
            self.statistics.rounds_in += 1
            self.statistics.partial_rounds += not matched.is_complete
            if matched.after_jump:
                self._pending_reset = "backward_time"
            if self._mailbox.put((matched, time.perf_counter())):
                self.statistics.dropped["overwritten"] += 1

    def request_reset(self, cause: str) -> None:
        """Forget the stream before the next round; `cause` is counted then."""
        with self._lock:
            self._pending_reset = cause

    def _run(self) -> None:
        while (item := self._mailbox.get()) is not None:
            matched, submitted_s = item
            try:
                self._process(matched, submitted_s)
            except UserError as error:
                self._drop("unusable", f"round dropped: {error}")
            except Exception as error:
                self._drop("failed", f"round dropped: {type(error).__name__}: {error}")

    def _process(self, matched: MatchedRound[Any], submitted_s: float) -> None:
        built = self._build(matched)
        self._note_faults(built.faults)
        self._reset_if_needed(built.camera_round)
        started = time.perf_counter()
        objects = self._detector.step(built.camera_round)
        detected = time.perf_counter()
        stage_ms = {
            "wait": (started - submitted_s) * 1e3 - sum(built.stage_ms.values()),
            **built.stage_ms,
            "detect": (detected - started) * 1e3,
        }
        self._publish(
            Outcome(
                objects=objects,
                camera_round=built.camera_round,
                faults=built.faults,
                stage_ms=stage_ms,
                submitted_s=submitted_s,
            )
        )
        finished = time.perf_counter()
        with self._lock:
            self.statistics.rounds_detected += 1
            self.statistics.add_times(
                {**stage_ms, "publish": (finished - detected) * 1e3}, (finished - submitted_s) * 1e3
            )

    def _reset_if_needed(self, camera_round: CameraRound) -> None:
        found = self._monitor.cause_of_reset(camera_round)
        with self._lock:
            cause, self._pending_reset = self._pending_reset or found, None
            if cause is not None:
                self.statistics.resets[cause] += 1
        if cause is not None:
            self._detector.reset()

    def _note_faults(self, faults: dict[str, str]) -> None:
        for camera, reason in faults.items():
            with self._lock:
                self.statistics.camera_faults[camera] += 1
                self.statistics.last_fault[camera] = (reason, time.monotonic())
            self._report(f"camera masked: {reason}")

    def _drop(self, cause: str, sentence: str) -> None:
        with self._lock:
            self.statistics.dropped[cause] += 1
        self._report(sentence)

    def snapshot(self) -> dict[str, Any]:
        """The statistics' summary, consistent in itself."""
        with self._lock:
            return self.statistics.summary()

    def recent_faults(self, within_s: float) -> dict[str, str]:
        """Why cameras were masked during the last `within_s` seconds, by camera."""
        with self._lock:
            faults = dict(self.statistics.last_fault)
        now = time.monotonic()
        return {camera: reason for camera, (reason, when) in faults.items() if now - when <= within_s}
