# SPDX-License-Identifier: Apache-2.0
"""Recorded detections -> official nuScenes metrics, with the coverage of the recording.

Detections are joined to key frames by stamp. The input bag provides the token of each key frame
(/sample_token) and the ego pose at the stamp of the detections (/tf). Therefore mAP and NDS measure the
published messages, and any recorder can write them.
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

from ftkd_core.data.nuscenes import open_dataset, scene_names
from ftkd_core.errors import UserError
from ftkd_core.evaluation.nuscenes import PosedObjects, evaluate, to_devkit_results
from ftkd_core.json_files import write_json
from ftkd_core.types import ObjectList
from ftkd_ros.bag.detect import DETECTIONS_TOPIC, SUMMARY_NAME, VELOCITIES_TOPIC
from ftkd_ros.bag.io import BagReader
from ftkd_ros.bag.replay_rounds import Drive, KeyFrame, nearest, read_objects

JOIN_WITHIN_NS: Final = 25_000_000
_DETECTOR_KEYS: Final = ("device", "weights", "training", "preset", "latency_ms")
_SMALL_MODEL_ON_REAL_DATA: Final = (
    "The images are real, but the weights were trained on synthetic scenes only, so these scores are not "
    "meaningful. The run shows that every stage works on real data."
)


_NO_TRUTH: Final = "There is no ground truth, so no score; results.json is for the evaluation server."


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
                "offset_ms": {
                    "mean": round(float(offsets.mean()), 3) if offsets.size else None,
                    "max": round(float(np.abs(offsets).max()), 3) if offsets.size else None,
                },
            },
        }


def read_recording(detections: BagReader, drive: Drive) -> Recording:
    """Read the detections and join them to key frames: the nearest detections within 25 ms.

    Raises UserError if a topic is missing, if there is no key frame, or if no detection is within 1 s of the
    drive.
    """
    objects = read_objects(detections, DETECTIONS_TOPIC, VELOCITIES_TOPIC)
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
    """Evaluate a recording, write results.json (devkit format) and metrics.json to `output`, return the
    metrics.

    All key frames of the input bag are evaluated; those without detections count as empty. `summary_file` is
    the summary of the detector (default: the one in a bag of `ftkd detect`, if any). `extra` is added to the
    metrics. Raises UserError for a data set, bag or summary that is missing or damaged, or that does not
    belong to the others.
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
    if not dataset.has_ground_truth:
        output.mkdir(parents=True, exist_ok=True)
        write_json(output / "results.json", results, allow_nan=False)
        return {"mAP": None, "notes": [_NO_TRUTH]}
    metrics = evaluate(dataset, results, sample_tokens=tokens)
    metrics["notes"] += coverage_notes(recording)
    metrics |= recording.summary() | detector_summary(detections_path, summary_file)
    metrics |= _describe_data(dataset, version, scenes, metrics) | dict(extra or {})
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "results.json", results, allow_nan=False)
    write_json(output / "metrics.json", metrics, allow_nan=False)
    return metrics


def _describe_data(
    dataset: Any, version: str, scenes: Sequence[str], metrics: dict[str, Any]
) -> dict[str, Any]:
    """Return the entries on data, versions and time; add a note if weights of the synthetic world ran on real
    data."""
    synthetic = is_synthetic(dataset, scenes)
    if not synthetic and "synthetic" in str(metrics["weights"]):
        metrics["notes"].insert(0, _SMALL_MODEL_ON_REAL_DATA)
    return {
        "data": f"{'synthetic' if synthetic else 'nuScenes'} {version}, {', '.join(scenes)}",
        "versions": library_versions(),
        "created": now_text(),
    }


