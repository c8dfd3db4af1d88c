# SPDX-License-Identifier: Apache-2.0
"""/diagnostics of the detector: status of cameras, rounds and latency, each with a level."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from builtin_interfaces.msg import Time
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue

TIMEOUT_S: Final = 2.0
"""A camera without a message for this long has level ERROR."""


@dataclass
class CameraActivity:
    """Time of the last message and message rate per camera.

    Both methods run on the thread of the executor.
    """

    cameras: Sequence[str]
    _last_s: dict[str, float] = field(default_factory=dict)
    _count: dict[str, int] = field(default_factory=dict)
    _reported: dict[str, int] = field(default_factory=dict)
    _reported_s: float | None = None

    def add_message(self, camera: str, now_s: float) -> None:
        """Store the arrival time of a message."""
        self._last_s[camera] = now_s
        self._count[camera] = self._count.get(camera, 0) + 1

    def report(self, now_s: float) -> dict[str, tuple[float | None, float | None]]:
        """Return (age of the last message in s, rate since the last report in Hz) by camera, or None."""
        elapsed = None if self._reported_s is None else now_s - self._reported_s
        result = {}
        for camera in self.cameras:
            last, count = self._last_s.get(camera), self._count.get(camera, 0)
            rate = (count - self._reported.get(camera, 0)) / elapsed if elapsed else None
            result[camera] = (None if last is None else now_s - last, rate)
        self._reported, self._reported_s = dict(self._count), now_s
        return result


def build_diagnostics(
    stamp: Time,
    node_name: str,
    cameras: Mapping[str, tuple[float | None, float | None]],
    summary: Mapping[str, Any],
    sync_counts: Mapping[str, int],
    warnings: Sequence[str],
    faults: Mapping[str, str],
) -> DiagnosticArray:
    """Return a DiagnosticArray: one status per camera, one for rounds (counters, drops, resets), one for
    latency.
    """
    message = DiagnosticArray()
    message.header.stamp = stamp
    message.status = [
        _camera_status(node_name, camera, *state, faults.get(camera)) for camera, state in cameras.items()
    ]
    message.status.append(_rounds_status(node_name, summary, sync_counts, warnings))
    message.status.append(_latency_status(node_name, summary))
    return message


def _status(name: str, level: bytes, text: str, values: Mapping[str, Any]) -> DiagnosticStatus:
    status = DiagnosticStatus(name=name, level=level, message=text, hardware_id="")
    status.values = [KeyValue(key=key, value=str(value)) for key, value in values.items()]
    return status


def _camera_status(
    node_name: str, camera: str, age_s: float | None, rate_hz: float | None, fault: str | None
) -> DiagnosticStatus:
    level, text = DiagnosticStatus.OK, "receiving"
    if age_s is None:
        level, text = DiagnosticStatus.ERROR, "no message yet"
    elif age_s > TIMEOUT_S:
        level, text = DiagnosticStatus.ERROR, f"no message for {age_s:.1f} s"
    elif fault is not None:
        level, text = DiagnosticStatus.WARN, fault
    values = {"age_s": _number(age_s), "rate_hz": _number(rate_hz)}
    return _status(f"{node_name}: camera {camera}", level, text, values)


def _rounds_status(
    node_name: str, summary: Mapping[str, Any], sync_counts: Mapping[str, int], warnings: Sequence[str]
) -> DiagnosticStatus:
    level, text = DiagnosticStatus.OK, "detecting"
    if summary["rounds_detected"] == 0:
        level, text = DiagnosticStatus.WARN, "no round detected yet"
    if warnings:
        level, text = DiagnosticStatus.WARN, "; ".join(warnings)
    names = ("rounds_in", "rounds_detected", "rounds_dropped", "partial_rounds")
    values: dict[str, Any] = {name: summary[name] for name in names}
    for group in ("dropped", "resets", "camera_faults"):
        values |= {f"{group}.{cause}": count for cause, count in summary[group].items() if count}
    values |= {f"sync.{cause}": count for cause, count in sync_counts.items()}
    return _status(f"{node_name}: rounds", level, text, values)


def _latency_status(node_name: str, summary: Mapping[str, Any]) -> DiagnosticStatus:
    values = {f"latency_ms.{name}": _number(value) for name, value in summary["latency_ms"].items()}
    for stage, quantiles in summary["stage_ms"].items():
        values |= {f"{stage}_ms.{name}": _number(value) for name, value in quantiles.items()}
    median = summary["latency_ms"]["p50"]
    text = "no round detected yet" if median is None else f"{median:.1f} ms from last image to publication"
    return _status(f"{node_name}: latency", DiagnosticStatus.OK, text, values)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
