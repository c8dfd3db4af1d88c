# SPDX-License-Identifier: Apache-2.0
"""State of each camera: rate and age of its images, and a log line when it is lost, left out or back."""

import threading
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

LOST_S: Final = 1.0
"""A camera without an image for this long, or for three of its periods, is lost."""
_ARRIVALS: Final = 640  # images per camera: 10 s at 60 Hz
_LOSS_OF_CAMERA: Final = 0.01
_LOSS_OF_RIG: Final = 0.03


@dataclass(frozen=True, kw_only=True)
class CameraState:
    """State of one camera; None if unknown. `age_s` is by arrival, `stamp_age_s` by stamp.

    `fault` is a sentence: no image, unusable stamps, or why the camera was masked. `is_lost`: no image
    arrives. `missed_share`: share of the images that are missing between stamps, without longer outages.
    """

    age_s: float | None
    stamp_age_s: float | None
    rate_hz: float | None
    fault: str | None
    is_lost: bool
    missed_share: float = 0.0


def transport_warning(states: Mapping[str, CameraState]) -> str | None:
    """Return a sentence if most cameras miss single images at random, as a transport loses them."""
    alive = [state.missed_share for state in states.values() if not state.is_lost]
    losing = [share for share in alive if share >= _LOSS_OF_CAMERA]
    if len(losing) < 2 or 2 * len(losing) <= len(alive) or sum(alive) / len(alive) < _LOSS_OF_RIG:
        return None
    share = sum(alive) / len(alive)
    return (
        f"the transport seems to lose images: {share:.0%} of those of {len(losing)} of {len(states)} cameras "
        "are missing; use the DDS settings config/fastdds.xml or config/cyclonedds.xml in this process and "
        "in the camera drivers, or compressed images"
    )


def missed_share(stamps_ns: Sequence[int]) -> float:
    """Return the share of images that are missing between stamps; 0 for fewer than ten.

    The usual interval is the 75th percentile, because triggers may alternate between two intervals.
    """
    intervals = np.diff(np.asarray(stamps_ns, dtype=np.int64))
    intervals = intervals[(intervals > 0) & (intervals < LOST_S * 1e9)]
    if len(intervals) < 9:
        return 0.0
    usual = float(np.percentile(intervals, 75))
    missed = float(np.maximum(np.round(intervals / usual) - 1, 0).sum())
    return missed / (missed + len(intervals))


class CameraHealth:
    """Stores arrivals and stamps of the images; safe for calls from several threads."""

    def __init__(self, cameras: Sequence[str]) -> None:
        self.cameras = tuple(cameras)
        self._lock = threading.Lock()
        self._arrivals: dict[str, deque[float]] = {c: deque(maxlen=_ARRIVALS) for c in self.cameras}
        self._stamps_ns: dict[str, deque[int]] = {c: deque(maxlen=_ARRIVALS) for c in self.cameras}
        self._logged: dict[str, str | None] = {}

    def clear(self) -> None:
        """Forget all images, as after deactivation."""
        with self._lock:
            for camera in self.cameras:
                self._arrivals[camera].clear()
                self._stamps_ns[camera].clear()
            self._logged.clear()

    def add(self, camera: str, now_s: float, stamp_ns: int) -> None:
        """Store the arrival (monotonic time) and the stamp of an image."""
        with self._lock:
            self._arrivals[camera].append(now_s)
            self._stamps_ns[camera].append(stamp_ns)

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
            stamp_age_s=(clock_ns - self._stamps_ns[camera][-1]) * 1e-9,
            rate_hz=0.0 if is_lost else rate_hz,
            fault=f"no image for {age_s:.1f} s" if is_lost else fault,
            is_lost=is_lost,
            missed_share=missed_share(list(self._stamps_ns[camera])[-len(recent) :] if recent else []),
        )
