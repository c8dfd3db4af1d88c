# SPDX-License-Identifier: Apache-2.0
"""Optional topics of a converted scene: lidar, radar, map and CAN bus; whatever is absent becomes a note.

| option | topic | type |
|---|---|---|
| lidar | /lidar_top/points | sensor_msgs/PointCloud2: x, y, z, intensity, ring |
| radar | /radar_front/points, ... | sensor_msgs/PointCloud2 with the fields of the PCD file |
| map | /map | nav_msgs/OccupancyGrid in frame map: 0 drivable or walkable, 100 other |
| can | /can/odometry, /can/imu, /can/NAME | nav_msgs/Odometry, sensor_msgs/Imu, std_msgs/String (JSON) |
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, Final

import cv2
import numpy as np
from numpy.typing import NDArray

from ftkd_core.data import nuscenes
from ftkd_core.errors import UserError
from ftkd_core.geometry import make_transform
from ftkd_ros.bag.events import Event, Topic
from ftkd_ros.bag.message_definitions import ROSBAGS
from ftkd_ros.bag.point_files import CloudFile, read_lidar, read_radar
from ftkd_ros.convert import to_ros

MAP_FRAME: Final = "map"
_MASK_M: Final = 0.1  # of the data set, per pixel
_CELL_M: Final = 0.5
_MARGIN_M: Final = 100.0
_RANK: Final = 8

Matrix = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Extras:
    """Which optional topics to write."""

    lidar: bool = False
    radar: bool = False
    map: bool = False
    can: bool = False

    def __str__(self) -> str:
        return ",".join(entry.name for entry in fields(self) if getattr(self, entry.name))


@dataclass(frozen=True)
class ExtraContent:
    """Topics and events to add to a bag, and a sentence about each thing that is absent."""

    topics: Sequence[Topic]
    events: Sequence[Event]
    notes: Sequence[str]


def extra_content(
    dataset: nuscenes.Dataset,
    scene: str,
    extras: Extras,
    poses: Sequence[tuple[int, Matrix]],
    *,
    sweeps: bool,
) -> ExtraContent:
    """Return the optional topics of a scene; nothing that is absent or damaged is an error."""
    topics: list[Topic] = []
    events: list[Event] = []
    notes: list[str] = []
    for wanted, modality, read in (
        (extras.lidar, "lidar", read_lidar),
        (extras.radar, "radar", read_radar),
    ):
        if wanted:
            parts = _clouds(dataset, scene, modality, read, notes, sweeps=sweeps)
            for topic, own in parts.items():
                topics.append(Topic(topic, "sensor_msgs/msg/PointCloud2"))
                events += own
    if extras.map and (grid := _grid(dataset, scene, poses, notes)) is not None:
        topics.append(Topic("/map", "nav_msgs/msg/OccupancyGrid", latched=True))
        events.append(Event(poses[0][0], 0, "/map", grid))
    if extras.can:
        for topic, message_type, own in _can(dataset, scene, notes):
            topics.append(Topic(topic, message_type))
            events += own
    return ExtraContent(topics, events, notes)


def _clouds(
    dataset: nuscenes.Dataset,
    scene: str,
    modality: str,
    read: Callable[[Path], CloudFile],
    notes: list[str],
    *,
    sweeps: bool,
) -> dict[str, list[Event]]:
    found: dict[str, list[Event]] = {}
    by_channel = {
        channel: nuscenes.sensor_files(dataset, scene, channel, keyframes_only=not sweeps)
        for channel in nuscenes.channels_of(dataset, modality)
    }
    if not any(by_channel.values()):
        notes.append(f"scene {scene!r} has no {modality} data")
    for channel, files in by_channel.items():
        topic, good, bad = f"/{channel.lower()}/points", [], []
        for file in files:
            try:
                read(file.path)  # now, so that a damaged file does not stop the bag half way
            except UserError as error:
                bad.append(str(error))
                continue
            build = partial(_cloud, file.path, read, file.stamp_ns, channel.lower())
            good.append(Event(file.stamp_ns, _RANK, topic, build))
        if bad:
            notes.append(
                f"scene {scene!r}: {len(bad)} of {len(files)} sweeps of {channel} left out; first: {bad[0]}"
            )
        if good:
            found[topic] = good
    return found


def _cloud(path: Path, read: Callable[[Path], CloudFile], stamp_ns: int, frame: str) -> Any:
    return to_ros.point_cloud(ROSBAGS, read(path).points, stamp_ns, frame)


def _grid(
    dataset: nuscenes.Dataset, scene: str, poses: Sequence[tuple[int, Matrix]], notes: list[str]
) -> Callable[[], Any] | None:
    """Return the function that builds the grid around the drive; None without a usable map."""
    path = nuscenes.map_mask(dataset, scene)
    mask = None if path is None else cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
    if mask is None:
        notes.append(f"scene {scene!r} has no map; /map is left out")
        return None
    positions = np.array([pose[:2, 3] for _, pose in poses])
    size_m = np.array(mask.shape[::-1]) * _MASK_M
    low = np.clip(np.floor((positions.min(0) - _MARGIN_M) / _CELL_M) * _CELL_M, 0, None)
    high = np.minimum(positions.max(0) + _MARGIN_M, size_m)
    cells = np.floor((high - low) / _CELL_M).astype(int)
    if (cells < 1).any():
        notes.append(f"scene {scene!r}: the map {str(path)!r} does not cover the drive; /map is left out")
        return None
    factor = round(_CELL_M / _MASK_M)
    left, bottom = (low / _MASK_M).round().astype(int)
    width, height = (cells * factor).tolist()
    rows = mask[mask.shape[0] - bottom - height : mask.shape[0] - bottom, left : left + width]
    share = (rows > 0).reshape(cells[1], factor, cells[0], factor).mean(axis=(1, 3))
    values = np.where(share[::-1] >= 0.5, 0, 100).astype(np.int8)  # row 0 of a grid is the bottom one
    return partial(to_ros.occupancy_grid, ROSBAGS, values, _CELL_M, low, poses[0][0], MAP_FRAME)


def _can(dataset: nuscenes.Dataset, scene: str, notes: list[str]) -> Iterator[tuple[str, str, list[Event]]]:
    """Yield topic, type and events of each message file of the CAN bus."""
    found = nuscenes.can_messages(dataset, scene)
    if not found:
        notes.append(f"scene {scene!r} has no CAN bus messages (folder can_bus)")
    for name, rows in found.items():
        if isinstance(rows, str):
            notes.append(f"scene {scene!r}: CAN bus left out: {rows}")
            continue
        topic, message_type, build = _CAN_TOPICS.get(name, (f"/can/{name}", "std_msgs/msg/String", _can_text))
        try:
            for row in rows:
                build(row)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            notes.append(f"scene {scene!r}: CAN bus {name} left out: {type(error).__name__}: {error}")
            continue
        yield (
            topic,
            message_type,
            [Event(row["utime"] * 1000, _RANK, topic, partial(build, row)) for row in rows],
        )


def _can_odometry(row: Mapping[str, Any]) -> Any:
    pose = make_transform(row["orientation"], row["pos"])
    linear, angular = np.array(row["vel"], dtype=float), np.array(row["rotation_rate"], dtype=float)
    return to_ros.make_odometry(
        ROSBAGS, row["utime"] * 1000, MAP_FRAME, "base_link", pose, linear.reshape(3), angular.reshape(3)
    )


def _can_imu(row: Mapping[str, Any]) -> Any:
    acceleration, rate = (np.array(row[name], dtype=float) for name in ("linear_accel", "rotation_rate"))
    return to_ros.make_imu(ROSBAGS, row["utime"] * 1000, "base_link", row["q"], acceleration, rate)


def _can_text(row: Mapping[str, Any]) -> Any:
    json.dumps(row, allow_nan=False)
    return to_ros.make_text(ROSBAGS, row)


_CAN_TOPICS: Final[dict[str, tuple[str, str, Callable[[Mapping[str, Any]], Any]]]] = {
    "pose": ("/can/odometry", "nav_msgs/msg/Odometry", _can_odometry),
    "ms_imu": ("/can/imu", "sensor_msgs/msg/Imu", _can_imu),
}
