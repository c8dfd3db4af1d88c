# SPDX-License-Identifier: Apache-2.0
"""/diagnostics of the detector: cameras, rounds and latency of a recent window, each with a level."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from builtin_interfaces.msg import Time
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue

from ftkd_ros.node.camera_health import CameraState
from ftkd_ros.node.statistics import RecentRounds

MAX_SHARE: Final = 0.1
"""A larger share of partial or dropped rounds in the window has level WARN."""
MAX_STAMP_AGE_S: Final = 10.0
"""Stamps that differ more from the clock of the node have level WARN: age and latency mean nothing then."""


def build_diagnostics(
    stamp: Time,
    node_name: str,
    cameras: Mapping[str, CameraState],
    recent: RecentRounds,
    summary: Mapping[str, Any],
    sync_counts: Mapping[str, int],
    warnings: Sequence[str],
    *,
    max_silence_s: float,
    active_s: float,
    failure: str | None = None,
) -> DiagnosticArray:
    """Return one status per camera, one for rounds and one for latency.

    `recent` is judged; `summary` and `sync_counts` are counters since the start, added as values. `active_s`:
    seconds since the node subscribed to the cameras. failure: why the detector has stopped.
    """
    message = DiagnosticArray()
    message.header.stamp = stamp
    message.status = [
        _camera_status(node_name, camera, state, recent.used.get(camera)) for camera, state in cameras.items()
    ]
    silent_s = active_s if recent.silent_s is None else min(recent.silent_s, active_s)
    lost = [f"{camera}: {state.fault}" for camera, state in cameras.items() if state.fault is not None]
    level, text = DiagnosticStatus.ERROR, failure or ""
    if failure is None:
        level, text = _judge(recent, silent_s, max_silence_s, warnings, lost)
    message.status.append(_rounds_status(node_name, level, text, recent, summary, sync_counts))
    message.status.append(_latency_status(node_name, recent))
    return message


def _judge(
    recent: RecentRounds, silent_s: float, max_silence_s: float, warnings: Sequence[str], lost: Sequence[str]
) -> tuple[bytes, str]:
    if silent_s > max_silence_s:
        # A camera that sends nothing explains the silence better than a drop of long ago.
        reason = recent.last_drop if recent.dropped else "; ".join(lost) or recent.last_drop
        return DiagnosticStatus.ERROR, (
            f"nothing published for {silent_s:.1f} s; last reason: {reason or 'no round of images'}"
        )
    found = []
    if recent.dropped_share > MAX_SHARE:
        found.append(f"{recent.dropped_share:.0%} of the rounds dropped; last reason: {recent.last_drop}")
    if recent.partial_share > MAX_SHARE:
        found.append(f"{recent.partial_share:.0%} of the rounds partial; the last one {recent.last_partial}")
    found += warnings
    if found:
        return DiagnosticStatus.WARN, "; ".join(found)
    if recent.detected == 0:
        return DiagnosticStatus.WARN, "no round detected yet"
    return DiagnosticStatus.OK, "detecting"


def _status(name: str, level: bytes, text: str, values: Mapping[str, Any]) -> DiagnosticStatus:
    status = DiagnosticStatus(name=name, level=level, message=text, hardware_id="")
    status.values = [KeyValue(key=key, value=str(value)) for key, value in values.items()]
    return status


def _camera_status(node_name: str, camera: str, state: CameraState, used: float | None) -> DiagnosticStatus:
    level, text = DiagnosticStatus.OK, "receiving"
    if state.fault is not None:
        level, text = DiagnosticStatus.ERROR if state.is_lost else DiagnosticStatus.WARN, state.fault
    elif state.stamp_age_s is not None and abs(state.stamp_age_s) > MAX_STAMP_AGE_S:
        side = "behind" if state.stamp_age_s > 0 else "ahead of"
        level = DiagnosticStatus.WARN
        text = (
            f"its stamps are {abs(state.stamp_age_s):.0f} s {side} the clock of the node; "
            "set use_sim_time for a replay, or synchronise the clocks"
        )
    elif used is not None and used < 1 - MAX_SHARE:
        level, text = DiagnosticStatus.WARN, f"used in {used:.0%} of the rounds"
    values = {
        "rate_hz": _number(state.rate_hz),
        "age_s": _number(state.age_s),
        "stamp_age_s": _number(state.stamp_age_s),
        "share_of_rounds": _number(used),
        "missed_share": _number(state.missed_share),
        "fault": state.fault or "",
    }
    return _status(f"{node_name}: camera {camera}", level, text, values)


def _rounds_status(
    node_name: str,
    level: bytes,
    text: str,
    recent: RecentRounds,
    summary: Mapping[str, Any],
    sync_counts: Mapping[str, int],
) -> DiagnosticStatus:
    values: dict[str, Any] = {
        "recent.detected": recent.detected,
        "recent.dropped_share": _number(recent.dropped_share),
        "recent.partial_share": _number(recent.partial_share),
        "recent.silent_s": _number(recent.silent_s),
        "recent.last_drop": recent.last_drop,
        "recent.last_partial": recent.last_partial,
    }
    names = ("rounds_in", "rounds_detected", "rounds_dropped", "partial_rounds")
    values |= {name: summary[name] for name in names}
    for group in ("dropped", "resets", "camera_faults"):
        values |= {f"{group}.{cause}": count for cause, count in summary[group].items() if count}
    values |= {f"sync.{cause}": count for cause, count in sync_counts.items()}
    return _status(f"{node_name}: rounds", level, text, values)


def _latency_status(node_name: str, recent: RecentRounds) -> DiagnosticStatus:
    values = {
        f"{name}_ms.{quantile}": _number(value)
        for name, quantiles in recent.times_ms.items()
        for quantile, value in quantiles.items()
    }
    name = f"{node_name}: latency"
    median, from_stamp = recent.times_ms["latency"]["p50"], recent.times_ms["stamp"]["p50"]
    if median is None:
        return _status(name, DiagnosticStatus.WARN, "no round detected in the window", values)
    if from_stamp is not None and abs(from_stamp) > 1e3 * MAX_STAMP_AGE_S:
        text = f"{median:.1f} ms from last image to publication; stamps and the clock of the node differ"
        return _status(name, DiagnosticStatus.WARN, text, values)
    stamped = "" if from_stamp is None else f", {from_stamp:.1f} ms from header.stamp"
    return _status(
        name, DiagnosticStatus.OK, f"{median:.1f} ms from last image to publication{stamped}", values
    )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
