# SPDX-License-Identifier: Apache-2.0
"""Figures of benchmarks.node and judges of benchmarks.soak, without processes."""

from typing import Any

import pytest
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue

from benchmarks.camera_rig import CAMERAS, Faults
from benchmarks.node import figures
from benchmarks.soak_faults import KINDS, read_diagnostics

SECOND = 10**9
FIELDS = {"cameras", "transport", "rounds_sent", "rounds_lost", "overhead_ms", "rss_growth_mb"}


def test_rounds_without_a_detection_from_all_cameras_are_lost() -> None:
    rounds = [[number * SECOND + camera for camera in range(6)] for number in range(1, 11)]
    arrivals = {max(stamps): (max(stamps) + 25_000_000, 6) for stamps in rounds}
    arrivals.pop(max(rounds[7]))
    arrivals[max(rounds[8])] = (max(rounds[8]) + 25_000_000, 5)
    found = figures(rounds, arrivals, "default", 0.5)
    assert set(found) == FIELDS
    assert (found["rounds_sent"], found["rounds_lost"]) == (7, 2)  # the first three seconds are not counted
    assert found["overhead_ms"]["p95"] == pytest.approx(20.0)


def diagnostics(faults: dict[str, str], level: bytes, **counters: int) -> Any:
    message = DiagnosticArray()
    for camera in CAMERAS:
        text = faults.get(camera, "")
        status = DiagnosticStatus(name=f"detector: camera {camera}", level=b"\x02" if text else b"\x00")
        status.values = [KeyValue(key="fault", value=text)]
        message.status.append(status)
    rounds = DiagnosticStatus(name="detector: rounds", level=level)
    rounds.values = [
        KeyValue(key=key.replace("__", "."), value=str(count)) for key, count in counters.items()
    ]
    message.status.append(rounds)
    return read_diagnostics(message)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_every_kind_changes_the_rig_and_is_judged(kind: Any) -> None:
    known = set(vars(Faults()))
    assert set(kind.changes(2)) == set(kind.undo) <= known
    assert kind.changes(2) != kind.undo == {name: getattr(Faults(), name) for name in kind.undo}
    if kind.reported is None:
        return
    healthy = diagnostics({}, b"\x00", partial_rounds=3, dropped__unusable=1, resets__pose_jump=1)
    faulty = diagnostics(
        {CAMERAS[2]: "no image for 1.1 s"},
        b"\x01",
        partial_rounds=9,
        dropped__unusable=5,
        resets__pose_jump=2,
        resets__backward_time=1,
    )
    judge = kind.reported(2)
    assert judge(faulty, healthy) and not judge(healthy, healthy)
