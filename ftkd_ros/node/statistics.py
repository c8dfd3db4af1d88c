# SPDX-License-Identifier: Apache-2.0
"""Counters and timings of the detection worker."""

from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any, Final

from ftkd_core.percentiles import summarize

_HISTORY: Final = 10_000


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
    stage_ms: dict[str, deque[float]] = field(default_factory=dict)

    @property
    def rounds_dropped(self) -> int:
        return sum(self.dropped.values())

    def add_times(self, stage_ms: dict[str, float], latency_ms: float) -> None:
        """Store the milliseconds of one round: per stage, and from submission to publication."""
        for stage, duration in stage_ms.items():
            self.stage_ms.setdefault(stage, deque(maxlen=_HISTORY)).append(duration)
        self.latency_ms.append(latency_ms)

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
            "stage_ms": {stage: percentiles(durations) for stage, durations in self.stage_ms.items()},
        }


def percentiles(values: deque[float]) -> dict[str, float | None]:
    """Return p50 and p95 rounded to three digits; None if there are no values."""
    summary = summarize(list(values)).as_dict()
    return {"p50": summary["p50"], "p95": summary["p95"]}
