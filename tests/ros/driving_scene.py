# SPDX-License-Identifier: Apache-2.0
"""A short drive as nuScenes tables: six cameras at 12 Hz, a lidar, key frames at 2 Hz and one car.

Images are JPEG files of noise, with a minimum file size if required.
"""

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from ftkd_core.classes import CAMERA_CHANNELS
from ftkd_core.geometry import make_transform, rotation_to_quaternion, yaw_transform

VERSION = "v1.0-drive"
SCENE = "scene-0001"
START_US = 1_700_000_000_000_000
SWEEP_US = 83_333
SWEEPS_PER_KEY = 6
OFFSETS_US = {
    "CAM_FRONT_LEFT": 0,
    "CAM_FRONT": 7_600,
    "CAM_FRONT_RIGHT": 15_500,
    "CAM_BACK_RIGHT": 23_000,
    "CAM_BACK": 32_700,
    "CAM_BACK_LEFT": 42_600,
    "LIDAR_TOP": 43_100,
}
SPEED_M_S, TURN_RAD_S = 8.0, 0.2
CAR_SPEED_M_S = 3.0
WIDTH, HEIGHT = 64, 36


def ego_pose(stamp_us: int) -> NDArray[np.float64]:
    """Return global_from_ego (4, 4) of a circular drive at constant speed on a slightly rising road."""
    seconds = (stamp_us - START_US) / 1e6
    yaw, radius = TURN_RAD_S * seconds, SPEED_M_S / TURN_RAD_S
    position = (600 + radius * np.sin(yaw), 1600 + radius * (1 - np.cos(yaw)), 0.3)
    pitch = make_transform([np.cos(0.01), 0.0, np.sin(0.01), 0.0])
    pose: NDArray[np.float64] = yaw_transform(yaw, position) @ pitch
    return pose


def write_drive(root: Path, *, sweeps: int = 13, image_bytes: int = 0, seed: int = 0) -> Path:
    """Write a data set of `sweeps` rounds to `root` and return `root`; images have at least `image_bytes`."""
    tables: dict[str, list[dict[str, Any]]] = {
        name: [] for name in ("scene", "sample", "sample_data", "ego_pose", "sensor", "calibrated_sensor")
    }
    keys = list(range(0, sweeps, SWEEPS_PER_KEY))
    samples = [f"sample{key}" for key in keys]
    for number, key in enumerate(keys):
        stamp = START_US + key * SWEEP_US + OFFSETS_US["LIDAR_TOP"]
        tables["sample"].append(
            {"token": samples[number], "timestamp": stamp, "scene_token": "scene", **_links(samples, number)}
        )
    tables["scene"].append(
        {"token": "scene", "name": SCENE, "description": "", "log_token": "log", "nbr_samples": len(samples),
         "first_sample_token": samples[0], "last_sample_token": samples[-1]}
    )  # fmt: skip
    noise = np.random.default_rng(seed)
    for index, channel in enumerate((*CAMERA_CHANNELS, "LIDAR_TOP")):
        _add_sensor(tables, channel, index)
        _add_data(tables, root, channel, sweeps, image_bytes, noise)
    _add_car(tables, samples)
    _add_constant_tables(tables)
    (root / VERSION).mkdir(parents=True)
    (root / "maps").mkdir()
    cv2.imwrite(str(root / "maps" / "blank.png"), np.zeros((4, 4), dtype=np.uint8))
    for name, rows in tables.items():
        (root / VERSION / f"{name}.json").write_text(json.dumps(rows))
    return root


def _add_sensor(tables: dict[str, list[dict[str, Any]]], channel: str, index: int) -> None:
    camera = channel != "LIDAR_TOP"
    to_optical = np.array([[0.0, 0.0, 1.0], [-1.0, 0.0, 0.0], [0.0, -1.0, 0.0]])
    pose = yaw_transform(index * np.pi / 3, (1.5, 0.1 * index, 1.6)) @ make_transform(to_optical)
    tables["sensor"].append(
        {"token": channel, "channel": channel, "modality": "camera" if camera else "lidar"}
    )
    tables["calibrated_sensor"].append(
        {"token": f"cs-{channel}", "sensor_token": channel, **_pose_fields(pose),
         "camera_intrinsic": [[50.0 + index, 0, 32.0], [0, 51.0, 18.0], [0, 0, 1.0]] if camera else []}
    )  # fmt: skip


