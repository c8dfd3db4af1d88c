# SPDX-License-Identifier: Apache-2.0
"""Cameras of a nuScenes data set: image records, rounds, images and poses."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ftkd_core.classes import CAMERA_CHANNELS
from ftkd_core.data.nuscenes.image_files import read_image
from ftkd_core.data.nuscenes.table_checks import row_error
from ftkd_core.data.nuscenes.tables import (
    LIDAR_CHANNEL,
    NuScenes,
    list_names,
    pose_of,
    sample_pose,
    sample_record,
    sample_stamp_ns,
    scene_samples,
)
from ftkd_core.errors import UserError
from ftkd_core.lens import Lens, lens_of_row
from ftkd_core.types import CameraRound, CameraView

# Rounds follow a spinning lidar: they are at least 50 ms apart after each camera's offset is subtracted, and
# the jitter within a round is a few milliseconds.
_ROUND_GAP_NS: Final = 25_000_000


@dataclass(frozen=True, kw_only=True)
class CameraRecord:
    """One camera image of the data set that is not read yet: the path of its JPEG and the geometry of its
    exposure.

    intrinsics (3, 3) in pixels; lens, None for a rectified image; ego_from_camera (4, 4); global_from_ego
    (4, 4) at stamp_ns, the time of exposure. sample_token is its key frame, or the next key frame if
    is_key_frame is False.
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
    lens: Lens | None = None


@dataclass(frozen=True, kw_only=True)
class SweepRound:
    """One round of cameras; records in the order of the requested channels, None if missing.

    sample_token is the token of the key frame, or "" between key frames.
    """

    records: tuple[CameraRecord | None, ...]
    sample_token: str

    @property
    def newest(self) -> CameraRecord:
        """Record with the latest exposure."""
        return max(
            (record for record in self.records if record is not None), key=lambda record: record.stamp_ns
        )


def camera_round(
    dataset: NuScenes, sample_token: str, channels: Sequence[str] = CAMERA_CHANNELS
) -> CameraRound:
    """Load the images of a key frame; stamp and pose of its lidar are the reference. A missing camera is
    None.

    Raises UserError for an unknown channel, a key frame without any of the channels, and an unreadable image.
    """
    _check_channels(dataset, channels)
    data = sample_record(dataset, sample_token)["data"]
    records = [_camera_record(dataset, data[channel]) if channel in data else None for channel in channels]
    if not any(records):
        raise UserError(
            f"sample {sample_token} has none of the cameras {list_names(channels)}, "
            f"only {list_names(sorted(data))}"
        )
    return CameraRound(
        views=tuple(None if record is None else load_view(record) for record in records),
        reference_stamp_ns=sample_stamp_ns(dataset, sample_token),
        global_from_ego=sample_pose(dataset, sample_token),
    )


def camera_channels(dataset: NuScenes) -> tuple[str, ...]:
    """Return the cameras of a data set: those of nuScenes in the usual order, then others by name."""
    known = {str(sensor["channel"]) for sensor in dataset.sensor if sensor["modality"] == "camera"}
    usual = [channel for channel in CAMERA_CHANNELS if channel in known]
    return (*usual, *sorted(known.difference(usual)))


def camera_records(
    dataset: NuScenes, scene_name: str, channel: str, *, keyframes_only: bool = False
) -> list[CameraRecord]:
    """Return the images of one camera in a scene in time order: all (12 Hz) or only those of key frames (2
    Hz)."""
    _check_channels(dataset, [channel])
    rows = sensor_rows(dataset, scene_name, channel)
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
    """Group the images of a scene in rounds of one exposure per camera, in time order.

    The median delay of each camera before the key frame stamp is subtracted first; exposures within 25 ms
    then form one round.
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
    """Read the images of a round. The latest exposure is the reference, as on a vehicle without a lidar."""
    newest = sweep_round.newest
    return CameraRound(
        views=tuple(None if record is None else load_view(record) for record in sweep_round.records),
        reference_stamp_ns=newest.stamp_ns,
        global_from_ego=newest.global_from_ego,
    )


def load_view(record: CameraRecord) -> CameraView:
    """Read one image as RGB. Raises UserError with the path if it is missing, damaged or has an unexpected
    size."""
    image = read_image(record.path)
    if image.shape[:2] != (record.height, record.width):
        raise UserError(
            f"image {str(record.path)!r} is {image.shape[1]}x{image.shape[0]} but the tables give "
            f"{record.width}x{record.height}; the camera matrix does not fit this image"
        )
    return CameraView(
        image=image,
        intrinsics=record.intrinsics,
        ego_from_camera=record.ego_from_camera,
        global_from_ego=record.global_from_ego,
        stamp_ns=record.stamp_ns,
        lens=record.lens,
        name=record.channel,
    )


def ego_poses(
    dataset: NuScenes,
    scene_name: str,
    channels: Sequence[str] = (*CAMERA_CHANNELS, LIDAR_CHANNEL),
    *,
    keyframes_only: bool = False,
) -> list[tuple[int, NDArray[np.float64]]]:
    """Return (stamp_ns, global_from_ego (4, 4)) at each exposure of the channels in time order, without
    duplicates."""
    poses = {}
    for channel in channels:
        for row in sensor_rows(dataset, scene_name, channel):
            if row["is_key_frame"] or not keyframes_only:
                pose = dataset.get("ego_pose", row["ego_pose_token"])
                poses[int(row["timestamp"]) * 1000] = pose_of(pose)
    return sorted(poses.items())


def sensor_poses(dataset: NuScenes, scene_name: str) -> dict[str, NDArray[np.float64]]:
    """Return ego_from_sensor (4, 4) by channel for all sensors with data in the scene, as calibrated at the
    first key frame that has data of the sensor."""
    poses: dict[str, NDArray[np.float64]] = {}
    for sample_token in scene_samples(dataset, scene_name):
        for channel, token in dataset.get("sample", sample_token)["data"].items():
            if channel not in poses:
                row = dataset.get("sample_data", token)
                calibration = dataset.get("calibrated_sensor", row["calibrated_sensor_token"])
                poses[str(channel)] = pose_of(calibration)
    return poses


def sensor_rows(dataset: NuScenes, scene_name: str, channel: str) -> Iterator[dict[str, Any]]:
    """Yield the sample_data rows of one sensor in a scene in time order."""
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
    if not calibration["camera_intrinsic"]:
        raise row_error("calibrated_sensor", calibration, "camera_intrinsic", "the 3 x 3 matrix of a camera")
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
        ego_from_camera=pose_of(calibration),
        global_from_ego=pose_of(dataset.get("ego_pose", row["ego_pose_token"])),
        lens=lens_of_row(calibration),
    )


def _sweep_round(group: dict[str, CameraRecord], channels: Sequence[str]) -> SweepRound:
    sample_token = next((record.sample_token for record in group.values() if record.is_key_frame), "")
    return SweepRound(records=tuple(group.get(channel) for channel in channels), sample_token=sample_token)


def _check_channels(dataset: NuScenes, channels: Sequence[str]) -> None:
    known = [str(sensor["channel"]) for sensor in dataset.sensor if sensor["modality"] == "camera"]
    for channel in channels:
        if channel not in known:
            raise UserError(
                f"unknown camera {channel!r}; data set {dataset.dataroot!r} has {list_names(known)}"
            )
