# SPDX-License-Identifier: Apache-2.0
"""Deterministic offline runner without ROS: bag with cameras -> bag with the detections of every round.

From the round of N cameras on it uses the code of the node (`RoundBuilder`, `StreamMonitor`,
`Detector.step`). A test checks that both produce the same detections.
"""

import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from tqdm import tqdm

from ftkd_core.errors import UserError
from ftkd_core.json_files import write_json
from ftkd_core.types import CameraRound, ObjectList
from ftkd_ros.bag.io import BagReader, BagWriter, check_new
from ftkd_ros.bag.message_definitions import ROSBAGS
from ftkd_ros.bag.replay_rounds import BASE_FRAME, CAMERA_INFO_TOPIC, Drive, bag_cameras
from ftkd_ros.convert.to_ros import objects_to_detections, objects_to_velocities
from ftkd_ros.node.statistics import percentiles
from ftkd_ros.node.stream_monitor import StreamMonitor

DETECTIONS_TOPIC: Final = "/detections"
VELOCITIES_TOPIC: Final = "/detections/velocities"
SUMMARY_NAME: Final = "detector.json"
"""File in the bag folder with detector and timings, in the format of the node's `summary_file`."""


class RoundDetector(Protocol):
    """The part of `ftkd_core.runtime.detector.Detector` that the offline runner uses."""

    channels: tuple[str, ...]
    assigns_by_yaw: bool
    weights_name: str
    training: str
    preset: str
    device: Any

    def warm_up(self) -> None: ...

    def reset(self) -> None: ...

    def step(self, camera_round: CameraRound) -> ObjectList: ...


@dataclass(frozen=True, kw_only=True)
class DetectionSummary:
    """Result of a run; `faults` counts unusable rounds and cameras by reason."""

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
        }


def load_detector(
    weights: Path | None, device: str, score_threshold: float, runtime: str, camera_model: str
) -> RoundDetector:
    """Load the shipped weights or a weights file. Imports torch."""
    from ftkd_core.runtime.detector import Detector

    return Detector.from_weights(
        weights, device=device, score_threshold=score_threshold, runtime=runtime, camera_model=camera_model
    )


DetectorFactory = Callable[[Path | None, str, float, str, str], RoundDetector]
"""Function of (weights, device, score threshold, runtime, camera model)."""


def detect_bag(
    input_path: Path,
    output: Path,
    *,
    weights: Path | None = None,
    device: str = "auto",
    score_threshold: float = 0.05,
    runtime: str = "auto",
    camera_model: str = "auto",
    image_geometry: str = "auto",
    image_topic: str = "",
    camera_info_topic: str = CAMERA_INFO_TOPIC,
    factory: DetectorFactory = load_detector,
    progress: bool = True,
) -> DetectionSummary:
    """Detect every round of a bag and write /detections and /detections/velocities to the new bag `output`.

    The log time is the reference stamp, so equal inputs give equal bags. Raises UserError for unusable input
    or weights and for an output that exists. A failed run leaves no bag.
    """
    with BagReader(input_path) as source:
        check_new(output)
        detector = factory(weights, device, score_threshold, runtime, camera_model)
        own_names = not image_topic and detector.assigns_by_yaw
        drive = Drive(
            source,
            bag_cameras(source, detector.channels) if own_names else detector.channels,
            image_geometry=image_geometry,
            image_topic=image_topic,
            camera_info_topic=camera_info_topic,
        )
        detector.warm_up()
        custom_data = {"detector_weights": detector.weights_name, "detector_device": str(detector.device)}
        with BagWriter(output, custom_data=custom_data) as bag:
            bag.add_topic(DETECTIONS_TOPIC, "vision_msgs/msg/Detection3DArray")
            bag.add_topic(VELOCITIES_TOPIC, "sensor_msgs/msg/PointCloud2")
            summary = _detect(drive, detector, bag, progress)
            if not summary.rounds_detected:
                raise UserError(
                    f"bag {str(input_path)!r}: nothing was detected, because {_cause(drive, summary)}"
                )
    write_json(output / SUMMARY_NAME, summary.as_dict())
    return summary


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
        f"no round has images of at least {required} cameras at the same time; images by topic: "
        f"{', '.join(f'{topic} {count}' for topic, count in counts.items())}"
    )


def _detect(drive: Drive, detector: RoundDetector, bag: BagWriter, progress: bool) -> DetectionSummary:
    """Detect all rounds of the drive, write their objects and return the summary."""
    rounds_in = len(drive.reference_stamps())
    monitor = StreamMonitor()
    resets: Counter[str] = Counter()
    milliseconds: deque[float] = deque()
    detections = 0
    rounds = tqdm(drive.rounds(), total=rounds_in, desc="detecting", unit="round", disable=not progress)
    for camera_round, after_jump in rounds:
        cause = monitor.cause_of_reset(camera_round)
        if after_jump or cause is not None:
            resets[cause or "backward_time"] += 1
            detector.reset()
        started = time.perf_counter()
        objects = detector.step(camera_round)
        milliseconds.append((time.perf_counter() - started) * 1e3)
        detections += len(objects.boxes)
        write_objects(bag, objects)
    return DetectionSummary(
        rounds_in=rounds_in,
        rounds_detected=len(milliseconds),
        detections=detections,
        resets=dict(resets),
        faults=dict(drive.faults),
        latency_ms=percentiles(milliseconds),
        device=str(detector.device),
        weights=detector.weights_name,
        training=detector.training,
        preset=detector.preset,
    )


def write_objects(bag: BagWriter, objects: ObjectList) -> None:
    """Append the detections and velocities of one round at its stamp."""
    bag.write(DETECTIONS_TOPIC, objects.stamp_ns, objects_to_detections(ROSBAGS, objects, BASE_FRAME))
    bag.write(VELOCITIES_TOPIC, objects.stamp_ns, objects_to_velocities(ROSBAGS, objects, BASE_FRAME))