def _add_data(
    tables: dict[str, list[dict[str, Any]]],
    root: Path,
    channel: str,
    sweeps: int,
    image_bytes: int,
    noise: np.random.Generator,
) -> None:
    camera = channel != "LIDAR_TOP"
    tokens = [f"{channel}-{sweep}" for sweep in range(sweeps)]
    (root / "samples" / channel).mkdir(parents=True)
    for sweep, token in enumerate(tokens):
        stamp = START_US + sweep * SWEEP_US + OFFSETS_US[channel]
        name = f"samples/{channel}/{stamp}.jpg" if camera else ""
        if camera:
            pixels = noise.integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)
            content = cv2.imencode(".jpg", pixels)[1].tobytes()
            # Bytes after the end-of-image marker do not affect the image.
            (root / name).write_bytes(content + noise.bytes(max(0, image_bytes - len(content))))
        next_key = min(
            -(-sweep // SWEEPS_PER_KEY) * SWEEPS_PER_KEY, (sweeps - 1) // SWEEPS_PER_KEY * SWEEPS_PER_KEY
        )
        tables["ego_pose"].append(
            {"token": f"p-{token}", "timestamp": stamp, **_pose_fields(ego_pose(stamp))}
        )
        tables["sample_data"].append(
            {"token": token, "sample_token": f"sample{next_key}", "ego_pose_token": f"p-{token}",
             "calibrated_sensor_token": f"cs-{channel}", "is_key_frame": sweep % SWEEPS_PER_KEY == 0,
             "filename": name, "fileformat": "jpg" if camera else "bin", "timestamp": stamp,
             "width": WIDTH if camera else 0, "height": HEIGHT if camera else 0, **_links(tokens, sweep)}
        )  # fmt: skip


def _add_car(tables: dict[str, list[dict[str, Any]]], samples: list[str]) -> None:
    """Add a car that drives along the global x axis."""
    tokens = [f"ann-{sample}" for sample in samples]
    tables["instance"] = [
        {"token": "car1", "category_token": "car", "nbr_annotations": len(tokens),
         "first_annotation_token": tokens[0], "last_annotation_token": tokens[-1]}
    ]  # fmt: skip
    rows = []
    for number, token in enumerate(tokens):
        seconds = number * SWEEPS_PER_KEY * SWEEP_US / 1e6
        pose = make_transform(None, (620 + CAR_SPEED_M_S * seconds, 1604, 1.0))
        rows.append(
            {"token": token, "sample_token": samples[number], "instance_token": "car1",
             "visibility_token": "4", "attribute_tokens": ["moving"], **_pose_fields(pose),
             "size": [1.9, 4.5, 1.6],
             "num_lidar_pts": 9, "num_radar_pts": 0, **_links(tokens, number)}
        )  # fmt: skip
    tables["sample_annotation"] = rows


def _add_constant_tables(tables: dict[str, list[dict[str, Any]]]) -> None:
    tables["category"] = [{"token": "car", "name": "vehicle.car", "description": ""}]
    tables["attribute"] = [{"token": "moving", "name": "vehicle.moving", "description": ""}]
    tables["visibility"] = [{"token": "4", "level": "v80-100", "description": ""}]
    tables["log"] = [{"token": "log", "logfile": "", "vehicle": "", "date_captured": "", "location": ""}]
    tables["map"] = [{"token": "map", "log_tokens": ["log"], "category": "", "filename": "maps/blank.png"}]


def _pose_fields(pose: NDArray[np.float64]) -> dict[str, list[float]]:
    return {"translation": pose[:3, 3].tolist(), "rotation": rotation_to_quaternion(pose[:3, :3]).tolist()}


def _links(tokens: list[str], index: int) -> dict[str, str]:
    return {
        "prev": tokens[index - 1] if index else "",
        "next": tokens[index + 1] if index + 1 < len(tokens) else "",
    }
