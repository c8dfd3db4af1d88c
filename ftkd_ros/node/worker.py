# SPDX-License-Identifier: Apache-2.0
"""The inference thread: takes the newest round, runs the detector, publishes, and counts lost rounds.

A detector that is slower than the cameras processes the newest images instead of a growing queue; overwritten
rounds are counted.
"""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ftkd_core.errors import UserError
from ftkd_core.types import CameraRound, ObjectList
from ftkd_ros.node.failures import fatal_reason
from ftkd_ros.node.statistics import RecentRounds, RoundRecord, WorkerStatistics
from ftkd_ros.node.stream_monitor import StreamMonitor
from ftkd_ros.node.waiting import RoundQueue
from ftkd_ros.sync.assembly import BuiltRound
from ftkd_ros.sync.matcher import MatchedRound


class StreamDetector(Protocol):
    """The part of `ftkd_core.runtime.detector.Detector` that the worker uses."""

    @property
    def faults(self) -> dict[str, str]: ...

    @property
    def warnings(self) -> list[str]: ...

    def step(self, camera_round: CameraRound) -> ObjectList: ...

    def reset(self) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One detected round, as passed to the publishers; submitted_s is a time of `time.perf_counter`."""

    objects: ObjectList
    camera_round: CameraRound
    faults: dict[str, str]
    stage_ms: dict[str, float]
    submitted_s: float


class DetectionWorker:
    """Runs build -> detector.step -> publish on its own thread.

    build: matched round -> BuiltRound; raises UserError for an unusable round. publish: called on the
    worker's thread with every Outcome. report: called with one sentence per problem. on_reset: called with
    one sentence per memory reset. on_failure: called once with one sentence if the detector cannot go on
    (`failures.fatal_reason`); `failure` holds it, and all later rounds are dropped. on_record: called with
    the times of each detected round. clock_ns: clock of header.stamp, for the latency. is_ready: whether the
    transforms of a round have arrived; a round waits for them up to `wait_s`. Errors of a round do not stop
    the thread.
    """

    def __init__(
        self,
        detector: StreamDetector,
        build: Callable[[MatchedRound[Any]], BuiltRound],
        publish: Callable[[Outcome], None],
        report: Callable[[str], None],
        monitor: StreamMonitor | None = None,
        *,
        cameras: Sequence[str] = (),
        on_reset: Callable[[str], None] | None = None,
        on_failure: Callable[[str], None] | None = None,
        on_record: Callable[[RoundRecord], None] = lambda _: None,
        clock_ns: Callable[[], int] | None = None,
        is_ready: Callable[[MatchedRound[Any]], bool] = lambda _: True,
        wait_s: float = 0.0,
    ) -> None:
        self.statistics = WorkerStatistics()
        self._detector = detector
        self._build = build
        self._publish = publish
        self._report = report
        self._monitor = monitor if monitor is not None else StreamMonitor()
        self._cameras = tuple(cameras)
        self._on_reset = on_reset
        self._on_failure = on_failure
        self.failure: str | None = None
        self._on_record = on_record
        self._clock_ns = clock_ns
        self._queue: RoundQueue[tuple[MatchedRound[Any], float]] = RoundQueue(
            lambda item: is_ready(item[0]), wait_s
        )
        self._lock = threading.Lock()
        self._pending_reset: str | None = None
        self._thread = threading.Thread(target=self._run, name="inference", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self, timeout_s: float = 10.0) -> None:
        """Finish the round in progress, drop the waiting one and end the thread."""
        with self._lock:
            self.statistics.dropped["shutdown"] += self._queue.close()
        if self._thread.is_alive():
            self._thread.join(timeout_s)
            if self._thread.is_alive():
                self._report(f"the inference thread did not finish within {timeout_s:g} s")

    def submit(self, matched: MatchedRound[Any]) -> None:
        """Put a round into the queue; returns immediately."""
        with self._lock:
            self.statistics.rounds_in += 1
            self.statistics.partial_rounds += not matched.is_complete
            if matched.after_jump:
                self._pending_reset = "backward_time"
            self._count_overwritten(self._queue.put((matched, time.perf_counter())))

    @property
    def is_behind(self) -> bool:
        """Whether a round waits while another one is processed, because the detector is slower than the
        cameras, or whether it has failed."""
        return self._queue.has_ready or self.failure is not None

    def request_reset(self, cause: str) -> None:
        """Reset the detector before the next round and count the reset under `cause`."""
        with self._lock:
            self._pending_reset = cause

    def _run(self) -> None:
        while (taken := self._queue.get()) is not None:
            (matched, submitted_s), overwritten = taken
            with self._lock:
                self._count_overwritten(overwritten)
            if self.failure is not None:
                self._drop("failed", f"round dropped: {self.failure}")
                continue
            try:
                self._process(matched, submitted_s)
            except UserError as error:
                self._drop("unusable", f"round dropped: {error}")
            except Exception as error:
                self._drop("failed", f"round dropped: {type(error).__name__}: {error}")

    def _count_overwritten(self, count: int) -> None:
        reason = "the detector is slower than the cameras, so a newer round replaced it"
        for _ in range(count):
            self.statistics.dropped["overwritten"] += 1
            self.statistics.add_record(RoundRecord(time_s=time.monotonic(), dropped=reason))

    def _process(self, matched: MatchedRound[Any], submitted_s: float) -> None:
        built = self._build(matched)
        self._count_faults(built.faults)
        self._reset_if_needed(built.camera_round)
        started = time.perf_counter()
        objects = self._step(built.camera_round)
        detected = time.perf_counter()
        masked = {c: why for c, why in self._detector.faults.items() if c not in built.faults}
        self._count_faults(masked, report=False)  # the detector logs them once
        faults = built.faults | masked
        stage_ms = {
            "wait": (started - submitted_s) * 1e3 - sum(built.stage_ms.values()),
            **built.stage_ms,
            "detect": (detected - started) * 1e3,
        }
        self._publish(
            Outcome(
                objects=objects,
                camera_round=built.camera_round,
                faults=faults,
                stage_ms=stage_ms,
                submitted_s=submitted_s,
            )
        )
        finished = time.perf_counter()
        stage_ms["publish"] = (finished - detected) * 1e3
        record = RoundRecord(
            time_s=time.monotonic(),
            missing=self._missing(matched, faults),
            latency_ms=(finished - submitted_s) * 1e3,
            stamp_latency_ms=self._age_ms(built.camera_round.reference_stamp_ns),
            stage_ms=stage_ms,
        )
        with self._lock:
            self.statistics.rounds_detected += 1
            self.statistics.add_times(stage_ms, record.latency_ms, record.stamp_latency_ms)
            self.statistics.add_record(record)
        self._on_record(record)

    def _step(self, camera_round: CameraRound) -> ObjectList:
        """Run the detector; stop detecting after an error that no later round can survive."""
        try:
            return self._detector.step(camera_round)
        except Exception as error:
            self.failure = None if isinstance(error, UserError) else fatal_reason(error)
            if self.failure is not None and self._on_failure is not None:
                self._on_failure(self.failure)
            raise

    def _missing(self, matched: MatchedRound[Any], faults: dict[str, str]) -> tuple[str, ...]:
        stamps = zip(self._cameras, matched.stamps_ns, strict=False)
        return tuple(camera for camera, stamp in stamps if stamp is None or camera in faults)

    def _age_ms(self, stamp_ns: int) -> float | None:
        return None if self._clock_ns is None else (self._clock_ns() - stamp_ns) * 1e-6

    def _reset_if_needed(self, camera_round: CameraRound) -> None:
        found = self._monitor.cause_of_reset(camera_round)
        with self._lock:
            cause, self._pending_reset = self._pending_reset or found, None
            if cause is not None:
                self.statistics.resets[cause] += 1
        if cause is not None:
            self._detector.reset()
            if self._on_reset is not None:
                detail = self._monitor.explanation if cause == found else ""
                self._on_reset(f"memory reset: {cause}{f', {detail}' if detail else ''}")

    def _count_faults(self, faults: dict[str, str], *, report: bool = True) -> None:
        for camera, reason in faults.items():
            with self._lock:
                self.statistics.camera_faults[camera] += 1
                self.statistics.last_fault[camera] = (reason, time.monotonic())
            if report:
                self._report(f"camera masked: {reason}")

    def _drop(self, cause: str, sentence: str) -> None:
        with self._lock:
            self.statistics.dropped[cause] += 1
            reason = sentence.removeprefix("round dropped: ")
            self.statistics.add_record(RoundRecord(time_s=time.monotonic(), dropped=reason))
        self._report(sentence)

    def snapshot(self) -> dict[str, Any]:
        """Return a consistent summary of the statistics."""
        with self._lock:
            return self.statistics.summary()

    def recent(self, window_s: float) -> RecentRounds:
        """Return what happened to the rounds of the last `window_s` seconds."""
        with self._lock:
            return self.statistics.recent(self._cameras, time.monotonic(), window_s)

    @property
    def warnings(self) -> list[str]:
        """What the detector says of the rig as a whole."""
        return self._detector.warnings

    def recent_faults(self, within_s: float) -> dict[str, str]:
        """Return by camera why it was masked during the last `within_s` seconds."""
        with self._lock:
            faults = dict(self.statistics.last_fault)
        now = time.monotonic()
        return {camera: reason for camera, (reason, time_s) in faults.items() if now - time_s <= within_s}
