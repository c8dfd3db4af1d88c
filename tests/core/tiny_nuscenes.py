# SPDX-License-Identifier: Apache-2.0
"""Data set of two scenes with three key frames each in the nuScenes tables, without images, for scoring."""

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from ftkd_core.geometry import make_transform, rotation_to_quaternion, yaw_transform

CATEGORIES = {
    "vehicle.car": "vehicle.moving",
    "human.pedestrian.adult": "pedestrian.moving",
    "movable_object.trafficcone": "",
    "static_object.bicycle_rack": "",
}
ATTRIBUTES = sorted(set(CATEGORIES.values()) - {""})
SAMPLES_PER_SCENE = 3
ACTORS = (("vehicle.car", 12.0, 3.0), ("vehicle.car", 25.0, -6.0), ("human.pedestrian.adult", 8.0, -5.0),
          ("movable_object.trafficcone", 15.0, 1.0), ("vehicle.car", -18.0, 2.0))  # fmt: skip
SIZES = {"vehicle.car": [1.9, 4.5, 1.6], "human.pedestrian.adult": [0.7, 0.7, 1.8],
         "movable_object.trafficcone": [0.4, 0.4, 1.0]}  # fmt: skip
SPEED_M_S = 2.0


def ego_pose(scene: int, sample: int) -> NDArray[np.float64]:
    """Return global_from_ego (4, 4) of a key frame."""
    position = (600.0 + 40 * scene + 5 * sample, 1600.0, 0.5)
    pose: NDArray[np.float64] = yaw_transform(0.7 * scene + 0.1 * sample, position)
    return pose


def write_tiny_nuscenes(root: Path, version: str = "v1.0-tiny") -> Path:
    """Write the tables below `root`/`version` and return `root`; scenes are scene-0001 and scene-0002."""
    tables: dict[str, list[dict[str, Any]]] = {
        "attribute": [{"token": f"a-{n}", "name": n, "description": ""} for n in ATTRIBUTES],
        "category": [{"token": f"c-{n}", "name": n, "description": ""} for n in CATEGORIES],
        "visibility": [{"token": "4", "level": "v80-100", "description": ""}],
        "sensor": [{"token": "lidar", "channel": "LIDAR_TOP", "modality": "lidar"}],
        "calibrated_sensor": [
            {"token": "cs", "sensor_token": "lidar", "translation": [0, 0, 0], "rotation": [1, 0, 0, 0],
             "camera_intrinsic": []}
        ],
        "log": [{"token": "log", "logfile": "tiny", "vehicle": "v", "date_captured": "", "location": "x"}],
        "map": [{"token": "map", "log_tokens": ["log"], "category": "", "filename": "maps/blank.png"}],
        "scene": [], "sample": [], "sample_data": [], "ego_pose": [], "instance": [], "sample_annotation": [],
    }  # fmt: skip
    for scene in range(2):
        _add_scene(tables, scene)
    folder = root / version
    folder.mkdir(parents=True)
    (root / "maps").mkdir()
    cv2.imwrite(str(root / "maps" / "blank.png"), np.zeros((4, 4), dtype=np.uint8))
    for name, rows in tables.items():
        (folder / f"{name}.json").write_text(json.dumps(rows))
    (folder / "splits.json").write_text(
        json.dumps({"held_out": ["scene-0002"], "all": ["scene-0001", "scene-0002"]})
    )
    return root


def _add_scene(tables: dict[str, list[dict[str, Any]]], scene: int) -> None:
    tokens = [f"s{scene}-{index}" for index in range(SAMPLES_PER_SCENE)]
    tables["scene"].append(
        {"token": f"scene{scene}", "name": f"scene-000{scene + 1}", "description": "", "log_token": "log",
         "nbr_samples": len(tokens), "first_sample_token": tokens[0], "last_sample_token": tokens[-1]}
    )  # fmt: skip
    for index, token in enumerate(tokens):
        stamp = 1_700_000_000_000_000 + scene * 10**9 + index * 500_000
        pose = ego_pose(scene, index)
        tables["ego_pose"].append(
            {"token": f"p-{token}", "timestamp": stamp, "translation": pose[:3, 3].tolist(),
             "rotation": rotation_to_quaternion(pose[:3, :3]).tolist()}
        )  # fmt: skip
        tables["sample"].append(
            {"token": token, "timestamp": stamp, "scene_token": f"scene{scene}", **_links(tokens, index)}
        )
        tables["sample_data"].append(
            {"token": f"d-{token}", "sample_token": token, "ego_pose_token": f"p-{token}",
             "is_key_frame": True, "calibrated_sensor_token": "cs", "filename": "", "fileformat": "bin",
             "timestamp": stamp, "height": 0, "width": 0, **_links([f"d-{t}" for t in tokens], index)}
        )  # fmt: skip
    for actor in range(len(ACTORS)):
        _add_track(tables, scene, actor, tokens)


def _add_track(tables: dict[str, list[dict[str, Any]]], scene: int, actor: int, samples: list[str]) -> None:
    """Add an object that drives along its heading; x and y are relative to ego at the first key frame."""
    category, x, y = ACTORS[actor]
    tokens = [f"ann{actor}-{sample}" for sample in samples]
    tables["instance"].append(
        {"token": f"i{actor}-{scene}", "category_token": f"c-{category}", "nbr_annotations": len(tokens),
         "first_annotation_token": tokens[0], "last_annotation_token": tokens[-1]}
    )  # fmt: skip
    attribute = CATEGORIES[category]
    for index, token in enumerate(tokens):
        speed = SPEED_M_S if attribute else 0.0
        pose = ego_pose(scene, 0) @ make_transform(None, (x + speed * 0.5 * index, y, 0.8))
        tables["sample_annotation"].append(
            {"token": token, "sample_token": samples[index], "instance_token": f"i{actor}-{scene}",
             "visibility_token": "4", "attribute_tokens": [f"a-{attribute}"] if attribute else [],
             "translation": pose[:3, 3].tolist(), "size": SIZES[category],
             "rotation": rotation_to_quaternion(pose[:3, :3]).tolist(), "num_lidar_pts": 10,
             "num_radar_pts": 0, **_links(tokens, index)}
        )  # fmt: skip


def _links(tokens: list[str], index: int) -> dict[str, str]:
    return {
        "prev": tokens[index - 1] if index else "",
        "next": tokens[index + 1] if index + 1 < len(tokens) else "",
    }
