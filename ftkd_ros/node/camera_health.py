# SPDX-License-Identifier: Apache-2.0
"""State of each camera: rate and age of its images, and a log line when it is lost, left out or back."""

import threading
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

LOST_S: Final = 1.0
"""A camera without an image for this long, or for three of its periods, is lost."""
_ARRIVALS: Final = 640  # images per camera: 10 s at 60 Hz


@dataclass(frozen=True, kw_only=True)
class CameraState:
    """State of one camera; None if unknown. `age_s` is by arrival, `stamp_age_s` by stamp.

    `fault` is a sentence: no image, unusable stamps, or why the camera was masked. `is_lost`: no image
    arrives.
    """

    age_s: float | None
    stamp_age_s: float | None
    rate_hz: float | None
    fault: str | None
    is_lost: bool


class CameraHealth:
    """Stores arrivals and stamps of the images; safe for calls from several threads."""

    def __init__(self, cameras: Sequence[str]) -> None:
        self.cameras = tuple(cameras)
        self._lock = threading.Lock()
        self._arrivals: dict[str, deque[float]] = {c: deque(maxlen=_ARRIVALS) for c in self.cameras}
        self._stamp_ns: dict[str, int] = {}
        self._logged: dict[str, str | None] = {}

    def clear(self) -> None:
        """Forget all images, as after deactivation."""
        with self._lock:
            for arrivals in self._arrivals.values():
                arrivals.clear()
            self._stamp_ns.clear()
            self._logged.clear()

    def add(self, camera: str, now_s: float, stamp_ns: int) -> None:
        """Store the arrival (monotonic time) and the stamp of an image."""
        with self._lock:
            self._arrivals[camera].append(now_s)
            self._stamp_ns[camera] = stamp_ns

    def states(
        self, now_s: float, clock_ns: int, window_s: float, faults: Mapping[str, str]
    ) -> dict[str, CameraState]:
        """Return the state of each camera. `faults`: by camera, why its images are not used."""
        with self._lock:
            return {c: self._state(c, now_s, clock_ns, window_s, faults.get(c)) for c in self.cameras}

    def changes(self, states: Mapping[str, CameraState]) -> list[tuple[bool, str]]:
        """Return (is a fault, sentence) for each camera that was lost, left out or came back since the last
        call.
        """
        found = []
        for camera, state in states.items():
            kind = None if state.fault is None else "lost" if state.is_lost else "left out"
            before = self._logged.get(camera)
            if kind == before:
                continue
            self._logged[camera] = kind
            if kind is None:
                found.append((False, f"camera {camera} is back"))
            else:
                found.append((True, f"camera {camera} is {kind}: {state.fault}"))
        return found

    def _state(
        self, camera: str, now_s: float, clock_ns: int, window_s: float, fault: str | None
    ) -> CameraState:
        arrivals = self._arrivals[camera]
        if not arrivals:
            return CameraState(
                age_s=None,
                stamp_age_s=None,
                rate_hz=None,
                fault="no image yet; compare image_topic and qos_reliability with `ros2 topic info -v`",
                is_lost=True,
            )
        age_s = now_s - arrivals[-1]
        recent = [arrival for arrival in arrivals if now_s - arrival <= window_s]
        span_s = max(recent[-1] - recent[0], 1e-3) if len(recent) > 1 else None
        rate_hz = (len(recent) - 1) / span_s if span_s else None
        is_lost = age_s > max(LOST_S, 3 / rate_hz if rate_hz else LOST_S)
        return CameraState(
            age_s=age_s,
            stamp_age_s=(clock_ns - self._stamp_ns[camera]) * 1e-9,
            rate_hz=0.0 if is_lost else rate_hz,
            fault=f"no image for {age_s:.1f} s" if is_lost else fault,
            is_lost=is_lost,
        )
