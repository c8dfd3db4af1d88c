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

from ftkd_core.classes import CAMERA_CHANNELS, CLASS_NAMES
from ftkd_core.errors import UserError
from ftkd_ros.node.parameter_tables import CHOICES, RANGES, RUN_TIME, UNKNOWN_THRESHOLD

_TEXT_OR_TEXTS: Final = ("image_transport", "image_topic", "camera_info_topic", "calibration_file")
_TOPIC: Final = re.compile(r"(/|~/?)?[A-Za-z_]\w*(/[A-Za-z_]\w*)*", re.ASCII)
_TOPIC_OF_TRANSPORT: Final = {"compressed": "/{camera}/image/compressed", "raw": "/{camera}/image"}


@dataclass(frozen=True, kw_only=True)
class DetectorParameters:
    """Validated parameters; see DESCRIPTIONS.

    Raises UserError with one sentence that names parameter and value.
    """

    weights: str = ""
    preset: str = ""
    device: str = "auto"
    runtime: str = "auto"
    score_threshold: float = -1.0
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
    map_frame: str = "auto"
    odometry_topic: str = ""
    calibration_file: str | tuple[str, ...] = ""
    extrinsics_file: str = ""
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
        self.class_thresholds({})
        if self.weights and not Path(self.weights).is_file():
            raise UserError(
                f"parameter weights: no file {self.weights!r}; leave it empty for the shipped weights"
            )
        for name, file in (
            *(("calibration_file", file) for file in self.calibration_files),
            ("extrinsics_file", Path(self.extrinsics_file) if self.extrinsics_file else None),
        ):
            if file is not None and not file.is_file():
                raise UserError(f"parameter {name}: no file {str(file)!r}")
        if self.odometry_topic:
            _check_topic("odometry_topic", self.odometry_topic)
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

    def class_thresholds(self, recommended: Mapping[str, float]) -> dict[str, float]:
        """Return the minimum score by class: `class_score_thresholds`, for the other classes
        `score_threshold`, and if that is negative the recommended one or 0.25."""
        if self.score_threshold < 0:
            found = {name: recommended.get(name, UNKNOWN_THRESHOLD) for name in CLASS_NAMES}
        else:
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
    def calibration_files(self) -> tuple[Path | None, ...]:
        """Calibration file of each camera; None: its camera_info is used."""
        files = zip(self._per_camera("calibration_file"), self.cameras, strict=True)
        return tuple(Path(file.replace("{camera}", camera)) if file else None for file, camera in files)

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
