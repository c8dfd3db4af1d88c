# SPDX-License-Identifier: Apache-2.0
"""Rows of nuScenes tables that are built from a bag; tokens are hashes, so equal bags give equal tables."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ftkd_core.evaluation.results_check import ATTRIBUTE_NAMES
from ftkd_core.geometry import rotation_to_quaternion
from ftkd_core.json_files import write_json

CATEGORIES: Final[dict[str, str]] = {
    "car": "vehicle.car",
    "truck": "vehicle.truck",
    "bus": "vehicle.bus.rigid",
    "trailer": "vehicle.trailer",
    "construction_vehicle": "vehicle.construction",
    "pedestrian": "human.pedestrian.adult",
    "motorcycle": "vehicle.motorcycle",
    "bicycle": "vehicle.bicycle",
    "traffic_cone": "movable_object.trafficcone",
    "barrier": "movable_object.barrier",
}
"""nuScenes category of a detection class, for objects without a recorded category."""
_VISIBILITY: Final = {"1": "v0-40", "2": "v40-60", "3": "v60-80", "4": "v80-100"}
_TABLES: Final = (
    "attribute", "calibrated_sensor", "category", "ego_pose", "instance", "log", "map", "sample",
    "sample_annotation", "sample_data", "scene", "sensor", "visibility",
)  # fmt: skip

Row = dict[str, Any]
Matrix = NDArray[np.float64]


def token_of(*parts: object) -> str:
    """Return a token of 32 hexadecimal digits from what identifies a row."""
    return hashlib.sha256("/".join(map(str, parts)).encode()).hexdigest()[:32]


def pose_fields(pose: Matrix) -> Row:
    """Return translation and rotation (w, x, y, z) of a transform (4, 4)."""
    return {"translation": pose[:3, 3].tolist(), "rotation": rotation_to_quaternion(pose[:3, :3]).tolist()}


class NuscenesRows:
    """All tables of a data set in memory; `link` and `write` complete them."""

    def __init__(self) -> None:
        self.tables: dict[str, list[Row]] = {name: [] for name in _TABLES}
        self._once: set[str] = set()
        for key, level in _VISIBILITY.items():
            self.add("visibility", {"token": key, "level": level, "description": ""})
        for name in ATTRIBUTE_NAMES:
            self.add("attribute", {"token": token_of("attribute", name), "name": name, "description": ""})

    def add(self, table: str, row: Row) -> str:
        """Append a row and return its token."""
        self.tables[table].append(row)
        return str(row["token"])

    def add_once(self, table: str, row: Row) -> str:
        """Append a row unless the table has its token; return the token."""
        key = f"{table}/{row['token']}"
        if key not in self._once:
            self._once.add(key)
            self.add(table, row)
        return str(row["token"])

    def sensor(self, channel: str, modality: str) -> str:
        """Return the token of a sensor."""
        row = {"token": token_of("sensor", channel), "channel": channel, "modality": modality}
        return self.add_once("sensor", row)

    def calibration(self, channel: str, modality: str, pose: Matrix, intrinsics: Matrix | None) -> str:
        """Return the token of a calibration; a sensor that is moved or calibrated again gets another row."""
        matrix = [] if intrinsics is None else intrinsics.tolist()
        fields = pose_fields(pose)
        return self.add_once(
            "calibrated_sensor",
            {
                "token": token_of("calibrated_sensor", channel, fields, matrix),
                "sensor_token": self.sensor(channel, modality),
                **fields,
                "camera_intrinsic": matrix,
            },
        )

    def ego_pose(self, scene: str, stamp_ns: int, pose: Matrix) -> str:
        """Return the token of the ego pose at a time."""
        token = token_of("ego_pose", scene, stamp_ns)
        return self.add_once("ego_pose", {"token": token, "timestamp": to_us(stamp_ns), **pose_fields(pose)})

    def category(self, name: str) -> str:
        """Return the token of a category."""
        return self.add_once(
            "category", {"token": token_of("category", name), "name": name, "description": ""}
        )

    def write(self, folder: Path, splits: Mapping[str, Sequence[str]]) -> None:
        """Write all tables and splits.json to a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, rows in self.tables.items():
            write_json(folder / f"{name}.json", rows, indent=0, allow_nan=False)
        write_json(folder / "splits.json", splits)


def link(rows: Sequence[Row]) -> None:
    """Set `prev` and `next` of rows that follow each other."""
    for index, row in enumerate(rows):
        row["prev"] = rows[index - 1]["token"] if index else ""
        row["next"] = rows[index + 1]["token"] if index + 1 < len(rows) else ""


def to_us(stamp_ns: int) -> int:
    """Return the microseconds of nuScenes, rounded."""
    return (stamp_ns + 500) // 1000
