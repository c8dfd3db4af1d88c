# SPDX-License-Identifier: Apache-2.0
"""Counters and timings of the detection worker: since the start, and over a recent window."""

from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from ftkd_core.percentiles import summarize

_HISTORY: Final = 10_000


_RECORDS: Final = 2_000  # rounds: 33 s at 60 Hz


@dataclass(frozen=True, kw_only=True)
class RoundRecord:
    """One round: end time (monotonic), names of missing cameras, or why it was dropped; times if detected.

    `stamp_latency_ms` is the time of publication minus header.stamp, in the clock of the node.
    """

    time_s: float
    missing: tuple[str, ...] = ()
    dropped: str | None = None
    latency_ms: float = 0.0
    stamp_latency_ms: float | None = None
    stage_ms: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class RecentRounds:
    """What happened to the rounds of a recent window; shares are 0 to 1, None without a round.

    `last_partial` and `last_drop` are reasons; `silent_s` is the time since the last publication, None before
    the first. `used` is the share of detected rounds by camera. `times_ms`: percentiles by name, among them
    `latency` (last image to publication) and `stamp` (header.stamp to publication).
    """

    detected: int
    dropped: int
    partial: int
    last_partial: str
    last_drop: str
    silent_s: float | None
    used: dict[str, float | None]
    times_ms: dict[str, dict[str, float | None]]

    @property
    def partial_share(self) -> float:
        return self.partial / self.detected if self.detected else 0.0

    @property
    def dropped_share(self) -> float:
        return self.dropped / (self.detected + self.dropped) if self.detected + self.dropped else 0.0


@dataclass
class WorkerStatistics:
    """Counters and timings since the start; rounds_in = detected + dropped + rounds in progress."""

    rounds_in: int = 0
    rounds_detected: int = 0
    partial_rounds: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    resets: Counter[str] = field(default_factory=Counter)
    camera_faults: Counter[str] = field(default_factory=Counter)
    last_fault: dict[str, tuple[str, float]] = field(default_factory=dict)
    latency_ms: deque[float] = field(default_factory=lambda: deque(maxlen=_HISTORY))
    stamp_latency_ms: deque[float] = field(default_factory=lambda: deque(maxlen=_HISTORY))
    stage_ms: dict[str, deque[float]] = field(default_factory=dict)
    records: deque[RoundRecord] = field(default_factory=lambda: deque(maxlen=_RECORDS))
    last_published_s: float | None = None
    last_drop: str = ""

    @property
    def rounds_dropped(self) -> int:
        return sum(self.dropped.values())

    def add_times(
        self, stage_ms: dict[str, float], latency_ms: float, stamp_latency_ms: float | None = None
    ) -> None:
        """Store the milliseconds of one round: per stage, from submission to publication, and from
        header.stamp to publication."""
        if stamp_latency_ms is not None:
            self.stamp_latency_ms.append(stamp_latency_ms)
        for stage, duration in stage_ms.items():
            self.stage_ms.setdefault(stage, deque(maxlen=_HISTORY)).append(duration)
        self.latency_ms.append(latency_ms)

    def add_record(self, record: RoundRecord) -> None:
        """Store the outcome of one round."""
        self.records.append(record)
        if record.dropped is None:
            self.last_published_s = record.time_s
        else:
            self.last_drop = record.dropped

    def recent(self, cameras: Sequence[str], now_s: float, window_s: float) -> RecentRounds:
        """Return what happened in the last `window_s` seconds."""
        records = [record for record in self.records if now_s - record.time_s <= window_s]
        detected = [record for record in records if record.dropped is None]
        partial = [record for record in detected if record.missing]
        stages = sorted({stage for record in detected for stage in record.stage_ms})
        times = {stage: [r.stage_ms[stage] for r in detected if stage in r.stage_ms] for stage in stages}
        times["latency"] = [record.latency_ms for record in detected]
        times["stamp"] = [r.stamp_latency_ms for r in detected if r.stamp_latency_ms is not None]
        return RecentRounds(
            detected=len(detected),
            dropped=len(records) - len(detected),
            partial=len(partial),
            last_partial=f"without {', '.join(partial[-1].missing)}" if partial else "",
            last_drop=self.last_drop,
            silent_s=None if self.last_published_s is None else now_s - self.last_published_s,
            used={camera: _share(camera, detected) for camera in cameras},
            times_ms={name: _quantiles(values) for name, values in times.items()},
        )

    def summary(self) -> dict[str, Any]:
        """Return counters and percentiles in ms for JSON; percentiles are None before the first round."""
        return {
            "rounds_in": self.rounds_in,
            "rounds_detected": self.rounds_detected,
            "rounds_dropped": self.rounds_dropped,
            "partial_rounds": self.partial_rounds,
            "dropped": dict(self.dropped),
            "resets": dict(self.resets),
            "camera_faults": dict(self.camera_faults),
            "latency_ms": percentiles(self.latency_ms),
            "exposure_to_publish_ms": percentiles(self.stamp_latency_ms),
            "stage_ms": {stage: percentiles(durations) for stage, durations in self.stage_ms.items()},
        }


def percentiles(values: Iterable[float]) -> dict[str, float | None]:
    """Return p50 and p95 rounded to three digits; None if there are no values."""
    summary = summarize(list(values)).as_dict()
    return {"p50": summary["p50"], "p95": summary["p95"]}


def _share(camera: str, detected: Sequence[RoundRecord]) -> float | None:
    if not detected:
        return None
    return sum(camera not in record.missing for record in detected) / len(detected)


def _quantiles(values: Sequence[float]) -> dict[str, float | None]:
    summary = summarize(list(values)).as_dict()
    return {name: summary[name] for name in ("p50", "p95", "p99")}
