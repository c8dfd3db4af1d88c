# SPDX-License-Identifier: Apache-2.0
"""Parameters of the detector node: names, defaults, descriptions and checks.

They are read-only while the node runs. To change them, edit the YAML or launch file and restart the node.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final

from rcl_interfaces.msg import ParameterDescriptor
from rclpy.exceptions import InvalidTopicNameException
from rclpy.node import Node
from rclpy.validate_topic_name import validate_topic_name

from ftkd_core.canonical_cameras import CAMERA_MODELS
from ftkd_core.classes import CAMERA_CHANNELS
from ftkd_core.errors import UserError
from ftkd_core.runtime import RUNTIMES
from ftkd_ros.convert.calibration import IMAGE_GEOMETRIES
from ftkd_ros.sync.assembly import REFERENCE_TIMES

SYNC_POLICIES: Final = ("surround", "approximate", "exact")
IMAGE_TRANSPORTS: Final = ("compressed", "raw")
RELIABILITIES: Final = ("best_effort", "reliable")
_TOPIC_OF_TRANSPORT: Final = {"compressed": "/{camera}/image/compressed", "raw": "/{camera}/image"}

DESCRIPTIONS: Final[dict[str, str]] = {
    "weights": "weights file; empty: the shipped weights",
    "preset": "required preset of the weights; empty: any",
    "device": "auto (a GPU if available), cpu, cuda or cuda:N",
    "runtime": "fast, plain (slower reference), or auto: fast on a CPU, plain on a GPU",
    "score_threshold": "minimum score of published detections, 0..1",
    "max_detections": "maximum number of detections per round",
    "cameras": "camera names in the order of the model's channels; they replace {camera} in topics",
    "image_transport": "compressed (sensor_msgs/CompressedImage) or raw (sensor_msgs/Image)",
    "image_topic": "image topic of each camera; empty: /{camera}/image/compressed, for raw /{camera}/image",
    "camera_info_topic": "camera_info topic of each camera",
    "image_geometry": "rectified (images fit P), raw (they fit K and D), or auto: by topic and D",
    "camera_model": "virtual (cameras as in training), as_is, or auto: virtual for cameras that differ",
    "qos_reliability": "best_effort (sensor data) or reliable (replay without losses)",
    "queue_depth": "queue depth of the subscriptions to cameras",
    "base_frame": "frame of the detections: the vehicle, x forward, y left, z up",
    "map_frame": "frame fixed to the ground: map or odom",
    "tf_timeout_s": "maximum wait per round for camera_info and tf, in seconds",
    "tf_cache_s": "length of the tf buffer in seconds",
    "sync_policy": "surround (time offsets and deadline), or approximate or exact of message_filters",
    "sync_slop_s": "maximum stamp difference in a round after offsets, in seconds; <= 0.4 of the period",
    "sync_deadline_s": "seconds after which an incomplete round is processed without the missing cameras "
    "(policy surround)",
    "camera_time_offsets_s": "exposure of each camera after the trigger, in seconds; empty: estimated",
    "min_cameras": "minimum number of cameras in a round; 0: half of the cameras",
    "reference_time": "time of the detections: latest exposure, exposure of the anchor camera, or mean",
    "anchor_camera": "camera of reference_time anchor; empty: the first camera",
    "memory_max_gap_s": "a longer gap between rounds, in seconds, resets the memory",
    "memory_max_speed": "a faster pose change, in m/s, starts a new scene and resets the memory",
    "publish_markers": "publish RViz markers",
    "publish_images": "publish bird_eye and surround images (drawn only if the topic has a subscriber)",
    "marker_min_score": "minimum score of detections in markers and images",
    "marker_lifetime_s": "lifetime of markers in seconds; at least two detector cycles",
    "summary_file": "JSON file with counters and latency, written at shutdown; empty: none",
    "autostart": "configure and activate at start; false: wait for lifecycle transitions",
}


@dataclass(frozen=True, kw_only=True)
class DetectorParameters:
    """Validated parameters; see DESCRIPTIONS.

    Raises UserError with one sentence that names parameter and value.
    """

    weights: str = ""
    preset: str = ""
    device: str = "auto"
    runtime: str = "auto"
    score_threshold: float = 0.05
    max_detections: int = 300
    cameras: tuple[str, ...] = tuple(channel.lower() for channel in CAMERA_CHANNELS)
    image_transport: str = "compressed"
    image_topic: str = ""
    camera_info_topic: str = "/{camera}/camera_info"
    image_geometry: str = "auto"
    camera_model: str = "auto"
    qos_reliability: str = "best_effort"
    queue_depth: int = 10
    base_frame: str = "base_link"
    map_frame: str = "map"
    tf_timeout_s: float = 0.1
    tf_cache_s: float = 30.0
    sync_policy: str = "surround"
    sync_slop_s: float = 0.02
    sync_deadline_s: float = 0.1
    camera_time_offsets_s: tuple[float, ...] = ()
    min_cameras: int = 0
    reference_time: str = "latest"
    anchor_camera: str = ""
    memory_max_gap_s: float = 3.0
    memory_max_speed: float = 70.0
    publish_markers: bool = True
    publish_images: bool = True
    marker_min_score: float = 0.25
    marker_lifetime_s: float = 1.0
    summary_file: str = ""
    autostart: bool = True

    def __post_init__(self) -> None:
        self._check_ranges()
        self._check_choices()
        self._check_cameras()
        if self.weights and not Path(self.weights).is_file():
            raise UserError(
                f"parameter weights: no file {self.weights!r}; leave it empty for the shipped weights"
            )
        if self.summary_file and not _is_writable_folder(Path(self.summary_file).resolve().parent):
            raise UserError(
                f"parameter summary_file: the folder of {self.summary_file!r} cannot be written to"
            )

    @property
    def image_topics(self) -> tuple[str, ...]:
        """Image topic of each camera."""
        pattern = self.image_topic or _TOPIC_OF_TRANSPORT[self.image_transport]
        return tuple(pattern.replace("{camera}", camera) for camera in self.cameras)

    @property
    def camera_info_topics(self) -> tuple[str, ...]:
        """camera_info topic of each camera."""
        return tuple(self.camera_info_topic.replace("{camera}", camera) for camera in self.cameras)

    @property
    def anchor(self) -> int:
        """Index of the anchor camera."""
        return self.cameras.index(self.anchor_camera) if self.anchor_camera else 0

    @property
    def min_round_cameras(self) -> int:
        """Minimum number of cameras in a round."""
        return self.min_cameras or max(1, len(self.cameras) // 2)

    def _check_ranges(self) -> None:
        for name in ("score_threshold", "marker_min_score"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"parameter {name}: {getattr(self, name)}; expected 0 to 1")
        for name in (
            "tf_cache_s",
            "sync_deadline_s",
            "memory_max_gap_s",
            "memory_max_speed",
            "marker_lifetime_s",
        ):
            if not 0 < getattr(self, name) < 1e6:
                raise UserError(f"parameter {name}: {getattr(self, name)}; expected a number above 0")
        for name in ("tf_timeout_s", "sync_slop_s"):
            if not 0 <= getattr(self, name) <= 10:
                raise UserError(f"parameter {name}: {getattr(self, name)}; expected 0 to 10 seconds")
        for name in ("max_detections", "queue_depth"):
            if not 1 <= getattr(self, name) <= 1000:
                raise UserError(f"parameter {name}: {getattr(self, name)}; expected 1 to 1000")

    def _check_choices(self) -> None:
        choices = {
            "runtime": RUNTIMES,
            "image_transport": IMAGE_TRANSPORTS,
            "image_geometry": IMAGE_GEOMETRIES,
            "camera_model": CAMERA_MODELS,
            "qos_reliability": RELIABILITIES,
            "sync_policy": SYNC_POLICIES,
            "reference_time": REFERENCE_TIMES,
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise UserError(f"parameter {name}: {getattr(self, name)!r}; expected {' or '.join(allowed)}")
        for name in ("base_frame", "map_frame"):
            if not getattr(self, name) or getattr(self, name).startswith("/"):
                raise UserError(
                    f"parameter {name}: {getattr(self, name)!r}; expected a frame name without leading slash"
                )

    def _check_cameras(self) -> None:
        count = len(self.cameras)
        if count == 0 or len(set(self.cameras)) != count or not all(self.cameras):
            raise UserError(
                f"parameter cameras: {list(self.cameras)}; expected at least one name, all different"
            )
        for name, topics in (
            ("image_topic", self.image_topics),
            ("camera_info_topic", self.camera_info_topics),
        ):
            if len(set(topics)) != count:
                raise UserError(
                    f"parameter {name}: {count} cameras would share {topics[0]!r}; use {{camera}} in it"
                )
            for topic in topics:
                _check_topic(name, topic)
        if self.camera_time_offsets_s and len(self.camera_time_offsets_s) != count:
            raise UserError(
                f"parameter camera_time_offsets_s: {len(self.camera_time_offsets_s)} values for {count} "
                "cameras; "
                "expected one per camera in the order of cameras, or none to estimate them"
            )
        if not all(abs(offset) <= 10 for offset in self.camera_time_offsets_s):
            raise UserError(
                f"parameter camera_time_offsets_s: {list(self.camera_time_offsets_s)}; "
                "expected seconds within +-10"
            )
        if not 0 <= self.min_cameras <= count:
            raise UserError(
                f"parameter min_cameras: {self.min_cameras}; expected 0 to {count}, the number of cameras"
            )
        if self.anchor_camera and self.anchor_camera not in self.cameras:
            raise UserError(
                f"parameter anchor_camera: {self.anchor_camera!r}; expected one of {', '.join(self.cameras)}"
            )


def declare_parameters(node: Node) -> DetectorParameters:
    """Declare all parameters on the node and return their values. Raises UserError for a bad value."""
    values: dict[str, Any] = {}
    for entry in fields(DetectorParameters):
        # dynamic_typing, because rclpy would refuse `sync_slop_s: 1` and cannot type an empty list.
        descriptor = ParameterDescriptor(
            name=entry.name, description=DESCRIPTIONS[entry.name], read_only=True, dynamic_typing=True
        )
        default: Any = list(entry.default) or None if isinstance(entry.default, tuple) else entry.default
        given = node.declare_parameter(entry.name, default, descriptor).value
        values[entry.name] = _typed(entry.name, given, entry.default)
    return DetectorParameters(**values)


def _typed(name: str, given: Any, default: Any) -> Any:
    """Return the value with the type of the default; YAML and the command line may yield int for float."""
    if isinstance(default, tuple):
        sample: Any = default[0] if default else 0.0
        items = [] if given is None else given
        if isinstance(items, str) or not isinstance(items, Sequence):
            raise UserError(f"parameter {name}: {given!r}; expected a list")
        return tuple(_typed(name, item, sample) for item in items)
    if isinstance(default, float) and type(given) is int:
        return float(given)
    if type(given) is not type(default):
        raise UserError(
            f"parameter {name}: {given!r} is a {type(given).__name__}; expected a {type(default).__name__}"
        )
    return given


def _check_topic(name: str, topic: str) -> None:
    """Raise UserError if ROS refuses the topic name."""
    try:
        validate_topic_name(topic)
    except InvalidTopicNameException as error:
        reason = str(error).splitlines()[0].removeprefix("Invalid topic name: ")
        raise UserError(f"parameter {name}: {topic!r} is not a topic name: {reason}") from None


def _is_writable_folder(folder: Path) -> bool:
    return folder.is_dir() and os.access(folder, os.W_OK)
