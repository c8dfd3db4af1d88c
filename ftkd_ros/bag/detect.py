# SPDX-License-Identifier: Apache-2.0
"""Deterministic offline runner without ROS: bag with cameras -> bag with the detections of every round.

It takes the parameters of the node and uses its code (`RoundBuilder`, `StreamMonitor`, `Detector.step`,
`select_output`). A test checks that both produce the same detections.
"""

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Protocol

from tqdm import tqdm

from ftkd_core.errors import UserError
from ftkd_core.json_files import write_json
from ftkd_core.runtime.thresholds import DEFAULT_THRESHOLD
from ftkd_core.types import CameraRound, ObjectList
from ftkd_ros.bag.detect_progress import DetectionProgress, SavedRound
from ftkd_ros.bag.io import BagReader, BagWriter, check_new
from ftkd_ros.bag.message_definitions import ROSBAGS, message_types
from ftkd_ros.bag.replay_rounds import BASE_FRAME, Drive
from ftkd_ros.convert.to_ros import objects_to_detections, objects_to_velocities
from ftkd_ros.node.loading import make_detector
from ftkd_ros.node.output_selection import select_output
from ftkd_ros.node.parameter_files import changed_values
from ftkd_ros.node.parameters import DetectorParameters
from ftkd_ros.node.statistics import percentiles
from ftkd_ros.node.stream_monitor import StreamMonitor

DETECTIONS_TOPIC: Final = "/detections"
VELOCITIES_TOPIC: Final = "/detections/velocities"
SUMMARY_NAME: Final = "detector.json"
"""File in the bag folder with detector and timings, in the format of the node's `summary_file`."""
_TYPES: Final = {
    DETECTIONS_TOPIC: "vision_msgs/msg/Detection3DArray",
    VELOCITIES_TOPIC: "sensor_msgs/msg/PointCloud2",
}


class RoundDetector(Protocol):
    """The part of `ftkd_core.runtime.detector.Detector` that the offline runner uses."""

    channels: tuple[str, ...]
    assigns_by_yaw: bool
    weights_name: str
    training: str
    preset: str
    device: Any

    @property
    def warnings(self) -> list[str]: ...

    def warm_up(self) -> None: ...

    def reset(self) -> None: ...

    def step(self, camera_round: CameraRound) -> ObjectList: ...


