# SPDX-License-Identifier: Apache-2.0
"""Facts about an evaluated run: its detector, libraries, scenes and time."""

import contextlib
import json
import platform
from collections.abc import Iterable
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from ftkd_core.errors import UserError
from ftkd_ros.bag.detect import SUMMARY_NAME

_DETECTOR_KEYS: Final = (
    "device", "weights", "training", "preset", "latency_ms", "parameters", "latency_timeline", "warnings"
)  # fmt: skip


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
        "selection": summary.get("selection", {}),
        "detector_faults": summary.get("faults", {}),
    }


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
