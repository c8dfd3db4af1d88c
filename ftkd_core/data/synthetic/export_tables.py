# SPDX-License-Identifier: Apache-2.0
"""The 13 nuScenes tables: rows, tokens and linked lists.

A token is a hash of names, so the same scene always gets the same tokens, and two data sets that contain it
can be compared row by row.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ftkd_core.classes import CLASS_NAMES
from ftkd_core.geometry import rotation_to_quaternion, yaw_transform
from ftkd_core.lens import Lens, lens_columns

Row = dict[str, Any]

CATEGORY_OF_CLASS: Final[dict[str, str]] = {
    "car": "vehicle.car",
    "truck": "vehicle.truck",
    "construction_vehicle": "vehicle.construction",
    "bus": "vehicle.bus.rigid",
    "trailer": "vehicle.trailer",
    "barrier": "movable_object.barrier",
    "motorcycle": "vehicle.motorcycle",
    "bicycle": "vehicle.bicycle",
    "pedestrian": "human.pedestrian.adult",
    "traffic_cone": "movable_object.trafficcone",
}
_CATEGORIES: Final[dict[str, str]] = {
    "animal": "Any animal.",
    "human.pedestrian.adult": "Grown-up on foot.",
    "human.pedestrian.child": "Child on foot.",
    "human.pedestrian.construction_worker": "Worker of a construction site on foot.",
    "human.pedestrian.personal_mobility": "Person on a small device such as a scooter.",
    "human.pedestrian.police_officer": "Police officer on foot.",
    "human.pedestrian.stroller": "Stroller, with or without its pusher.",
    "human.pedestrian.wheelchair": "Wheelchair and its occupant.",
    "movable_object.barrier": "Temporary barrier that guides traffic.",
    "movable_object.debris": "Object on the road that must be driven around.",
    "movable_object.pushable_pullable": "Object that people push or pull, such as a bin.",
    "movable_object.trafficcone": "Traffic cone.",
    "static_object.bicycle_rack": "Area or device where bicycles are parked.",
    "vehicle.bicycle": "Bicycle, with its rider if there is one.",
    "vehicle.bus.bendy": "Bus of several sections with a joint.",
    "vehicle.bus.rigid": "Bus of one section.",
    "vehicle.car": "Car, van or similar.",
    "vehicle.construction": "Machine made for construction.",
    "vehicle.emergency.ambulance": "Ambulance.",
    "vehicle.emergency.police": "Police vehicle.",
    "vehicle.motorcycle": "Motorcycle or scooter, with its rider if there is one.",
    "vehicle.trailer": "Trailer behind a truck, car or bike.",
    "vehicle.truck": "Vehicle made to haul goods.",
}
_ATTRIBUTES: Final[dict[str, str]] = {
    "vehicle.moving": "The vehicle moves.",
    "vehicle.stopped": "The vehicle stands and is about to move.",
    "vehicle.parked": "The vehicle is parked.",
    "cycle.with_rider": "The cycle has a rider.",
    "cycle.without_rider": "The cycle has no rider.",
    "pedestrian.sitting_lying_down": "The person sits or lies.",
    "pedestrian.standing": "The person stands.",
    "pedestrian.moving": "The person moves.",
}
_VISIBILITIES: Final[dict[str, tuple[str, str]]] = {
    "1": ("v0-40", "visibility of whole object is between 0 and 40%"),
    "2": ("v40-60", "visibility of whole object is between 40 and 60%"),
    "3": ("v60-80", "visibility of whole object is between 60 and 80%"),
    "4": ("v80-100", "visibility of whole object is between 80 and 100%"),
}
_GROWING_TABLES: Final = (
    *("instance", "sensor", "calibrated_sensor", "ego_pose", "log"),
    *("scene", "sample", "map", "sample_data", "sample_annotation"),
)


@dataclass(frozen=True, kw_only=True)
class Annotation:
    """One object at one key frame: box (9,) in global, visible fraction, and number of lidar returns."""

    instance: int
    label: int
    attribute: str
    box_global: NDArray[np.float64]
    visible_fraction: float
    lidar_points: int


def make_token(*parts: object) -> str:
    """Return 32 hexadecimal digits that depend only on the parts."""
    name = "/".join(str(part) for part in ("ftkd-synthetic", *parts))
    return hashlib.md5(name.encode(), usedforsecurity=False).hexdigest()


def visibility_token(visible_fraction: float) -> str:
    """Return the visibility level "1".."4" for the visible fraction (0..1) of an object over all cameras."""
    return "1234"[int(np.searchsorted([0.4, 0.6, 0.8], visible_fraction, side="right"))]


def _fixed_rows() -> dict[str, list[Row]]:
    """Return the tables that are equal in all data sets; the others are empty."""
    return {
        "category": [
            {"token": make_token("category", name), "name": name, "description": text}
            for name, text in _CATEGORIES.items()
        ],
        "attribute": [
            {"token": make_token("attribute", name), "name": name, "description": text}
            for name, text in _ATTRIBUTES.items()
        ],
        "visibility": [
            {"token": token, "level": level, "description": text}
            for token, (level, text) in _VISIBILITIES.items()
        ],
        **{name: [] for name in _GROWING_TABLES},
    }


@dataclass
class DatasetTables:
    """All rows of a data set by table; `write` writes the files."""

    rows: dict[str, list[Row]] = field(default_factory=_fixed_rows)

    def add_log(self, logfile: str, *, vehicle: str, date: str, location: str, map_filename: str) -> str:
        """Add a log with its own map; return the log token."""
        token = make_token("log", logfile)
        self.rows["log"].append(
            {
                "token": token,
                "logfile": logfile,
                "vehicle": vehicle,
                "date_captured": date,
                "location": location,
            }
        )
        self.rows["map"].append(
            {
                "token": make_token("map", logfile),
                "category": "semantic_prior",
                "filename": map_filename,
                "log_tokens": [token],
            }
        )
        return token

    def add_calibrated_sensor(
        self,
        logfile: str,
        channel: str,
        ego_from_sensor: NDArray[np.float64],
        intrinsics: NDArray[np.float64] | None = None,
        lens: Lens | None = None,
    ) -> str:
        """Add the calibration (4, 4) of a sensor, a camera if it has intrinsics (3, 3); return its token.

        nuScenes has rectified images. The columns of a lens are ours and only written for one.
        """
        sensor_token = make_token("sensor", channel)
        if all(sensor["token"] != sensor_token for sensor in self.rows["sensor"]):
            modality = "lidar" if intrinsics is None else "camera"
            self.rows["sensor"].append({"token": sensor_token, "channel": channel, "modality": modality})
        token = make_token("calibrated_sensor", logfile, channel)
        self.rows["calibrated_sensor"].append(
            {
                "token": token,
                "sensor_token": sensor_token,
                **_pose_fields(ego_from_sensor),
                "camera_intrinsic": [] if intrinsics is None else intrinsics.tolist(),
                **({} if lens is None else lens_columns(lens)),
            }
        )
        return token

    def add_scene(self, name: str, description: str, log_token: str, stamps_us: Sequence[int]) -> list[str]:
        """Add a scene with its key frames; return their sample tokens."""
        scene_token = make_token("scene", name)
        samples: list[Row] = [
            {"token": make_token("sample", name, stamp), "timestamp": stamp, "scene_token": scene_token}
            for stamp in stamps_us
        ]
        self.rows["sample"] += link(samples)
        tokens = [str(sample["token"]) for sample in samples]
        self.rows["scene"].append(
            {
                "token": scene_token,
                "log_token": log_token,
                "nbr_samples": len(tokens),
                "first_sample_token": tokens[0],
                "last_sample_token": tokens[-1],
                "name": name,
                "description": description,
            }
        )
        return tokens

    def add_sample_data(self, scene_name: str, channel: str, rows: Sequence[Row]) -> None:
        """Add the recordings of one sensor in one scene, in time order.

        A row holds timestamp, sample_token, is_key_frame, calibrated_sensor_token, filename, fileformat,
        width, height (0 for lidar) and global_from_ego (4, 4), which is stored as an ego_pose row with the
        same token.
        """
        finished = []
        for row in rows:
            row = {"token": make_token("sample_data", scene_name, channel, row["timestamp"]), **row}
            pose = _pose_fields(row.pop("global_from_ego"))
            self.rows["ego_pose"].append({"token": row["token"], "timestamp": row["timestamp"], **pose})
            finished.append({**row, "ego_pose_token": row["token"]})
        self.rows["sample_data"] += link(finished)

    def add_annotations(
        self, scene_name: str, sample_tokens: Sequence[str], annotations: Sequence[Sequence[Annotation]]
    ) -> None:
        """Add the objects of each key frame of a scene; equal instance numbers are one instance."""
        by_instance: dict[int, list[Row]] = {}
        labels: dict[int, int] = {}
        for sample_token, objects in zip(sample_tokens, annotations, strict=True):
            for item in objects:
                row = _annotation_row(scene_name, sample_token, item)
                by_instance.setdefault(item.instance, []).append(row)
                labels[item.instance] = item.label
        for instance, rows in by_instance.items():
            self.rows["sample_annotation"] += link(rows)
            category = CATEGORY_OF_CLASS[CLASS_NAMES[labels[instance]]]
            self.rows["instance"].append(
                {
                    "token": make_token("instance", scene_name, instance),
                    "category_token": make_token("category", category),
                    "nbr_annotations": len(rows),
                    "first_annotation_token": rows[0]["token"],
                    "last_annotation_token": rows[-1]["token"],
                }
            )

    def write(self, folder: Path) -> None:
        """Write one JSON file per table into `folder`, which is created."""
        folder.mkdir(parents=True)
        for name, rows in self.rows.items():
            lines = ",\n".join(json.dumps(row) for row in rows)
            (folder / f"{name}.json").write_text(f"[\n{lines}\n]\n")


def link(rows: Iterable[Row]) -> list[Row]:
    """Set `prev` and `next` of rows to the tokens of their neighbours, "" at the ends."""
    linked = list(rows)
    tokens = ["", *(str(row["token"]) for row in linked), ""]
    for index, row in enumerate(linked):
        row["prev"], row["next"] = tokens[index], tokens[index + 2]
    return linked


def _annotation_row(scene_name: str, sample_token: str, item: Annotation) -> Row:
    x, y, z, length, width, height, yaw = (float(value) for value in item.box_global[:7])
    return {
        "token": make_token("sample_annotation", sample_token, item.instance),
        "sample_token": sample_token,
        "instance_token": make_token("instance", scene_name, item.instance),
        "visibility_token": visibility_token(item.visible_fraction),
        "attribute_tokens": [make_token("attribute", item.attribute)] if item.attribute else [],
        "translation": [x, y, z],
        "size": [width, length, height],
        "rotation": rotation_to_quaternion(yaw_transform(yaw)[:3, :3]).tolist(),
        "num_lidar_pts": item.lidar_points,
        "num_radar_pts": 0,
    }


def _pose_fields(dst_from_src: NDArray[np.float64]) -> Row:
    return {
        "rotation": rotation_to_quaternion(dst_from_src[:3, :3]).tolist(),
        "translation": [float(value) for value in dst_from_src[:3, 3]],
    }
