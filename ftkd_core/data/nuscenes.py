# SPDX-License-Identifier: Apache-2.0
"""nuScenes as the rest of the system wants it: rounds of cameras, ground truth in ego, times in nanoseconds.

Everything is read through the official devkit's tables; its boxes, quaternions and microseconds stop here.
The same functions serve real nuScenes and the synthetic world, which is written in the same format. A *key
frame* (nuScenes "sample", 2 Hz) has annotations; a *sweep round* is one round of cameras, with or without
annotations (12 Hz).
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from nuscenes import NuScenes as NuScenes  # noqa: PLC0414  (re-exported: the devkit is imported in few places)
from nuscenes.eval.detection.utils import category_to_detection_name
from nuscenes.utils.splits import get_scenes_of_split

from ftkd_core.boxes import BOX_DIM, transform_boxes
from ftkd_core.classes import CAMERA_CHANNELS, CLASS_NAMES
from ftkd_core.errors import UserError
from ftkd_core.geometry import invert_rigid, make_transform
from ftkd_core.types import CameraRound, CameraView, ObjectList

LIDAR_CHANNEL: Final = "LIDAR_TOP"
TABLE_NAMES: Final[tuple[str, ...]] = (
    "attribute", "calibrated_sensor", "category", "ego_pose", "instance", "log", "map", "sample",
    "sample_annotation", "sample_data", "scene", "sensor", "visibility",
)  # fmt: skip
# Rounds follow a spinning lidar and are at least 50 ms apart once each camera's own offset is taken off; the
# jitter within one is a few milliseconds.
_ROUND_GAP_NS: Final = 25_000_000
_NAMES_IN_ERRORS: Final = 12


@dataclass(frozen=True, kw_only=True)
class CameraRecord:
    """One camera image of the data set, not yet read: where its JPEG lies and the geometry of its exposure.

    intrinsics (3, 3) pixels; ego_from_camera and global_from_ego (4, 4), the latter at stamp_ns, the moment
    of exposure. sample_token is the key frame it belongs to, or the next one when is_key_frame is False.
    """

    token: str
    channel: str
    sample_token: str
    is_key_frame: bool
    stamp_ns: int
    path: Path
    width: int
    height: int
    intrinsics: NDArray[np.float64]
    ego_from_camera: NDArray[np.float64]
    global_from_ego: NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class SweepRound:
    """One round of cameras; records in the order of the channels asked for, None where missing.

    sample_token names the key frame whose images these are, "" between key frames.
    """

    records: tuple[CameraRecord | None, ...]
    sample_token: str

    @property
    def newest(self) -> CameraRecord:
        """The record exposed last."""
        return max(
            (record for record in self.records if record is not None), key=lambda record: record.stamp_ns
        )


def find_tables(dataroot: str | Path, version: str) -> Path:
    """The folder of a data set's tables. Raises UserError where the folder, version or a table is missing."""
    root = Path(dataroot).expanduser()
    if not root.is_dir():
        raise UserError(
            f"data set folder {str(root)!r} does not exist; name the one that holds samples/ and {version}/"
        )
    versions = sorted(path.parent.name for path in root.glob("*/sample.json"))
    if version not in versions:
        found = f"has {_listed(versions)}" if versions else "holds no nuScenes version (no */sample.json)"
        raise UserError(f"version {version!r} not found: data set folder {str(root)!r} {found}")
    missing = [name for name in TABLE_NAMES if not (root / version / f"{name}.json").is_file()]
    if missing:
        raise UserError(
            f"data set {str(root / version)!r} lacks the tables {_listed(f'{name}.json' for name in missing)}"
        )
    return root / version


