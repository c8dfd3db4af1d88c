# SPDX-License-Identifier: Apache-2.0
"""Kinds of faults of the soak test: what changes in the rig, and how /diagnostics must report it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from benchmarks.camera_rig import CAMERAS

OK: Final = b"\x00"


@dataclass(frozen=True, kw_only=True)
class Diagnostics:
    """The parts of one DiagnosticArray that are judged."""

    camera_faults: Mapping[str, str]  # empty: none
    rounds_level: bytes
    rounds_text: str
    counters: Mapping[str, int]


Judge = Callable[[Diagnostics, Diagnostics], bool]  # (now, before the fault)


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One kind of fault. `changes(camera)`: fields of `Faults`; `reported`: None if nothing is wrong."""

    name: str
    changes: Callable[[int], dict[str, Any]]
    reported: Callable[[int], Judge] | None
    undo: dict[str, Any] = field(default_factory=dict)


def read_diagnostics(message: Any) -> Diagnostics:
    """Return the judged parts of a DiagnosticArray."""
    by_name = {status.name.partition(": ")[2]: status for status in message.status}
    values = {value.key: value.value for value in by_name["rounds"].values}
    faults = {}
    for camera in CAMERAS:
        status = by_name[f"camera {camera}"]
        given = {value.key: value.value for value in status.values}["fault"]
        faults[camera] = given if status.level != OK else ""
    return Diagnostics(
        camera_faults=faults,
        rounds_level=by_name["rounds"].level,
        rounds_text=by_name["rounds"].message,
        counters={key: int(text) for key, text in values.items() if text.isdigit()},
    )


def _camera(camera: int) -> Judge:
    name = CAMERAS[camera]
    return lambda now, before: now.camera_faults[name] not in ("", before.camera_faults[name])


def _any_camera(_: int) -> Judge:
    return lambda now, before: any(now.camera_faults.values())


def _counted(name: str) -> Callable[[int], Judge]:
    """Return a judge: a counter has risen, and the rounds are not OK."""
    return lambda _: (
        lambda now, before: (
            now.counters.get(name, 0) > before.counters.get(name, 0) and now.rounds_level != OK
        )
    )


def _reset(cause: str) -> Callable[[int], Judge]:
    name = f"resets.{cause}"
    return lambda _: lambda now, before: now.counters.get(name, 0) > before.counters.get(name, 0)


def _of_camera(name: str, fault: str) -> Kind:
    return Kind(name=name, changes=lambda camera: {fault: [camera]}, reported=_camera, undo={fault: []})


def _clock(name: str, shift_s: float) -> Kind:
    return Kind(
        name=name,
        changes=lambda camera: {"clock_shift_s": {str(camera): shift_s}},
        reported=_camera,
        undo={"clock_shift_s": {}},
    )


def _of_all(name: str, changes: dict[str, Any], undo: dict[str, Any], reported: Any) -> Kind:
    return Kind(name=name, changes=lambda _: changes, reported=reported, undo=undo)


ALL: Final = list(range(len(CAMERAS)))
KINDS: Final = (
    _of_camera("camera silent", "silent"),
    _of_camera("camera driver ended", "no_driver"),
    _of_camera("stamps of a camera frozen", "frozen"),
    _of_camera("stamps of a camera zero", "zero_stamp"),
    _of_camera("JPEG truncated", "truncated"),
    _of_camera("video stream", "video"),
    _of_camera("intrinsics not finite", "nan_intrinsics"),
    _of_camera("camera_info of another size", "wrong_size"),
    _of_camera("frame unknown to tf", "unknown_frame"),
    _clock("clock of a camera +1 h", 3600.0),
    _clock("clock of a camera -2 s", -2.0),
    _of_all("all cameras silent", {"silent": ALL}, {"silent": []}, _any_camera),
    _of_all("all stamps frozen", {"frozen": ALL}, {"frozen": []}, _any_camera),
    _of_all("three cameras silent", {"silent": [0, 2, 4]}, {"silent": []}, _any_camera),
    _of_all("images dropped, 30 %", {"drop": 0.3}, {"drop": 0.0}, _counted("partial_rounds")),
    _of_all("no tf", {"no_tf": True}, {"no_tf": False}, _counted("dropped.unusable")),
    _of_all("tf 200 ms late", {"tf_late_s": 0.2}, {"tf_late_s": 0.0}, None),
    _of_all("pose jump", {"pose_shift_m": 900.0}, {"pose_shift_m": 0.0}, _reset("pose_jump")),
    _of_all("all clocks -30 s", {"time_shift_s": -30.0}, {"time_shift_s": 0.0}, _reset("backward_time")),
)
"""Faults of every kind; with `reported=None` the detections must continue."""
