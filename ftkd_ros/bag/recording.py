# SPDX-License-Identifier: Apache-2.0
"""Recorded detections of one bag, joined to the key frames of its input bag by stamp."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from ftkd_core.errors import UserError
from ftkd_core.evaluation.stability import PosedFrame, StabilityCounts, count_stability
from ftkd_core.types import ObjectList
from ftkd_ros.bag.detect import DETECTIONS_TOPIC, VELOCITIES_TOPIC
from ftkd_ros.bag.io import BagReader
from ftkd_ros.bag.replay_rounds import BASE_FRAME, Drive, KeyFrame, nearest, read_objects

JOIN_WITHIN_NS: Final = 25_000_000


@dataclass(frozen=True, kw_only=True)
class Recording:
    """Detections of a recording, joined to the key frames of the drive.

    objects: by stamp. joined: (key frame, stamp of its detections or None). rounds_in: camera rounds of the
    input bag. rounds_detected: those with detections. offsets_ms: stamps of joined detections minus those of
    their key frames.
    """

    objects: Mapping[int, ObjectList]
    joined: Sequence[tuple[KeyFrame, int | None]]
    rounds_in: int
    rounds_detected: int
    offsets_ms: Sequence[float] = field(default=())
    stability: StabilityCounts = field(default_factory=StabilityCounts)

    @property
    def covered(self) -> int:
        """Number of key frames with detections."""
        return sum(stamp is not None for _, stamp in self.joined)

    def summary(self) -> dict[str, Any]:
        """Return rounds_in, rounds_detected, rounds_dropped and coverage for metrics.json."""
        offsets = np.asarray(self.offsets_ms)
        return {
            "rounds_in": self.rounds_in,
            "rounds_detected": self.rounds_detected,
            "rounds_dropped": self.rounds_in - self.rounds_detected,
            "coverage": {
                "key_frames": len(self.joined),
                "with_detections": sum(stamp is not None for _, stamp in self.joined),
                "share": round(self.covered / len(self.joined), 4) if self.joined else None,
                "unmatched_tokens": [key.token for key, stamp in self.joined if stamp is None],
                "offset_ms": {
                    "mean": round(float(offsets.mean()), 3) if offsets.size else None,
                    "max": round(float(np.abs(offsets).max()), 3) if offsets.size else None,
                },
            },
        }


def read_recording(detections: BagReader, drive: Drive, frame: str = BASE_FRAME) -> Recording:
    """Read the detections and join them to key frames: the nearest detections within 25 ms.

    frame: frame of the detections. Raises UserError if a topic is missing, if there is no key frame, or if no
    detection is within 1 s of the drive.
    """
    objects = read_objects(detections, DETECTIONS_TOPIC, VELOCITIES_TOPIC, frame=frame)
    key_frames = drive.key_frames()
    if not key_frames:
        raise UserError(
            f"bag {str(drive.bag.path)!r} has no key frame on /sample_token; convert it with `ftkd convert`"
        )
    stamps = sorted(objects)
    joined = [(key_frame, nearest(stamps, key_frame.stamp_ns, JOIN_WITHIN_NS)) for key_frame in key_frames]
    rounds = drive.reference_stamps()
    if stamps and rounds and not any(rounds[0] - 10**9 <= stamp <= rounds[-1] + 10**9 for stamp in stamps):
        raise UserError(
            f"detections of {str(detections.path)!r} ({stamps[0]} .. {stamps[-1]} ns) and cameras of "
            f"{str(drive.bag.path)!r} ({rounds[0]} .. {rounds[-1]} ns) are from different times; "
            "give the bag that the detections were made from"
        )
    return Recording(
        objects=objects,
        joined=joined,
        rounds_in=len(rounds),
        rounds_detected=sum(nearest(stamps, stamp, JOIN_WITHIN_NS) is not None for stamp in rounds),
        stability=count_stability(_posed_frames(objects, drive)),
        offsets_ms=[(stamp - key_frame.stamp_ns) * 1e-6 for key_frame, stamp in joined if stamp is not None],
    )


def coverage_notes(recording: Recording) -> list[str]:
    """Return notes on key frames without detections and on dropped rounds."""
    notes = []
    empty = sum(stamp is None for _, stamp in recording.joined)
    if empty:
        notes.append(
            f"{empty} of {len(recording.joined)} key frames have no detections; they count as empty."
        )
    dropped = recording.rounds_in - recording.rounds_detected
    if dropped:
        notes.append(
            f"{dropped} of {recording.rounds_in} rounds were not detected: the detector was slower than "
            "the cameras, or the recording covers only a part of the drive."
        )
    return notes


def _posed_frames(objects: Mapping[int, ObjectList], drive: Drive) -> list[PosedFrame]:
    """Return the detections in order of time with their poses; without those that have no pose."""
    frames = []
    for stamp_ns, found in sorted(objects.items()):
        try:
            frames.append(PosedFrame(found, drive.rig.global_from_ego(stamp_ns)))
        except UserError:  # outside of /tf, for example after the end of the bag
            continue
    return frames