def open_dataset(dataroot: str | Path, version: str) -> NuScenes:
    """Load the tables of a data set. Raises UserError where the folder, version or a table is not usable."""
    root = find_tables(dataroot, version).parent
    try:
        return NuScenes(version=version, dataroot=str(root), verbose=False)
    except json.JSONDecodeError as error:
        raise UserError(
            f"a table of data set {str(root / version)!r} is not valid JSON ({error}); copy it again"
        ) from error
    except (AssertionError, KeyError, IndexError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(
            f"data set {str(root / version)!r} is incomplete or damaged ({reason}); copy it again"
        ) from error


def scene_names(dataset: NuScenes) -> list[str]:
    """Names of all scenes, in the order of the data set."""
    return [str(scene["name"]) for scene in dataset.scene]


def split_scenes(dataset: NuScenes, split: str) -> list[str]:
    """Names of the scenes of an official or custom (`splits.json`) split that this data set holds.

    Raises UserError for an unknown split or one with no scene here.
    """
    try:
        wanted = set(get_scenes_of_split(split, dataset))
    except (ValueError, AssertionError) as error:
        raise UserError(
            f"split {split!r} is neither an official nuScenes split nor one of "
            f"{_listed(_custom_splits(dataset))}, "
            f"the custom splits of data set {dataset.dataroot!r} {dataset.version}"
        ) from error
    names = [name for name in scene_names(dataset) if name in wanted]
    if not names:
        raise UserError(
            f"no scene of split {split!r} is in data set {dataset.dataroot!r} {dataset.version}, "
            f"which has {_listed(scene_names(dataset))}"
        )
    return names


def scene_samples(dataset: NuScenes, scene_name: str) -> list[str]:
    """Sample (key frame) tokens of a scene in time order. Raises UserError naming the scenes that exist."""
    token = str(_scene_record(dataset, scene_name)["first_sample_token"])
    tokens = []
    while token:
        tokens.append(token)
        token = str(dataset.get("sample", token)["next"])
    return tokens


def sample_stamp_ns(dataset: NuScenes, sample_token: str) -> int:
    """Stamp of a key frame: the end of its lidar sweep, for which its annotations hold."""
    return int(_sample_record(dataset, sample_token)["timestamp"]) * 1000


def sample_pose(dataset: NuScenes, sample_token: str) -> NDArray[np.float64]:
    """global_from_ego (4, 4) of a key frame: the ego pose of its LIDAR_TOP. Raises UserError without one."""
    data = _sample_record(dataset, sample_token)["data"]
    if LIDAR_CHANNEL not in data:
        raise UserError(f"sample {sample_token} has no {LIDAR_CHANNEL}, only {_listed(sorted(data))}")
    return _pose(dataset.get("ego_pose", dataset.get("sample_data", data[LIDAR_CHANNEL])["ego_pose_token"]))


def camera_round(
    dataset: NuScenes, sample_token: str, channels: Sequence[str] = CAMERA_CHANNELS
) -> CameraRound:
    """The images of a key frame, lidar stamp and pose being the reference; None for a camera it lacks.

    Raises UserError for an unknown channel, a key frame with none of the channels and an unreadable image.
    """
    _check_channels(dataset, channels)
    data = _sample_record(dataset, sample_token)["data"]
    records = [_camera_record(dataset, data[channel]) if channel in data else None for channel in channels]
    if not any(records):
        raise UserError(
            f"sample {sample_token} has none of the cameras {_listed(channels)}, only {_listed(sorted(data))}"
        )
    return CameraRound(
        views=tuple(None if record is None else load_view(record) for record in records),
        reference_stamp_ns=sample_stamp_ns(dataset, sample_token),
        global_from_ego=sample_pose(dataset, sample_token),
    )


def ground_truth(dataset: NuScenes, sample_token: str, *, min_points: int = 0) -> ObjectList:
    """Annotated objects of the ten classes in ego at the key frame's stamp, ids being instance tokens.

    Objects with fewer than `min_points` lidar and radar points are left out; the official metrics use 1.
    Velocity is the devkit's difference over neighbouring key frames, nan where it knows none.
    """
    sample = _sample_record(dataset, sample_token)
    boxes, labels, ids = [], [], []
    for token in sample["anns"]:
        annotation = dataset.get("sample_annotation", token)
        name = category_to_detection_name(annotation["category_name"])
        if name is None or annotation["num_lidar_pts"] + annotation["num_radar_pts"] < min_points:
            continue
        boxes.append(_global_box(dataset, annotation))
        labels.append(CLASS_NAMES.index(name))
        ids.append(str(annotation["instance_token"]))
    boxes_global = np.array(boxes, dtype=np.float64).reshape(-1, BOX_DIM)
    ego_from_global = invert_rigid(sample_pose(dataset, sample_token))
    boxes_ego = transform_boxes(torch.from_numpy(ego_from_global), torch.from_numpy(boxes_global))
    return ObjectList(
        boxes=boxes_ego.numpy(),
        scores=np.ones(len(labels)),
        labels=np.array(labels, dtype=np.int64),
        stamp_ns=int(sample["timestamp"]) * 1000,
        ids=tuple(ids),
    )


def camera_records(
    dataset: NuScenes, scene_name: str, channel: str, *, keyframes_only: bool = False
) -> list[CameraRecord]:
    """All images of one camera in a scene in time order (12 Hz), or those of key frames only (2 Hz)."""
    _check_channels(dataset, [channel])
    rows = _sensor_rows(dataset, scene_name, channel)
    return [
        _camera_record(dataset, row["token"]) for row in rows if row["is_key_frame"] or not keyframes_only
    ]


def sweep_rounds(
    dataset: NuScenes,
    scene_name: str,
    channels: Sequence[str] = CAMERA_CHANNELS,
    *,
    keyframes_only: bool = False,
) -> list[SweepRound]:
    """The images of a scene grouped in rounds of one exposure per camera, in time order.

    Each camera's usual delay before the key frame stamp is taken off first; what then lies within 25 ms is
    one round.
    """
    records = {
        name: camera_records(dataset, scene_name, name, keyframes_only=keyframes_only) for name in channels
    }
    aligned: list[tuple[int, CameraRecord]] = []
    for own in records.values():
        delays = [r.stamp_ns - sample_stamp_ns(dataset, r.sample_token) for r in own if r.is_key_frame]
        delay = int(np.median(delays)) if delays else 0
        aligned += [(record.stamp_ns - delay, record) for record in own]
    aligned.sort(key=lambda item: item[0])
    rounds: list[dict[str, CameraRecord]] = []
    start_ns = 0
    for stamp_ns, record in aligned:
        if not rounds or stamp_ns - start_ns > _ROUND_GAP_NS or record.channel in rounds[-1]:
            rounds.append({})
            start_ns = stamp_ns
        rounds[-1][record.channel] = record
    return [_sweep_round(group, channels) for group in rounds]


def load_sweep_round(sweep_round: SweepRound) -> CameraRound:
    """Read the images of a round; its newest exposure is the reference, as on a vehicle without a lidar."""
    newest = sweep_round.newest
    return CameraRound(
        views=tuple(None if record is None else load_view(record) for record in sweep_round.records),
        reference_stamp_ns=newest.stamp_ns,
        global_from_ego=newest.global_from_ego,
    )


def read_image(path: Path, *, half: bool = False) -> NDArray[np.uint8]:
    """An image file as RGB (h, w, 3), or at half its width and height, rounded up: a JPEG's coefficients
    give that at once, in half of the time. Raises UserError naming the file if missing or damaged."""
    mode = cv2.IMREAD_REDUCED_COLOR_2 if half else cv2.IMREAD_COLOR
    bgr = cv2.imread(str(path), mode) if path.is_file() else None
    if bgr is None:
        reason = "cannot be decoded" if path.is_file() else "is missing"
        raise UserError(f"image {str(path)!r} {reason}; copy this part of the data set again")
    return np.asarray(cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB), dtype=np.uint8)


