# SPDX-License-Identifier: Apache-2.0
"""Recorded detections -> official nuScenes metrics, with an account of what the recording covers.

Detections are joined to key frames by stamp: the converter keeps each key frame's token on /sample_token, and
the input bag's /tf says where the vehicle was at the stamp of the detections. So mAP and NDS come from what
was really published, whatever wrote the bag.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Final

import numpy as np

from ftkd_core.data.nuscenes import open_dataset
from ftkd_core.errors import UserError
from ftkd_core.evaluation.nuscenes import PosedObjects, evaluate, to_devkit_results
from ftkd_core.types import ObjectList
from ftkd_ros.bag.drive import Bag, Drive, KeyFrame, nearest, read_objects

JOIN_WITHIN_NS: Final = 25_000_000
DETECTIONS_TOPIC: Final = "/detections"
VELOCITIES_TOPIC: Final = "/detections/velocities"


@dataclass(frozen=True, kw_only=True)
class Recording:
    """Detections of a recording, joined to the key frames of the drive.

    objects by stamp; joined: (key frame, stamp of its detections or None); round_stamps_ns: reference stamps
    of the camera rounds in the input; round_hits: how many of them have detections.
    """

    objects: Mapping[int, ObjectList]
    joined: Sequence[tuple[KeyFrame, int | None]]
    rounds_in: int
    rounds_detected: int
    offsets_ms: Sequence[float] = field(default=())

    def summary(self) -> dict[str, Any]:
        """rounds_in, rounds_detected, rounds_dropped and coverage, for metrics.json."""
        offsets = np.asarray(self.offsets_ms)
        return {
            "rounds_in": self.rounds_in,
            "rounds_detected": self.rounds_detected,
            "rounds_dropped": self.rounds_in - self.rounds_detected,
            "coverage": {
                "key_frames": len(self.joined),
                "with_detections": sum(stamp is not None for _, stamp in self.joined),
                "offset_ms": {
                    "mean": round(float(offsets.mean()), 3) if offsets.size else None,
                    "max": round(float(np.abs(offsets).max()), 3) if offsets.size else None,
                },
            },
        }


def read_recording(detections: Bag, drive: Drive) -> Recording:
    """Read the detections and join them; a key frame takes the nearest detections within 25 ms.

    Raises UserError where a topic is missing, there is no key frame, or no detection belongs to this drive.
    """
    objects = read_objects(detections, DETECTIONS_TOPIC, VELOCITIES_TOPIC)
    key_frames = drive.key_frames()
    if not key_frames:
        raise UserError(
            f"bag {str(drive.bag.path)!r} has no key frame on /sample_token; nothing can be evaluated"
        )
    stamps = sorted(objects)
    joined = [(key_frame, nearest(stamps, key_frame.stamp_ns, JOIN_WITHIN_NS)) for key_frame in key_frames]
    rounds = drive.reference_stamps()
    if stamps and rounds and not any(rounds[0] - 10**9 <= stamp <= rounds[-1] + 10**9 for stamp in stamps):
        raise UserError(
            f"detections of {str(detections.path)!r} ({stamps[0]} .. {stamps[-1]} ns) and cameras of "
            f"{str(drive.bag.path)!r} ({rounds[0]} .. {rounds[-1]} ns) are of different times; "
            "give the bag the detections were made from"
        )
    return Recording(
        objects=objects,
        joined=joined,
        rounds_in=len(rounds),
        rounds_detected=sum(nearest(stamps, stamp, JOIN_WITHIN_NS) is not None for stamp in rounds),
        offsets_ms=[(stamp - key_frame.stamp_ns) * 1e-6 for key_frame, stamp in joined if stamp is not None],
    )


def evaluate_recording(
    detections_path: Path,
    input_path: Path,
    *,
    dataroot: Path,
    version: str,
    output: Path,
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Evaluate, write results.json (the devkit's) and metrics.json into `output`, and return the metrics.

    `extra` is added to metrics.json (what ran: device, weights, versions, latency). Every key frame of the
    input bag is evaluated; one without detections counts as empty.
    """
    dataset = open_dataset(dataroot, version)
    with Bag(detections_path) as detections, Bag(input_path) as source:
        drive = Drive(source)
        recording = read_recording(detections, drive)
        posed = {
            key_frame.token: PosedObjects(recording.objects[stamp], drive.pose_at(stamp))
            for key_frame, stamp in recording.joined
            if stamp is not None
        }
    tokens = [key_frame.token for key_frame, _ in recording.joined]
    scenes = scenes_of(dataset, tokens)
    results = to_devkit_results(posed, tokens)
    metrics = evaluate(dataset, results, sample_tokens=tokens)
    missing = len(tokens) - len(posed)
    if missing:
        metrics["notes"].append(
            f"{missing} of {len(tokens)} key frames have no detections; they count as empty."
        )
    metrics |= recording.summary()
    metrics |= {
        "data": f"{version}, {', '.join(scenes)}",
        "created": datetime.now(timezone.utc).isoformat("T", "seconds"),
    }
    metrics |= dict(extra or {})
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "results.json", results)
    write_json(output / "metrics.json", metrics)
    return metrics


def scenes_of(dataset: Any, sample_tokens: Iterable[str]) -> list[str]:
    """Names of the scenes of the key frames. Raises UserError for a token the data set does not have."""
    names: dict[str, None] = {}
    for token in sample_tokens:
        try:
            sample = dataset.get("sample", token)
        except KeyError as error:
            raise UserError(
                f"key frame {token!r} of the bag is not in {dataset.version} of {str(dataset.dataroot)!r}; "
                "give the data set the bag was converted from"
            ) from error
        names[str(dataset.get("scene", sample["scene_token"])["name"])] = None
    return list(names)


def write_json(path: Path, value: Any) -> None:
    """Write JSON for people and scripts."""
    path.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n")
