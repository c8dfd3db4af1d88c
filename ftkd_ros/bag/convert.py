# SPDX-License-Identifier: Apache-2.0
"""nuScenes scene -> rosbag2 (MCAP), without ROS.

Written are the topics of a vehicle that a detector needs, and the truth to compare with: camera JPEGs byte
for byte and camera_info, /tf at the ego pose of every exposure, latched /tf_static, /odom, /ground_truth/*,
/sample_token. Log time is the header's stamp. Messages of one moment are ordered so that whoever plays them
in order has the transform before the image that needs it.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation
from tqdm import tqdm

from ftkd_core.classes import CAMERA_CHANNELS
from ftkd_core.data import nuscenes
from ftkd_core.errors import UserError
from ftkd_ros.bag import message_builders as build
from ftkd_ros.bag.io import BagWriter, check_new

GLOBAL_FRAME: Final = "map"
EGO_FRAME: Final = "base_link"
# Poses carry millimetres of noise and exposures are 7 ms apart: speeds are taken over this much to either
# side.
_TWIST_WINDOW_NS: Final = 50_000_000
_SIGNATURES: Final = {b"\xff\xd8\xff": "jpeg", b"\x89PNG": "png"}

Pose = tuple[int, NDArray[np.float64]]


@dataclass(frozen=True, kw_only=True)
class ConversionSummary:
    """What a conversion wrote: the bag, its messages by topic, the seconds of driving and of work."""

    output: Path
    images: int
    key_frames: int
    messages: dict[str, int]
    image_bytes: int
    duration_s: float
    elapsed_s: float

    def __str__(self) -> str:
        return (
            f"{self.output}: {self.images} images, {self.key_frames} key frames, "
            f"{self.duration_s:.1f} s of driving, {self.image_bytes / 1e6:.0f} MB in {self.elapsed_s:.1f} s"
        )


class _Event(NamedTuple):
    """A message to be: when, its place among those of the same moment, where, and how to build it."""

    stamp_ns: int
    rank: int
    topic: str
    build: Callable[[], Any]


def convert_scene(
    dataroot: str | Path,
    version: str,
    scene: str,
    output: str | Path,
    *,
    sweeps: bool = True,
    channels: Sequence[str] = CAMERA_CHANNELS,
    progress: bool = True,
) -> ConversionSummary:
    """Write one scene as a bag: all images (12 Hz), or with `sweeps=False` those of key frames (2 Hz).

    Ego poses are written at every exposure of the cameras and the lidar either way. Raises UserError for a
    data set, scene or image that is missing or damaged and for an output that exists; the bag appears only
    when it is complete.
    """
    started = time.perf_counter()
    check_new(Path(output))
    dataset = nuscenes.open_dataset(dataroot, version)
    records = [
        record
        for channel in channels
        for record in nuscenes.camera_records(dataset, scene, channel, keyframes_only=not sweeps)
    ]
    if not records:
        raise UserError(f"scene {scene!r} has no image of {', '.join(channels)}; is the data set complete?")
    poses = nuscenes.ego_poses(dataset, scene, (*channels, nuscenes.LIDAR_CHANNEL))
    samples = nuscenes.scene_samples(dataset, scene)
    events = sorted(
        [
            *_static_events(min(poses[0][0], records[0].stamp_ns), nuscenes.sensor_poses(dataset, scene)),
            *_ego_events(poses),
            *(event for record in records for event in _camera_events(record)),
            *(event for token in samples for event in _sample_events(dataset, token)),
        ],
        key=lambda event: event[:2],
    )
    notes = {"dataset": version, "scene": scene, "images": "all" if sweeps else "key frames"}
    with BagWriter(output, notes=notes) as bag:
        _add_topics(bag, records)
        for event in tqdm(events, desc=f"converting {scene}", unit="msg", disable=not progress):
            bag.write(event.topic, event.stamp_ns, event.build())
    return ConversionSummary(
        output=Path(output),
        images=len(records),
        key_frames=len(samples),
        messages=dict(bag.counts),
        image_bytes=sum(record.path.stat().st_size for record in records),
        duration_s=(events[-1].stamp_ns - events[0].stamp_ns) / 1e9,
        elapsed_s=time.perf_counter() - started,
    )


def _add_topics(bag: BagWriter, records: list[nuscenes.CameraRecord]) -> None:
    bag.add_topic("/tf_static", "tf2_msgs/msg/TFMessage", depth=1, latched=True)
    bag.add_topic("/tf", "tf2_msgs/msg/TFMessage", depth=100)
    bag.add_topic("/odom", "nav_msgs/msg/Odometry", depth=100)
    for channel in dict.fromkeys(record.channel for record in records):
        bag.add_topic(_camera_topic(channel, "camera_info"), "sensor_msgs/msg/CameraInfo")
        bag.add_topic(_camera_topic(channel, "image/compressed"), "sensor_msgs/msg/CompressedImage")
    bag.add_topic("/ground_truth/detections", "vision_msgs/msg/Detection3DArray")
    bag.add_topic("/ground_truth/velocities", "sensor_msgs/msg/PointCloud2")
    bag.add_topic("/sample_token", "std_msgs/msg/Header")


def _static_events(stamp_ns: int, ego_from_sensor: dict[str, NDArray[np.float64]]) -> Iterator[_Event]:
    children = {channel.lower(): pose for channel, pose in ego_from_sensor.items()}
    yield _Event(stamp_ns, 0, "/tf_static", partial(build.transforms, stamp_ns, EGO_FRAME, children))


def _ego_events(poses: list[Pose]) -> Iterator[_Event]:
    for (stamp_ns, pose), (linear, angular) in zip(poses, ego_twists(poses), strict=True):
        moved = partial(build.transforms, stamp_ns, GLOBAL_FRAME, {EGO_FRAME: pose})
        odometry = partial(build.odometry, stamp_ns, GLOBAL_FRAME, EGO_FRAME, pose, linear, angular)
        yield _Event(stamp_ns, 1, "/tf", moved)
        yield _Event(stamp_ns, 2, "/odom", odometry)


def _camera_events(record: nuscenes.CameraRecord) -> Iterator[_Event]:
    stamp_ns, frame = record.stamp_ns, record.channel.lower()
    info = partial(build.camera_info, stamp_ns, frame, record.width, record.height, record.intrinsics)
    yield _Event(stamp_ns, 3, _camera_topic(record.channel, "camera_info"), info)
    yield _Event(
        stamp_ns,
        4,
        _camera_topic(record.channel, "image/compressed"),
        # The file is read when its turn comes: a scene has hundreds of megabytes.
        lambda: build.compressed_image(stamp_ns, frame, *_image_file(record.path)),
    )


def _sample_events(dataset: Any, token: str) -> Iterator[_Event]:
    truth = nuscenes.ground_truth(dataset, token)
    stamp_ns = truth.stamp_ns
    yield _Event(stamp_ns, 5, "/sample_token", partial(build.header, stamp_ns, token))
    yield _Event(stamp_ns, 6, "/ground_truth/detections", partial(build.detections, truth, EGO_FRAME))
    yield _Event(stamp_ns, 7, "/ground_truth/velocities", partial(build.velocities, truth, EGO_FRAME))


def ego_twists(poses: list[Pose]) -> list[tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """Velocity (3,) m/s and turn rate (3,) rad/s along the vehicle's axes at each pose.

    Differences over 50 ms to either side, or to the neighbours where these are further apart; zero for one
    pose.
    """
    stamps = np.array([stamp for stamp, _ in poses], dtype=np.int64)
    last = len(poses) - 1
    twists = []
    for index, (stamp_ns, pose) in enumerate(poses):
        before = min(int(np.searchsorted(stamps, stamp_ns - _TWIST_WINDOW_NS)), max(index - 1, 0))
        after = max(
            int(np.searchsorted(stamps, stamp_ns + _TWIST_WINDOW_NS, side="right")) - 1, min(index + 1, last)
        )
        seconds = (stamps[after] - stamps[before]) / 1e9
        if seconds <= 0:
            twists.append((np.zeros(3), np.zeros(3)))
            continue
        start, end = poses[before][1], poses[after][1]
        moved = (end[:3, 3] - start[:3, 3]) @ pose[:3, :3]
        turned = Rotation.from_matrix(start[:3, :3].T @ end[:3, :3]).as_rotvec()
        twists.append((moved / seconds, turned / seconds))
    return twists


def _camera_topic(channel: str, name: str) -> str:
    return f"/{channel.lower()}/{name}"


def _image_file(path: Path) -> tuple[bytes, str]:
    """Content and format of an image file. Raises UserError where it is missing or neither JPEG nor PNG."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"image {str(path)!r} cannot be read ({error.strerror}); copy this part of the data set again"
        ) from error
    for signature, image_format in _SIGNATURES.items():
        if content.startswith(signature):
            return content, image_format
    raise UserError(f"image {str(path)!r} is neither JPEG nor PNG; copy this part of the data set again")