def load_view(record: CameraRecord) -> CameraView:
    """Read one image as RGB. Raises UserError naming the file if missing, damaged or of another size."""
    image = read_image(record.path)
    if image.shape[:2] != (record.height, record.width):
        raise UserError(
            f"image {str(record.path)!r} is {image.shape[1]}x{image.shape[0]} but the data set says "
            f"{record.width}x{record.height}; its camera matrix would not fit"
        )
    return CameraView(
        image=image,
        intrinsics=record.intrinsics,
        ego_from_camera=record.ego_from_camera,
        global_from_ego=record.global_from_ego,
        stamp_ns=record.stamp_ns,
    )


def ego_poses(
    dataset: NuScenes,
    scene_name: str,
    channels: Sequence[str] = (*CAMERA_CHANNELS, LIDAR_CHANNEL),
    *,
    keyframes_only: bool = False,
) -> list[tuple[int, NDArray[np.float64]]]:
    """(stamp_ns, global_from_ego (4, 4)) at each exposure of the channels in time order, each stamp once."""
    poses = {}
    for channel in channels:
        for row in _sensor_rows(dataset, scene_name, channel):
            if row["is_key_frame"] or not keyframes_only:
                pose = dataset.get("ego_pose", row["ego_pose_token"])
                poses[int(row["timestamp"]) * 1000] = _pose(pose)
    return sorted(poses.items())


