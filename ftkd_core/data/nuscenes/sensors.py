# SPDX-License-Identifier: Apache-2.0
"""Lidar and radar files, map masks and CAN bus of a nuScenes scene; all of them may be absent."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ftkd_core.data.nuscenes.cameras import sensor_rows
from ftkd_core.data.nuscenes.tables import NuScenes, scene_record

CAN_NAMES: Final = (
    "pose", "ms_imu", "steeranglefeedback", "vehicle_monitor", "zoe_veh_info", "zoesensors",
)  # fmt: skip
"""Message files of the CAN bus expansion; `route` and `meta` are no messages over time."""


@dataclass(frozen=True)
class SensorFile:
    """One sweep of a lidar or radar."""

    channel: str
    stamp_ns: int
    path: Path


def channels_of(dataset: NuScenes, modality: str) -> tuple[str, ...]:
    """Return the channels of a modality (lidar, radar) by name."""
    return tuple(sorted(str(row["channel"]) for row in dataset.sensor if row["modality"] == modality))


def sensor_files(
    dataset: NuScenes, scene_name: str, channel: str, *, keyframes_only: bool = False
) -> list[SensorFile]:
    """Return the sweeps of a sensor in time order, whether or not their files exist."""
    return [
        SensorFile(channel, int(row["timestamp"]) * 1000, Path(dataset.dataroot, row["filename"]))
        for row in sensor_rows(dataset, scene_name, channel)
        if row["is_key_frame"] or not keyframes_only
    ]


def map_mask(dataset: NuScenes, scene_name: str) -> Path | None:
    """Return the semantic mask of the scene's location, 0.1 m per pixel; None if the data set has none."""
    log = scene_record(dataset, scene_name)["log_token"]
    for row in dataset.map:
        path = Path(dataset.dataroot, row["filename"])
        if log in row["log_tokens"] and path.is_file():
            return path
    return None


def can_messages(dataset: NuScenes, scene_name: str) -> dict[str, list[dict[str, Any]] | str]:
    """Return the CAN messages of a scene by name, or why a file cannot be read; empty if there are none."""
    found: dict[str, list[dict[str, Any]] | str] = {}
    for name in CAN_NAMES:
        path = Path(dataset.dataroot, "can_bus", f"{scene_name}_{name}.json")
        if not path.is_file():
            continue
        try:
            rows = json.loads(path.read_text(encoding="utf-8"))
            found[name] = [{**row, "utime": int(row["utime"])} for row in rows]
        except (OSError, ValueError, KeyError, TypeError) as error:
            found[name] = f"{path.name}: {type(error).__name__}: {error}"
    return found


def scene_facts(dataset: NuScenes, scene_name: str) -> dict[str, str]:
    """Return token, description, location, vehicle, date and logfile of a scene."""
    scene = scene_record(dataset, scene_name)
    log = dataset.get("log", scene["log_token"])
    return {
        "name": str(scene["name"]),
        "token": str(scene["token"]),
        "description": str(scene["description"]),
        "location": str(log["location"]),
        "vehicle": str(log["vehicle"]),
        "date_captured": str(log["date_captured"]),
        "logfile": str(log["logfile"]),
        "version": str(dataset.version),
    }