def evaluate_results(
    results: Path, *, dataroot: Path, version: str, split: str | None, output: Path
) -> list[str]:
    """Score a nuScenes results file on a split or all scenes, write metrics_summary.json to `output`, and
    return lines for a terminal. Raises UserError for a file that does not cover the key frames."""
    dataset = open_dataset(dataroot, version)
    if not dataset.has_ground_truth:
        raise UserError(f"data set {version!r} has no annotations; {_NO_TRUTH}")
    scenes = scene_names(dataset) if split is None else None
    metrics = evaluate(dataset, results, split=split, scenes=scenes, output_dir=output)
    score = f"mAP {_number(metrics['mAP'])}   NDS {_number(metrics['NDS'])}   {metrics['samples']} key frames"
    return [score, *(f"note: {note}" for note in metrics["notes"])]


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


def detector_summary(detections_path: Path, summary_file: Path | None) -> dict[str, Any]:
    """Return device, weights, training, preset and latency from the detector's summary; None without a
    summary.

    `detector_rounds` are the rounds that the detector counted; the rounds of metrics.json are counted in the
    bags. Raises UserError for a summary that cannot be read.
    """
    path = summary_file if summary_file is not None else detections_path / SUMMARY_NAME
    unknown = {"device": None, "weights": None, "latency_ms": {"p50": None, "p95": None}}
    if summary_file is None and not path.is_file():
        return unknown
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        reported = {key: summary[key] for key in _DETECTOR_KEYS if key in summary}
        stages = {name: values["p50"] for name, values in summary.get("stage_ms", {}).items()}
        rounds = {key: value for key, value in summary.items() if key.startswith("rounds_")}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"detector summary {str(path)!r} cannot be read ({error}); omit it") from error
    return {
        **unknown,
        **reported,
        "stages_ms": stages,
        "detector_rounds": rounds,
        "resets": summary.get("resets", {}),
    }


def summary_lines(metrics: Mapping[str, Any]) -> list[str]:
    """Return the lines of text that summarize the metrics on a terminal."""
    if "NDS" not in metrics:
        return list(metrics["notes"])
    latency = metrics.get("latency_ms") or {}
    score = f"mAP {_number(metrics['mAP'])}   NDS {_number(metrics['NDS'])}"
    counts = ", ".join(f"{name} {metrics[f'rounds_{name}']}" for name in ("in", "detected", "dropped"))
    present = f"mAP over classes with ground truth: {_number(metrics['mAP_present'])}"
    lines = [score, present, f"rounds {counts}"]
    if latency.get("p50") is not None:
        lines.append(
            f"latency p50 {latency['p50']:.1f} ms, p95 {latency['p95']:.1f} ms on {metrics.get('device')}"
        )
    return lines + [f"note: {note}" for note in metrics["notes"]]


def library_versions() -> dict[str, str]:
    """Return the versions of Python, the system and the libraries that affect the metrics."""
    versions = {"Python": platform.python_version(), "System": platform.platform()}
    for name in ("torch", "numpy", "nuscenes-devkit", "ros-rclpy"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def now_text() -> str:
    """Return the current time in UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(" ", "seconds")


def scenes_of(dataset: Any, sample_tokens: Iterable[str]) -> list[str]:
    """Return the names of the scenes of key frames.

    Raises UserError for a token that is not in the data set.
    """
    names: dict[str, None] = {}
    for token in sample_tokens:
        try:
            sample = dataset.get("sample", token)
        except KeyError as error:
            raise UserError(
                f"key frame {token!r} of the bag is not in {dataset.version} of {str(dataset.dataroot)!r}; "
                "give the data set that the bag was converted from"
            ) from error
        names[str(dataset.get("scene", sample["scene_token"])["name"])] = None
    return list(names)


def is_synthetic(dataset: Any, scenes: Iterable[str]) -> bool:
    """Return True if all scenes are synthetic, that is, if the vehicle of their logs is `synthetic`."""
    logs = {scene["name"]: dataset.get("log", scene["log_token"]) for scene in dataset.scene}
    return all(logs[name]["vehicle"] == "synthetic" for name in scenes)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