def sensor_poses(dataset: NuScenes, scene_name: str) -> dict[str, NDArray[np.float64]]:
    """ego_from_sensor (4, 4) by channel, of every sensor with data at the first key frame of the scene."""
    sample = dataset.get("sample", scene_samples(dataset, scene_name)[0])
    poses = {}
    for channel, token in sample["data"].items():
        row = dataset.get("sample_data", token)
        poses[str(channel)] = _pose(dataset.get("calibrated_sensor", row["calibrated_sensor_token"]))
    return poses


def _scene_record(dataset: NuScenes, scene_name: str) -> dict[str, Any]:
    for scene in dataset.scene:
        if scene["name"] == scene_name:
            record: dict[str, Any] = scene
            return record
    raise UserError(
        f"scene {scene_name!r} not found: data set {dataset.dataroot!r} {dataset.version} has "
        f"{_listed(scene_names(dataset))}"
    )


def _sample_record(dataset: NuScenes, sample_token: str) -> dict[str, Any]:
    try:
        record: dict[str, Any] = dataset.get("sample", sample_token)
    except KeyError as error:
        raise UserError(
            f"sample {sample_token!r} is not in data set {dataset.dataroot!r} {dataset.version}; "
            "was the token made with another data set or version?"
        ) from error
    return record


def _sensor_rows(dataset: NuScenes, scene_name: str, channel: str) -> Iterator[dict[str, Any]]:
    """The sample_data rows of one sensor in a scene in time order: back to the list's head, then forward."""
    datas = (dataset.get("sample", token)["data"] for token in scene_samples(dataset, scene_name))
    token = next((data[channel] for data in datas if channel in data), "")
    if not token:
        return
    while previous := dataset.get("sample_data", token)["prev"]:
        token = previous
    while token:
        row: dict[str, Any] = dataset.get("sample_data", token)
        yield row
        token = row["next"]


def _camera_record(dataset: NuScenes, token: str) -> CameraRecord:
    row = dataset.get("sample_data", token)
    calibration = dataset.get("calibrated_sensor", row["calibrated_sensor_token"])
    return CameraRecord(
        token=str(token),
        channel=str(row["channel"]),
        sample_token=str(row["sample_token"]),
        is_key_frame=bool(row["is_key_frame"]),
        stamp_ns=int(row["timestamp"]) * 1000,
        path=Path(dataset.dataroot, row["filename"]),
        width=int(row["width"]),
        height=int(row["height"]),
        intrinsics=np.array(calibration["camera_intrinsic"], dtype=np.float64),
        ego_from_camera=_pose(calibration),
        global_from_ego=_pose(dataset.get("ego_pose", row["ego_pose_token"])),
    )


def _sweep_round(group: dict[str, CameraRecord], channels: Sequence[str]) -> SweepRound:
    sample_token = next((record.sample_token for record in group.values() if record.is_key_frame), "")
    return SweepRound(records=tuple(group.get(channel) for channel in channels), sample_token=sample_token)


def _global_box(dataset: NuScenes, annotation: dict[str, Any]) -> list[float]:
    """House form of an annotation in global; nuScenes gives width, length, height and a quaternion."""
    width, length, height = annotation["size"]
    rotation = make_transform(annotation["rotation"])
    yaw = float(np.arctan2(rotation[1, 0], rotation[0, 0]))
    velocity = dataset.box_velocity(annotation["token"])[:2]
    return [*annotation["translation"], length, width, height, yaw, *velocity]


def _pose(record: dict[str, Any]) -> NDArray[np.float64]:
    pose: NDArray[np.float64] = make_transform(record["rotation"], record["translation"])
    return pose


def _check_channels(dataset: NuScenes, channels: Sequence[str]) -> None:
    known = [str(sensor["channel"]) for sensor in dataset.sensor if sensor["modality"] == "camera"]
    for channel in channels:
        if channel not in known:
            raise UserError(f"unknown camera {channel!r}; data set {dataset.dataroot!r} has {_listed(known)}")


def _custom_splits(dataset: NuScenes) -> list[str]:
    path = Path(dataset.table_root, "splits.json")
    return sorted(json.loads(path.read_text())) if path.is_file() else []


def _listed(names: Iterable[str]) -> str:
    """Names for an error message, shortened when there are many."""
    listed = list(names)
    shown = ", ".join(listed[:_NAMES_IN_ERRORS])
    return (
        f"{shown} and {len(listed) - _NAMES_IN_ERRORS} more"
        if len(listed) > _NAMES_IN_ERRORS
        else shown or "none"
    )
