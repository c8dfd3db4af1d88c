# SPDX-License-Identifier: Apache-2.0
"""Descriptions, ranges and allowed values of the parameters of the detector node."""

from collections.abc import Sequence
from typing import Final

from ftkd_core.canonical_cameras import CAMERA_MODELS
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
    "score_threshold": (-1.0, 1.0),
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
UNKNOWN_THRESHOLD: Final = 0.25
"""Score threshold of weights without recommended ones."""

DESCRIPTIONS: Final[dict[str, str]] = {
    "weights": "weights file; empty: the shipped weights",
    "preset": "required preset of the weights; empty: any",
    "device": "auto (a GPU if available), cpu, cuda or cuda:N",
    "runtime": "engine: openvino, onnx, fast, plain (slower reference), or auto, the fastest proven one",
    "score_threshold": "minimum score of published detections, 0..1; -1: per class, as recommended for the "
    "weights",
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
    "map_frame": "frame fixed to the ground; auto: map or odom, whichever tf has",
    "odometry_topic": "nav_msgs/Odometry that replaces tf as the source of the vehicle pose; empty: tf",
    "calibration_file": "YAML file of camera_calibration that replaces camera_info, with {camera} in its "
    "name; empty: camera_info; a list has one entry per camera",
    "extrinsics_file": "URDF or YAML file with the frames of the cameras, for vehicles without /tf_static",
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
    "marker_min_score": "minimum score of published detections in markers and images",
    "marker_lifetime_s": "lifetime of markers in seconds; at least two detector cycles",
    "health_window_s": "diagnostics judge the rounds and images of this many seconds",
    "max_silence_s": "diagnostics report an error after this many seconds without a publication",
    "summary_file": "JSON file with counters and latency, written at shutdown; empty: none",
    "autostart": "configure and activate at start; false: wait for lifecycle transitions",
}
