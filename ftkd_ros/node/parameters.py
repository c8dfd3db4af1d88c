# SPDX-License-Identifier: Apache-2.0
"""Parameters of the detector: names, defaults, ranges and checks; without ROS.

`declaration` declares them on the node; `ftkd detect` reads the same ones from YAML files and its command
line. Those in RUN_TIME can be changed while the node runs; for the others, edit the YAML or launch file and
restart the node.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Final

from ftkd_core.canonical_cameras import CAMERA_MODELS
from ftkd_core.classes import CAMERA_CHANNELS, CLASS_NAMES
from ftkd_core.errors import UserError
from ftkd_core.runtime import RUNTIMES
from ftkd_ros.convert.calibration import IMAGE_GEOMETRIES
from ftkd_ros.sync.assembly import REFERENCE_TIMES

SYNC_POLICIES: Final = ("auto", "surround", "anchor", "approximate", "exact")
IMAGE_TRANSPORTS: Final = ("compressed", "raw")
RELIABILITIES: Final = ("best_effort", "reliable")
CHOICES: Final[dict[str, Sequence[str]]] = {
    "runtime": RUNTIMES,
    "image_transport": IMAGE_TRANSPORTS,
    "image_geometry": IMAGE_GEOMETRIES,
    "camera_model": CAMERA_MODELS,
    "qos_reliability": RELIABILITIES,
    "sync_policy": SYNC_POLICIES,
    "reference_time": REFERENCE_TIMES,
}
"""Allowed values."""
RANGES: Final[dict[str, tuple[float, float]]] = {
    "score_threshold": (0.0, 1.0),
    "marker_min_score": (0.0, 1.0),
    "min_range_m": (0.0, 1e4),
    "max_range_m": (0.0, 1e4),
    "tf_timeout_s": (0.0, 10.0),
    "tf_cache_s": (0.1, 1e4),
    "sync_slop_s": (0.0, 10.0),
    "sync_deadline_s": (0.001, 100.0),
    "max_camera_time_diff_s": (0.001, 10.0),
    "memory_max_gap_s": (0.001, 1e4),
    "memory_max_speed": (0.001, 1e5),
    "marker_lifetime_s": (0.001, 1e4),
    "health_window_s": (1.0, 30.0),
    "max_silence_s": (0.1, 1e4),
    "max_detections": (1, 1000),
    "queue_depth": (1, 1000),
}
"""Smallest and largest value of each number."""
RUN_TIME: Final = (
    "score_threshold",
    "class_score_thresholds",
    "min_range_m",
    "max_range_m",
    "marker_min_score",
)
"""Parameters that can be changed while the node runs."""
_TEXT_OR_TEXTS: Final = ("image_transport", "image_topic", "camera_info_topic")
_TOPIC: Final = re.compile(r"(/|~/?)?[A-Za-z_]\w*(/[A-Za-z_]\w*)*", re.ASCII)
_TOPIC_OF_TRANSPORT: Final = {"compressed": "/{camera}/image/compressed", "raw": "/{camera}/image"}

DESCRIPTIONS: Final[dict[str, str]] = {
    "weights": "weights file; empty: the shipped weights",
    "preset": "required preset of the weights; empty: any",
    "device": "auto (a GPU if available), cpu, cuda or cuda:N",
    "runtime": "engine: openvino, onnx, fast, plain (slower reference), or auto, the fastest proven one",
    "score_threshold": "minimum score of published detections, 0..1",
    "class_score_thresholds": "minimum scores of single classes, such as [car=0.3, pedestrian=0.2]",
    "min_range_m": "minimum horizontal distance of published detections to base_frame, in m",
    "max_range_m": "maximum horizontal distance of published detections to base_frame, in m; 0: no limit",
    "max_detections": "maximum number of detections per round",
    "cameras": "camera names in the order of the model's channels; they replace {camera} in topics",
    "image_transport": "compressed (sensor_msgs/CompressedImage) or raw (sensor_msgs/Image); a list has one "
    "entry per camera",
    "image_topic": "image topic of each camera; empty: /{camera}/image/compressed, for raw /{camera}/image; "
    "a list has one entry per camera",
    "camera_info_topic": "camera_info topic of each camera; a list has one entry per camera",
    "image_geometry": "rectified (images fit P), raw (they fit K and D), or auto: by topic and D",
    "camera_model": "virtual (cameras as in training), as_is, or auto: virtual for cameras that differ",
    "qos_reliability": "best_effort (sensor data) or reliable (replay without losses)",
    "queue_depth": "queue depth of the subscriptions to cameras",
    "base_frame": "frame of the detections: the vehicle, x forward, y left, z up",
    "map_frame": "frame fixed to the ground: map or odom",
    "tf_timeout_s": "maximum wait per round for camera_info and tf, in seconds; ends when they arrive",
    "tf_cache_s": "length of the tf buffer in seconds",
    "sync_policy": "auto (chooses surround or anchor), surround (cameras of one rate), anchor (other rates, "
    "no trigger), or approximate or exact of message_filters",
    "sync_slop_s": "maximum stamp difference in a round after offsets, in seconds; surround limits it to 0.4 "
    "of the period",
    "sync_deadline_s": "seconds after the last expected exposure at which an incomplete round is processed "
    "(policy surround)",
    "max_camera_time_diff_s": "maximum stamp difference to the image of the anchor camera, in seconds "
    "(policy anchor)",
    "camera_time_offsets_s": "exposure of each camera after the trigger, in seconds; empty: estimated",
    "min_cameras": "minimum number of cameras in a round; 0: half of the cameras",
    "reference_time": "time of the detections: latest exposure, exposure of the anchor camera, or mean; "
    "policy anchor: exposure of the anchor camera, or mean",
    "anchor_camera": "camera of policy anchor and of reference_time anchor; empty: the first camera",
    "memory_max_gap_s": "a longer gap between rounds, in seconds, resets the memory",
    "memory_max_speed": "a faster pose change, in m/s, starts a new scene and resets the memory",
    "publish_markers": "publish RViz markers",
    "publish_images": "publish bird_eye and surround images (drawn only if the topic has a subscriber)",
    "marker_min_score": "minimum score of detections in markers and images",
    "marker_lifetime_s": "lifetime of markers in seconds; at least two detector cycles",
    "health_window_s": "diagnostics judge the rounds and images of this many seconds",
    "max_silence_s": "diagnostics report an error after this many seconds without a publication",
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
    class_score_thresholds: tuple[str, ...] = ()
    min_range_m: float = 0.0
    max_range_m: float = 0.0
    max_detections: int = 300
    cameras: tuple[str, ...] = tuple(channel.lower() for channel in CAMERA_CHANNELS)
    image_transport: str | tuple[str, ...] = "compressed"
    image_topic: str | tuple[str, ...] = ""
    camera_info_topic: str | tuple[str, ...] = "/{camera}/camera_info"
    image_geometry: str = "auto"
    camera_model: str = "auto"
    qos_reliability: str = "best_effort"
    queue_depth: int = 10
    base_frame: str = "base_link"
    map_frame: str = "map"
    tf_timeout_s: float = 0.5
    tf_cache_s: float = 30.0
    sync_policy: str = "auto"
    sync_slop_s: float = 0.02
    sync_deadline_s: float = 0.1
    max_camera_time_diff_s: float = 0.15
    camera_time_offsets_s: tuple[float, ...] = ()
    min_cameras: int = 0
    reference_time: str = "latest"
    anchor_camera: str = ""
    memory_max_gap_s: float = 3.0
    memory_max_speed: float = 70.0
    publish_markers: bool = True
    publish_images: bool = True
    marker_min_score: float = 0.25
    marker_lifetime_s: float = 2.5
    health_window_s: float = 10.0
    max_silence_s: float = 2.0
    summary_file: str = ""
    autostart: bool = True

    def __post_init__(self) -> None:
        self._check_ranges()
        self._check_names()
        self._check_choices()
        self._check_cameras()
        _ = self.class_thresholds
        if self.weights and not Path(self.weights).is_file():
            raise UserError(
                f"parameter weights: no file {self.weights!r}; leave it empty for the shipped weights"
            )
        if self.summary_file and not _is_writable_folder(Path(self.summary_file).resolve().parent):
            raise UserError(
                f"parameter summary_file: the folder of {self.summary_file!r} cannot be written to"
            )

    @property
    def image_transports(self) -> tuple[str, ...]:
        """Transport of each camera: compressed or raw."""
        return self._per_camera("image_transport")

    @property
    def image_topics(self) -> tuple[str, ...]:
        """Image topic of each camera."""
        return tuple(
            (pattern or _TOPIC_OF_TRANSPORT[transport]).replace("{camera}", camera)
            for pattern, transport, camera in zip(
                self._per_camera("image_topic"), self.image_transports, self.cameras, strict=True
            )
        )

    @property
    def camera_info_topics(self) -> tuple[str, ...]:
        """camera_info topic of each camera."""
        topics = zip(self._per_camera("camera_info_topic"), self.cameras, strict=True)
        return tuple(topic.replace("{camera}", camera) for topic, camera in topics)

    @property
    def class_thresholds(self) -> dict[str, float]:
        """Minimum score by class: `class_score_thresholds`, and `score_threshold` for the other classes."""
        found = dict.fromkeys(CLASS_NAMES, self.score_threshold)
        for text in self.class_score_thresholds:
            name, _, value = text.partition("=")
            if name.strip() not in found or not _is_share(value):
                raise UserError(
                    f"parameter class_score_thresholds: {text!r}; expected CLASS=SCORE with a score of 0 to 1"
                    f" and one of {', '.join(CLASS_NAMES)}"
                )
            found[name.strip()] = float(value)
        return found

    @property
    def anchor(self) -> int:
        """Index of the anchor camera."""
        return self.cameras.index(self.anchor_camera) if self.anchor_camera else 0

    @property
    def min_round_cameras(self) -> int:
        """Minimum number of cameras in a round."""
        return self.min_cameras or max(1, len(self.cameras) // 2)

    def _per_camera(self, name: str) -> tuple[str, ...]:
        value: str | tuple[str, ...] = getattr(self, name)
        values = (value,) * len(self.cameras) if isinstance(value, str) else value
        if len(values) != len(self.cameras):
            raise UserError(
                f"parameter {name}: {len(values)} values for {len(self.cameras)} cameras; expected one text "
                "for all cameras, or one per camera in the order of cameras"
            )
        return values

    def _check_ranges(self) -> None:
        for name, (lowest, highest) in RANGES.items():
            if not lowest <= getattr(self, name) <= highest:
                raise UserError(
                    f"parameter {name}: {getattr(self, name)}; expected {lowest:g} to {highest:g}"
                )
        if 0 < self.max_range_m <= self.min_range_m:
            raise UserError(
                f"parameter max_range_m: {self.max_range_m}; expected more than min_range_m "
                f"({self.min_range_m}), or 0 for no limit"
            )

    def _check_choices(self) -> None:
        for name, allowed in CHOICES.items():
            values = self._per_camera(name) if name == "image_transport" else (getattr(self, name),)
            for value in values:
                if value not in allowed:
                    raise UserError(f"parameter {name}: {value!r}; expected {' or '.join(allowed)}")
        for name in ("base_frame", "map_frame"):
            if not getattr(self, name) or getattr(self, name).startswith("/"):
                raise UserError(
                    f"parameter {name}: {getattr(self, name)!r}; expected a frame name without leading slash"
                )

    def _check_names(self) -> None:
        count = len(self.cameras)
        if count == 0 or len(set(self.cameras)) != count or not all(self.cameras):
            raise UserError(
                f"parameter cameras: {list(self.cameras)}; expected at least one name, all different"
            )

    def _check_cameras(self) -> None:
        count = len(self.cameras)
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


def changed_parameters(parameters: DetectorParameters, changes: Mapping[str, Any]) -> DetectorParameters:
    """Return the parameters with other values of RUN_TIME; other names are ignored. UserError as above."""
    defaults = {entry.name: entry.default for entry in fields(DetectorParameters)}
    typed = {
        name: typed_value(name, value, defaults[name]) for name, value in changes.items() if name in RUN_TIME
    }
    return replace(parameters, **typed)


def typed_parameters(values: Mapping[str, Any]) -> DetectorParameters:
    """Return the parameters with some values, such as those of JSON. UserError as above."""
    defaults = {entry.name: entry.default for entry in fields(DetectorParameters)}
    known = {name: value for name, value in values.items() if name in defaults}
    return DetectorParameters(
        **{name: typed_value(name, value, defaults[name]) for name, value in known.items()}
    )


def typed_value(name: str, given: Any, default: Any) -> Any:
    """Return the value with the type of the default; YAML and the command line may yield int for float."""
    if name in _TEXT_OR_TEXTS and not isinstance(given, str) and isinstance(given, Sequence):
        return tuple(typed_value(name, item, "") for item in given)
    if isinstance(default, tuple):
        sample: Any = default[0] if default else "" if name == "class_score_thresholds" else 0.0
        items = [] if given is None else given
        if isinstance(items, str) or not isinstance(items, Sequence):
            raise UserError(f"parameter {name}: {given!r}; expected a list")
        return tuple(typed_value(name, item, sample) for item in items)
    if isinstance(default, float) and type(given) is int:
        return float(given)
    if type(given) is not type(default):
        raise UserError(
            f"parameter {name}: {given!r} is a {type(given).__name__}; expected a {type(default).__name__}"
        )
    return given


def _check_topic(name: str, topic: str) -> None:
    """Raise UserError if ROS refuses the topic name."""
    if not _TOPIC.fullmatch(topic):
        raise UserError(
            f"parameter {name}: {topic!r} is not a topic name; expected parts of letters, digits and "
            "underscores between single slashes, none of which begins with a digit"
        )


def _is_share(text: str) -> bool:
    try:
        return 0.0 <= float(text) <= 1.0
    except ValueError:
        return False


def _is_writable_folder(folder: Path) -> bool:
    return folder.is_dir() and os.access(folder, os.W_OK)