@dataclass(frozen=True, kw_only=True)
class DetectionSummary:
    """Result of a run; `faults` counts unusable rounds and cameras by reason; `resumed_rounds`: taken over
    from a run that was killed; parameters: those that differ from their defaults."""

    rounds_in: int
    rounds_detected: int
    detections: int
    resets: dict[str, int]
    faults: dict[str, int]
    latency_ms: dict[str, float | None]
    device: str
    weights: str
    training: str
    preset: str
    sync_policy: str = ""
    parameters: dict[str, Any] = field(default_factory=dict)
    selection: dict[str, Any] = field(default_factory=dict)
    resumed_rounds: int = 0
    warnings: tuple[str, ...] = ()
    latencies: tuple[tuple[int, float], ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return values for JSON, with the keys of the node's summary."""
        return {
            "rounds_in": self.rounds_in,
            "rounds_detected": self.rounds_detected,
            "rounds_dropped": self.rounds_in - self.rounds_detected,
            "resets": self.resets,
            "faults": self.faults,
            "latency_ms": self.latency_ms | {"meaning": "detector step without image decoding"},
            "device": self.device,
            "weights": self.weights,
            "training": self.training,
            "preset": self.preset,
            "sync": {"policy": self.sync_policy},
            "parameters": self.parameters,
            "selection": self.selection,
            "resumed_rounds": self.resumed_rounds,
            "warnings": list(self.warnings),
            "latency_timeline": [[stamp_ns, round(value, 2)] for stamp_ns, value in self.latencies],
        }


DetectorFactory = Callable[[DetectorParameters], RoundDetector]


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Part of a bag: every n-th round from `start_s` seconds after the first one, for `duration_s`."""

    start_s: float = 0.0
    duration_s: float | None = None
    every: int = 1


@dataclass
class _Run:
    """State of a run after some rounds."""

    done: int = 0
    resets: Counter[str] = field(default_factory=Counter)
    latencies: list[tuple[int, float]] = field(default_factory=list)
    detections: int = 0
    monitor: StreamMonitor = field(default_factory=StreamMonitor)


def offline_parameters(parameters: DetectorParameters) -> DetectorParameters:
    """Return the parameters of a run on a bag: a score threshold that was not given is 0.05."""
    if parameters.score_threshold >= 0:
        return parameters
    return replace(parameters, score_threshold=DEFAULT_THRESHOLD)


def detect_bag(
    input_path: Path,
    output: Path,
    *,
    parameters: DetectorParameters | None = None,
    selection: Selection | None = None,
    factory: DetectorFactory = make_detector,
    progress: bool = True,
    save_interval_s: float = 5.0,
) -> DetectionSummary:
    """Detect every round of a bag and write /detections and /detections/velocities to the new bag `output`.

    The log time is the reference stamp, so equal inputs give equal bags. A run that was killed is resumed,
    with the same result. Raises UserError for unusable input or weights and for an output that exists; it
    leaves no bag. Without a score threshold, 0.05 is used, because the metrics need weak detections too.
    """
    parameters, selection = parameters or DetectorParameters(), selection or Selection()
    parameters = offline_parameters(parameters)
    with BagReader(input_path) as source:
        check_new(output)
        detector = factory(parameters)
        if not detector.assigns_by_yaw and len(parameters.cameras) > len(detector.channels):
            raise UserError(
                f"parameter cameras: {len(parameters.cameras)} cameras; expected at most "
                f"{len(detector.channels)}, the number of cameras of the weights"
            )
        drive = Drive(
            source, parameters, num_views=len(detector.channels), any_cameras=detector.assigns_by_yaw
        )
        drive.select(start_s=selection.start_s, duration_s=selection.duration_s, every=selection.every)
        detector.warm_up()
        key = _key(input_path, detector, parameters, selection)
        with DetectionProgress(output, key, interval_s=save_interval_s) as saved:
            summary = _detect(drive, detector, saved, parameters, selection, progress)
            if not summary.rounds_detected:
                raise UserError(
                    f"bag {str(input_path)!r}: nothing was detected, because {_cause(drive, summary)}"
                )
            custom_data = {"detector_weights": detector.weights_name, "detector_device": str(detector.device)}
            with BagWriter(output, custom_data=custom_data) as bag:
                for topic, message_type in _TYPES.items():
                    bag.add_topic(topic, message_type)
                for stored in saved.rounds():
                    bag.write_raw(DETECTIONS_TOPIC, stored.stamp_ns, stored.detections)
                    bag.write_raw(VELOCITIES_TOPIC, stored.stamp_ns, stored.velocities)
            write_json(output / SUMMARY_NAME, summary.as_dict())
    return summary


def _key(
    bag: Path, detector: RoundDetector, parameters: DetectorParameters, selection: Selection
) -> dict[str, Any]:
    """Return what the detections depend on."""
    files = sorted(bag.iterdir()) if bag.is_dir() else [bag]
    weights = Path(parameters.weights) if parameters.weights else None
    return {
        "bag": [[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in files],
        "weights": [detector.weights_name, weights.stat().st_mtime_ns if weights else 0],
        "device": str(detector.device),
        "runtime": str(getattr(detector, "runtime", "")),
        "parameters": changed_values(parameters),
        "selection": [selection.start_s, selection.duration_s, selection.every],
    }


def _cause(drive: Drive, summary: DetectionSummary) -> str:
    """Return why no round was detected: the most frequent fault, or why no round was complete."""
    if summary.faults:
        fault, count = Counter(summary.faults).most_common(1)[0]
        return f"{fault} ({count} times)"
    counts = drive.image_counts()
    if all(stamp == 0 for stamp in drive.latest_stamps().values()):
        return "all images have the stamp 0; set header.stamp to the time of exposure"
    required = drive.min_cameras
    return (
        f"no round has images of at least {required} cameras at the same time (-p min_cameras:=N); images by "
        f"topic: {', '.join(f'{topic} {count}' for topic, count in counts.items())}"
    )


def _detect(
    drive: Drive,
    detector: RoundDetector,
    saved: DetectionProgress,
    parameters: DetectorParameters,
    selection: Selection,
    progress: bool,
) -> DetectionSummary:
    """Detect all rounds of the drive, store their messages and return the summary."""
    stamps = drive.reference_stamps()
    run = _resumed(saved, drive, detector, parameters)
    resumed = run.done
    rounds = tqdm(
        drive.numbered_rounds(skip=run.done),
        total=len(stamps),
        initial=run.done,
        desc="detecting",
        unit="round",
        disable=not progress,
    )
    for camera_round, after_jump in rounds:
        run.done += 1
        if camera_round is None:
            continue
        cause = run.monitor.cause_of_reset(camera_round)
        if after_jump or cause is not None:
            run.resets[cause or "backward_time"] += 1
            detector.reset()
        started = time.perf_counter()
        objects = detector.step(camera_round)
        run.latencies.append((objects.stamp_ns, (time.perf_counter() - started) * 1e3))
        objects = select_output(objects, parameters)
        run.detections += len(objects.boxes)
        saved.add(_serialized(objects, parameters.base_frame))
        if saved.is_due:
            _save(saved, run, drive, detector)
    return DetectionSummary(
        rounds_in=len(stamps),
        rounds_detected=len(run.latencies),
        detections=run.detections,
        resets=dict(run.resets),
        faults=dict(drive.faults),
        latency_ms=percentiles([value for _, value in run.latencies]),
        device=str(detector.device),
        weights=detector.weights_name,
        training=detector.training,
        preset=detector.preset,
        sync_policy=drive.plan.policy,
        warnings=tuple(detector.warnings),
        parameters=changed_values(parameters),
        selection={
            "start_s": selection.start_s, "duration_s": selection.duration_s, "every": selection.every
        },
        resumed_rounds=resumed,
        latencies=tuple(run.latencies),
    )  # fmt: skip


def _save(saved: DetectionProgress, run: _Run, drive: Drive, detector: RoundDetector) -> None:
    """Store the state of a run, if the detector can return its own."""
    if not hasattr(detector, "state"):
        return
    notes, arrays = detector.state()
    saved.save(
        {
            "done": run.done,
            "resets": dict(run.resets),
            "latencies": run.latencies,
            "detections": run.detections,
            "monitor": run.monitor.state(),
            "faults": dict(drive.faults),
            "detector": notes,
        },
        arrays,
    )


def _resumed(
    saved: DetectionProgress, drive: Drive, detector: RoundDetector, parameters: DetectorParameters
) -> _Run:
    """Return the state of a killed run and restore the detector, or the state before the first round."""
    monitor = StreamMonitor(max_gap_s=parameters.memory_max_gap_s, max_speed_m_s=parameters.memory_max_speed)
    if saved.state is None or not hasattr(detector, "restore"):
        return _Run(monitor=monitor)
    notes: Mapping[str, Any] = saved.state.notes
    for camera_round in drive.latest_rounds_of_cameras(notes["done"]):
        detector.observe(camera_round)  # type: ignore[attr-defined]
    detector.restore(notes["detector"], saved.state.arrays)
    monitor.restore(notes["monitor"])
    drive.faults.update(notes["faults"])
    return _Run(
        done=notes["done"],
        resets=Counter(notes["resets"]),
        latencies=[(stamp_ns, value) for stamp_ns, value in notes["latencies"]],
        detections=notes["detections"],
        monitor=monitor,
    )


def write_objects(bag: BagWriter, objects: ObjectList, base_frame: str = BASE_FRAME) -> None:
    """Append the detections and velocities of one round at its stamp."""
    stored = _serialized(objects, base_frame)
    bag.write_raw(DETECTIONS_TOPIC, stored.stamp_ns, stored.detections)
    bag.write_raw(VELOCITIES_TOPIC, stored.stamp_ns, stored.velocities)


def _serialized(objects: ObjectList, base_frame: str) -> SavedRound:
    """Return the messages of one round as bytes."""
    serialize = message_types().serialize_cdr
    detections = objects_to_detections(ROSBAGS, objects, base_frame)
    velocities = objects_to_velocities(ROSBAGS, objects, base_frame)
    return SavedRound(
        objects.stamp_ns,
        bytes(serialize(detections, _TYPES[DETECTIONS_TOPIC])),
        bytes(serialize(velocities, _TYPES[VELOCITIES_TOPIC])),
    )
