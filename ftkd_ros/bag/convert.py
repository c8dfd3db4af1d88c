# SPDX-License-Identifier: Apache-2.0
"""nuScenes scene -> rosbag2 (MCAP), without ROS.

The bag contains the topics that a detector needs, and the ground truth: unchanged camera JPEGs with
camera_info, /tf at every exposure, latched /tf_static, /odom, /ground_truth/*, /sample_token and /scene;
lidar, radar, map and CAN bus on request. The log time
of a message is its header stamp. Among messages of equal stamp, transforms precede the images that need them.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation
from tqdm import tqdm

from ftkd_core.data import nuscenes
from ftkd_core.errors import UserError
from ftkd_ros.bag.convert_extras import Extras, extra_content
from ftkd_ros.bag.events import Event
from ftkd_ros.bag.io import BagWriter, check_new
from ftkd_ros.bag.message_definitions import ROSBAGS
from ftkd_ros.convert import to_ros
from ftkd_ros.convert.markers import objects_to_markers

GLOBAL_FRAME: Final = "map"
EGO_FRAME: Final = "base_link"
# Poses have millimetres of noise and exposures are 7 ms apart, so velocities are differences over +-50 ms.
_TWIST_WINDOW_NS: Final = 50_000_000
_MARKER_S: Final = 1.0  # two key frames
_SIGNATURES: Final = {b"\xff\xd8\xff": "jpeg", b"\x89PNG": "png"}

Pose = tuple[int, NDArray[np.float64]]


@dataclass(frozen=True, kw_only=True)
class ConversionSummary:
    """Content of a converted bag: messages by topic, durations of scene and conversion in seconds."""

    output: Path
    scene: str
    images: int
    key_frames: int
    messages: dict[str, int]
    image_bytes: int
    duration_s: float
    elapsed_s: float
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return (
            f"{self.output}: {self.images} images, {self.key_frames} key frames, "
            f"{self.duration_s:.1f} s of driving, {self.image_bytes / 1e6:.0f} MB in {self.elapsed_s:.1f} s "
            f"({self.images / max(self.elapsed_s, 1e-9):.0f} images/s, "
            f"{self.image_bytes / 1e6 / max(self.elapsed_s, 1e-9):.0f} MB/s)"
        )


def convert_scene(
    dataroot: str | Path,
    version: str,
    scene: str,
    output: str | Path,
    *,
    sweeps: bool = True,
    channels: Sequence[str] | None = None,
    extras: Extras | None = None,
    progress: bool = True,
) -> ConversionSummary:
    """Write one scene as a bag: all images (12 Hz), or with `sweeps=False` only those of key frames (2 Hz).

    channels: default all cameras of the data set. In both cases, the bag has the ego poses at every exposure
    of the cameras and the lidar. Raises UserError
    for a data set, scene or image that is missing or damaged and for an output that exists. A failed
    conversion leaves no bag.
    """
    check_new(Path(output))
    dataset = nuscenes.open_dataset(dataroot, version)
    return convert_opened(
        dataset, scene, output, sweeps=sweeps, channels=channels, extras=extras, progress=progress
    )


def convert_opened(
    dataset: nuscenes.Dataset,
    scene: str,
    output: str | Path,
    *,
    sweeps: bool = True,
    channels: Sequence[str] | None = None,
    extras: Extras | None = None,
    progress: bool = True,
) -> ConversionSummary:
    """Write one scene of a loaded data set as a bag, as `convert_scene` does."""
    started = time.perf_counter()
    check_new(Path(output))
    channels = nuscenes.camera_channels(dataset) if channels is None else channels
    records = _camera_records(dataset, scene, channels, keyframes_only=not sweeps)
    poses = nuscenes.ego_poses(dataset, scene, (*channels, nuscenes.LIDAR_CHANNEL))
    samples = nuscenes.scene_samples(dataset, scene)
    sensor_poses = nuscenes.sensor_poses(dataset, scene)
    chosen = extras or Extras()
    extra = extra_content(dataset, scene, chosen, poses, sweeps=sweeps)
    events = sorted(
        [
            *_static_events(min(poses[0][0], records[0].stamp_ns), sensor_poses),
            *_ego_events(poses),
            *(event for record in records for event in _camera_events(record)),
            *(event for token in samples for event in _sample_events(dataset, token)),
            *_scene_events(dataset, scene, poses[0][0]),
            *extra.events,
        ],
        key=lambda event: event[:2],
    )
    custom_data = bag_label(dataset, scene, sweeps=sweeps, extras=chosen) | _scene_data(dataset, scene)
    with BagWriter(output, custom_data=custom_data) as bag:
        _add_topics(bag, records)
        for topic in extra.topics:
            bag.add_topic(topic.name, topic.message_type, depth=topic.depth, latched=topic.latched)
        for event in tqdm(events, desc=f"converting {scene}", unit="msg", disable=not progress):
            message = event.build()
            if isinstance(message, bytes):
                bag.write_raw(event.topic, event.stamp_ns, message)
            else:
                bag.write(event.topic, event.stamp_ns, message)
    return ConversionSummary(
        output=Path(output),
        scene=scene,
        images=len(records),
        key_frames=len(samples),
        messages=dict(bag.counts),
        image_bytes=sum(record.path.stat().st_size for record in records),
        duration_s=(events[-1].stamp_ns - events[0].stamp_ns) / 1e9,
        elapsed_s=time.perf_counter() - started,
        notes=tuple(extra.notes),
    )


def bag_label(
    dataset: nuscenes.Dataset, scene: str, *, sweeps: bool, extras: Extras | None = None
) -> dict[str, str]:
    """Return the custom data by which a later run recognises a converted scene."""
    return {
        "dataset": dataset.version,
        "scene": scene,
        "images": "all" if sweeps else "key frames",
        "extras": str(extras or Extras()),
    }


def _scene_data(dataset: nuscenes.Dataset, scene: str) -> dict[str, str]:
    """Return the facts of a scene for the custom data of its bag."""
    return {f"scene_{name}": value for name, value in nuscenes.scene_facts(dataset, scene).items()}


def _scene_events(dataset: nuscenes.Dataset, scene: str, stamp_ns: int) -> Iterator[Event]:
    facts = nuscenes.scene_facts(dataset, scene)
    yield Event(stamp_ns, 0, "/scene", partial(to_ros.make_text, ROSBAGS, facts))


def _camera_records(
    dataset: Any, scene: str, channels: Sequence[str], *, keyframes_only: bool
) -> list[nuscenes.CameraRecord]:
    records = [
        record
        for channel in channels
        for record in nuscenes.camera_records(dataset, scene, channel, keyframes_only=keyframes_only)
    ]
    if not records:
        raise UserError(
            f"scene {scene!r} has no image of {', '.join(channels)}; check that the data set is complete"
        )
    missing = [record.path for record in records if not record.path.is_file()]
    if missing:
        raise UserError(
            f"scene {scene!r}: {len(missing)} of {len(records)} images are missing, first "
            f"{str(missing[0])!r}; copy this part of the data set again"
        )
    return records


def _add_topics(bag: BagWriter, records: list[nuscenes.CameraRecord]) -> None:
    bag.add_topic("/tf_static", "tf2_msgs/msg/TFMessage", depth=1, latched=True)
    bag.add_topic("/tf", "tf2_msgs/msg/TFMessage", depth=100)
    bag.add_topic("/odom", "nav_msgs/msg/Odometry", depth=100)
    for channel in dict.fromkeys(record.channel for record in records):
        bag.add_topic(_camera_topic(channel, "camera_info"), "sensor_msgs/msg/CameraInfo")
        bag.add_topic(_camera_topic(channel, "image/compressed"), "sensor_msgs/msg/CompressedImage")
    bag.add_topic("/ground_truth/detections", "vision_msgs/msg/Detection3DArray")
    bag.add_topic("/ground_truth/velocities", "sensor_msgs/msg/PointCloud2")
    bag.add_topic("/ground_truth/markers", "visualization_msgs/msg/MarkerArray", depth=2)
    bag.add_topic("/ground_truth/annotations", "std_msgs/msg/String")
    bag.add_topic("/sample_token", "std_msgs/msg/Header")
    bag.add_topic("/scene", "std_msgs/msg/String")


def _static_events(stamp_ns: int, ego_from_sensor: dict[str, NDArray[np.float64]]) -> Iterator[Event]:
    children = {channel.lower(): pose for channel, pose in ego_from_sensor.items()}
    yield Event(
        stamp_ns, 0, "/tf_static", partial(to_ros.make_transforms, ROSBAGS, stamp_ns, EGO_FRAME, children)
    )


def _ego_events(poses: list[Pose]) -> Iterator[Event]:
    for (stamp_ns, pose), (linear, angular) in zip(poses, ego_twists(poses), strict=True):
        transforms = partial(to_ros.make_transforms, ROSBAGS, stamp_ns, GLOBAL_FRAME, {EGO_FRAME: pose})
        odometry = partial(
            to_ros.make_odometry, ROSBAGS, stamp_ns, GLOBAL_FRAME, EGO_FRAME, pose, linear, angular
        )
        yield Event(stamp_ns, 1, "/tf", transforms)
        yield Event(stamp_ns, 2, "/odom", odometry)


def _camera_events(record: nuscenes.CameraRecord) -> Iterator[Event]:
    stamp_ns, frame = record.stamp_ns, record.channel.lower()
    size = (record.width, record.height)
    info = partial(to_ros.camera_info, ROSBAGS, record.intrinsics, size, stamp_ns, frame, record.lens)
    yield Event(stamp_ns, 3, _camera_topic(record.channel, "camera_info"), info)

    def image() -> Any:  # reads the file when the message is written: a scene has hundreds of megabytes
        content, image_format = _image_file(record.path)
        return to_ros.compressed_image_bytes(content, stamp_ns, frame, image_format)

    yield Event(stamp_ns, 4, _camera_topic(record.channel, "image/compressed"), image)


def _sample_events(dataset: Any, token: str) -> Iterator[Event]:
    truth = nuscenes.ground_truth(dataset, token)
    stamp_ns = truth.stamp_ns
    detections = partial(to_ros.objects_to_detections, ROSBAGS, truth, EGO_FRAME)
    velocities = partial(to_ros.objects_to_velocities, ROSBAGS, truth, EGO_FRAME)
    yield Event(stamp_ns, 5, "/sample_token", partial(to_ros.make_header, ROSBAGS, stamp_ns, token))
    yield Event(stamp_ns, 6, "/ground_truth/detections", detections)
    yield Event(stamp_ns, 7, "/ground_truth/velocities", velocities)
    facts = partial(nuscenes.annotation_facts, dataset, token)
    yield Event(
        stamp_ns, 8, "/ground_truth/annotations", lambda: to_ros.make_annotations(ROSBAGS, stamp_ns, facts())
    )
    markers = partial(objects_to_markers, truth, EGO_FRAME, lifetime_s=_MARKER_S, messages=ROSBAGS)
    yield Event(stamp_ns, 9, "/ground_truth/markers", markers)


def ego_twists(poses: list[Pose]) -> list[tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """Return velocity (3,) in m/s and turn rate (3,) in rad/s, both in the ego frame, at each pose.

    They are differences over 50 ms to either side, or to the adjacent poses if these are further apart; zero
    for a single pose.
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
        displacement = (end[:3, 3] - start[:3, 3]) @ pose[:3, :3]
        rotation = Rotation.from_matrix(start[:3, :3].T @ end[:3, :3]).as_rotvec()
        twists.append((displacement / seconds, rotation / seconds))
    return twists


def _camera_topic(channel: str, name: str) -> str:
    return f"/{channel.lower()}/{name}"


def _image_file(path: Path) -> tuple[bytes, str]:
    """Return content and format of an image file.

    Raises UserError if it is missing or neither JPEG nor PNG.
    """
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
