# SPDX-License-Identifier: Apache-2.0
"""Recorded detections -> official nuScenes metrics, with an account of what the recording covers.

Detections are joined to key frames by stamp: the converter keeps each key frame's token on /sample_token, and
the input bag's /tf says where the vehicle was at the stamp of the detections. So mAP and NDS come from what
was really published, whatever wrote the bag.
"""

import contextlib
import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import numpy as np

from ftkd_core.data.nuscenes import open_dataset
from ftkd_core.errors import UserError
from ftkd_core.evaluation.nuscenes import PosedObjects, evaluate, to_devkit_results
from ftkd_core.json_files import write_json
from ftkd_core.types import ObjectList
from ftkd_ros.bag.detect import DETECTIONS_TOPIC, SUMMARY_NAME, VELOCITIES_TOPIC
from ftkd_ros.bag.io import BagReader
from ftkd_ros.bag.replay_rounds import Drive, KeyFrame, nearest, read_objects

JOIN_WITHIN_NS: Final = 25_000_000
_TOLD: Final = ("device", "weights", "training", "preset", "latency_ms")
_SMALL_MODEL_ON_REAL_DATA: Final = (
    "These are real camera images, and the weights were trained on synthetic scenes only: the small model "
    "finds nothing sensible here. What counts is that real data runs through every stage."
)


@dataclass(frozen=True, kw_only=True)
class Recording:
    """Detections of a recording, joined to the key frames of the drive.

    objects by stamp; joined: (key frame, stamp of its detections or None); rounds_in: camera rounds in the
    input bag, rounds_detected: how many of them have detections; offsets_ms: detections after key frame.
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


def read_recording(detections: BagReader, drive: Drive) -> Recording:
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
    summary_file: Path | None = None,
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Evaluate, write results.json (the devkit's) and metrics.json into `output`, and return the metrics.

    Every key frame of the input bag is evaluated; one without detections counts as empty. `summary_file` is
    what the detector wrote about itself (default: the one `ftkd detect` leaves in its bag, if any); `extra`
    is added as it is. Raises UserError for a data set, bag or summary that is missing, damaged or does not
    belong.
    """
    dataset = open_dataset(dataroot, version)
    with BagReader(detections_path) as detections, BagReader(input_path) as source:
        drive = Drive(source)
        recording = read_recording(detections, drive)
        scenes = scenes_of(dataset, [key_frame.token for key_frame, _ in recording.joined])
        posed = {
            key_frame.token: PosedObjects(recording.objects[stamp], drive.rig.global_from_ego(stamp))
            for key_frame, stamp in recording.joined
            if stamp is not None
        }
    tokens = [key_frame.token for key_frame, _ in recording.joined]
    results = to_devkit_results(posed, tokens)
    metrics = evaluate(dataset, results, sample_tokens=tokens)
    if len(posed) < len(tokens):
        metrics["notes"].append(
            f"{len(tokens) - len(posed)} of {len(tokens)} key frames have no detections; they count as empty."
        )
    dropped = recording.rounds_in - recording.rounds_detected
    if dropped:
        metrics["notes"].append(
            f"{dropped} of {recording.rounds_in} rounds were not detected: the detector was slower than "
            "the cameras, or the recording covers a part of the drive."
        )
    metrics |= recording.summary() | detector_summary(detections_path, summary_file)
    synthetic = is_synthetic(dataset, scenes)
    if not synthetic and "synthetic" in str(metrics["weights"]):
        metrics["notes"].insert(0, _SMALL_MODEL_ON_REAL_DATA)
    metrics |= {
        "data": f"{'synthetic' if synthetic else 'nuScenes'} {version}, {', '.join(scenes)}",
        "versions": library_versions(),
        "created": now_text(),
    }
    metrics |= dict(extra or {})
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "results.json", results, allow_nan=False)
    write_json(output / "metrics.json", metrics, allow_nan=False)
    return metrics


def detector_summary(detections_path: Path, summary_file: Path | None) -> dict[str, Any]:
    """Device, weights and their training, preset and latency as the detector told them; None where it left no
    summary.

    The rounds it counted are kept as `detector_rounds`: those of metrics.json are counted in the two bags.
    """
    path = summary_file if summary_file is not None else detections_path / SUMMARY_NAME
    unknown = {"device": None, "weights": None, "latency_ms": {"p50": None, "p95": None}}
    if summary_file is None and not path.is_file():
        return unknown
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        told = {key: summary[key] for key in _TOLD if key in summary}
        stages = {name: values["p50"] for name, values in summary.get("stage_ms", {}).items()}
        rounds = {key: value for key, value in summary.items() if key.startswith("rounds_")}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"detector summary {str(path)!r} cannot be read ({error}); leave it out") from error
    return {
        **unknown,
        **told,
        "stages_ms": stages,
        "detector_rounds": rounds,
        "resets": summary.get("resets", {}),
    }


def summary_lines(metrics: Mapping[str, Any]) -> list[str]:
    """What a person wants to read on the terminal."""
    latency = metrics.get("latency_ms") or {}
    score = f"mAP {_number(metrics['mAP'])}   NDS {_number(metrics['NDS'])}"
    counts = ", ".join(f"{name} {metrics[f'rounds_{name}']}" for name in ("in", "detected", "dropped"))
    present = f"mAP over the classes that have true objects: {_number(metrics['mAP_present'])}"
    lines = [score, present, f"rounds {counts}"]
    if latency.get("p50") is not None:
        lines.append(
            f"latency p50 {latency['p50']:.1f} ms, p95 {latency['p95']:.1f} ms on {metrics.get('device')}"
        )
    return lines + [f"note: {note}" for note in metrics["notes"]]


def library_versions() -> dict[str, str]:
    """Versions of what has a say in the numbers."""
    versions = {"Python": platform.python_version(), "System": platform.platform()}
    for name in ("torch", "numpy", "nuscenes-devkit", "ros-rclpy"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def now_text() -> str:
    """The moment, in UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(" ", "seconds")


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


def is_synthetic(dataset: Any, scenes: Iterable[str]) -> bool:
    """Whether the scenes were rendered: the synthetic world names its vehicle so."""
    logs = {scene["name"]: dataset.get("log", scene["log_token"]) for scene in dataset.scene}
    return all(logs[name]["vehicle"] == "synthetic" for name in scenes)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
