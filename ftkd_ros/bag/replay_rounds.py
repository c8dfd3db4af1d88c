# SPDX-License-Identifier: Apache-2.0
"""A recorded drive as rounds of cameras, read from a bag without ROS.

Matching, decoding, checks and conversions use the code of the detector node (`ftkd_ros.sync`,
`ftkd_ros.convert`). There is no middleware, so the result does not depend on the speed of the machine.
"""

import bisect
import re
import struct
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rosbags.interfaces import Connection

from ftkd_core.classes import CAMERA_CHANNELS
from ftkd_core.errors import UserError
from ftkd_core.geometry import interpolate_rigid
from ftkd_core.types import CameraRound, ObjectList
from ftkd_ros.bag.io import BagReader
from ftkd_ros.convert.calibration import CameraGeometry, read_calibration, read_rigid
from ftkd_ros.convert.from_ros import detections_to_objects, stamp_to_ns
from ftkd_ros.sync.assembly import RoundBuilder, reference_stamp_ns
from ftkd_ros.sync.matcher import MatchedRound, RoundMatcher
from ftkd_ros.sync.time_offsets import MIN_STAMPS, estimate_offsets_ns

MAP_FRAME: Final = "map"
BASE_FRAME: Final = "base_link"
CAMERA_INFO_TOPIC: Final = "/{camera}/camera_info"
SLOP_NS: Final = 20_000_000
_IMAGE_TOPIC: Final = re.compile(r"^/(.+)/image(/compressed)?$")
_NO_DEADLINE_NS: Final = 1 << 61
_ROUND_SPAN_NS: Final = 60_000_000

Matrix = NDArray[np.float64]


class KeyFrame(NamedTuple):
    """An annotated frame: its nuScenes sample token and stamp."""

    token: str
    stamp_ns: int


class _SerializedImage(NamedTuple):
    """A serialized image, decoded only if its round is needed."""

    connection: Connection
    content: bytes


@dataclass(frozen=True)
class PoseTrack:
    """Rigid transforms over time: ascending stamps in nanoseconds, matrices (4, 4)."""

    stamps_ns: Sequence[int]
    matrices: Sequence[Matrix]

    def at(self, stamp_ns: int) -> Matrix | None:
        """Return the interpolated transform; None before the first and after the last stamp, as in tf2."""
        if not self.stamps_ns or not self.stamps_ns[0] <= stamp_ns <= self.stamps_ns[-1]:
            return None
        after = bisect.bisect_left(self.stamps_ns, stamp_ns)
        if self.stamps_ns[after] == stamp_ns:
            return self.matrices[after]
        before = after - 1
        elapsed, interval = stamp_ns - self.stamps_ns[before], self.stamps_ns[after] - self.stamps_ns[before]
        return interpolate_rigid(self.matrices[before], self.matrices[after], elapsed / interval)


class BagRig:
    """Calibration and transforms of a bag, with the interface of `ftkd_ros.sync.assembly.Rig`.

    Reads `map` -> `base_link` from /tf and `base_link` -> camera frames from /tf_static. image_geometry: as
    in `convert.calibration`; decisions: by camera, what it was.
    """

    def __init__(
        self,
        bag: BagReader,
        channels: Sequence[str],
        image_geometry: str = "auto",
        info_topic: str = CAMERA_INFO_TOPIC,
        image_topic: str = "",
    ) -> None:
        self._info_topic = info_topic
        self.decisions: dict[str, str] = {}
        self._image_geometry = image_geometry
        self._image_topics = dict(zip(channels, _image_topics(bag, channels, image_topic), strict=True))
        self._image_topics = {name.lower(): topic for name, topic in self._image_topics.items()}
        self.cameras = tuple(channel.lower() for channel in channels)
        self._path = str(bag.path)
        self._track, self._ego_from_frame = _transforms(bag)
        self._infos: dict[str, tuple[list[int], list[Any]]] = {}
        topics = {info_topic.replace("{camera}", camera): camera for camera in self.cameras}
        for topic, _, message in bag.messages(tuple(topics), optional=True):
            stamps, infos = self._infos.setdefault(topics[topic], ([], []))
            stamps.append(stamp_to_ns(message.header.stamp))
            infos.append(message)

    def global_from_ego(self, stamp_ns: int, wait_until: float = 0.0) -> Matrix:
        """Return the ego pose (4, 4). Raises UserError outside the time range of /tf."""
        pose = self._track.at(stamp_ns)
        if pose is None:
            raise UserError(
                f"bag {self._path!r} has no transform {MAP_FRAME} -> {BASE_FRAME} at {stamp_ns} ns; "
                "check that the detections belong to this drive"
            )
        return pose

    def geometry(
        self, camera: str, frame_id: str, stamp_ns: int, image_size: tuple[int, int], wait_until: float = 0.0
    ) -> CameraGeometry:
        """Return the geometry of a camera at an exposure, with the newest camera_info up to then.

        Raises UserError if camera_info or a transform is missing.
        """
        if camera not in self._infos:
            raise UserError(
                f"{camera}: bag {self._path!r} has no topic {self._info_topic.replace('{camera}', camera)}"
            )
        stamps, infos = self._infos[camera]
        info = infos[max(bisect.bisect_right(stamps, stamp_ns) - 1, 0)]
        frame = frame_id if frame_id in self._ego_from_frame else info.header.frame_id or frame_id
        if frame not in self._ego_from_frame:
            raise UserError(
                f"{camera}: bag {self._path!r} has no transform {BASE_FRAME} -> {frame} on /tf_static; "
                f"it has {', '.join(sorted(self._ego_from_frame)) or 'none'}"
            )
        calibration = read_calibration(
            info,
            camera,
            image_size,
            image_geometry=self._image_geometry,
            topic=self._image_topics[camera],
        )
        self.decisions[camera] = calibration.reason
        return CameraGeometry(
            intrinsics=calibration.intrinsics,
            ego_from_camera=self._ego_from_frame[frame] @ calibration.frame_from_camera,
            global_from_ego=self.global_from_ego(stamp_ns),
            lens=calibration.lens,
        )


class Drive:
    """Rounds, key frames and ground truth of an input bag.

    channels: cameras in the order of the views, None for those of the bag (`bag_cameras`); the topics of a
    camera are `/<channel>/image/compressed` (or `/image`) and `/<channel>/camera_info` in lower case, or the
    given patterns with `{camera}`. offsets_ns: one per camera; None estimates them from all stamps. faults:
    number of unusable rounds and cameras by reason. Raises UserError for a bag without a required topic.
    """

    def __init__(
        self,
        bag: BagReader,
        channels: Sequence[str] | None = None,
        offsets_ns: Sequence[int] | None = None,
        image_geometry: str = "auto",
        image_topic: str = "",
        camera_info_topic: str = CAMERA_INFO_TOPIC,
    ) -> None:
        self.bag = bag
        self.channels = bag_cameras(bag) if channels is None else tuple(channels)
        self.faults: Counter[str] = Counter()
        self._topics = _image_topics(bag, self.channels, image_topic)
        self._camera_of = {topic: camera for camera, topic in enumerate(self._topics)}
        self.rig = BagRig(bag, self.channels, image_geometry, camera_info_topic, image_topic)
        self._offsets_ns = list(offsets_ns) if offsets_ns is not None else self._estimate_offsets()

    @property
    def image_topics(self) -> tuple[str, ...]:
        """Image topic of each camera."""
        return tuple(self._topics)

    @property
    def offsets_ns(self) -> tuple[int | None, ...]:
        """Time offset of each camera; None if the camera is missing or has another clock."""
        return tuple(self._offsets_ns)

    @property
    def min_cameras(self) -> int:
        """Minimum number of cameras in a round."""
        return max(1, len(self.channels) // 2)

    def image_counts(self) -> dict[str, int]:
        """Return the number of images by topic."""
        counts = dict.fromkeys(self._topics, 0)
        for connection, _, _ in self.bag.raw(self._topics, optional=True):
            counts[connection.topic] += 1
        return counts

    def latest_stamps(self) -> dict[str, int]:
        """Return the stamp of the latest image by topic; 0 if none was set."""
        stamps: dict[str, int] = {}
        for connection, _, content in self.bag.raw(self._topics, optional=True):
            stamps[connection.topic] = max(stamps.get(connection.topic, 0), _header_stamp_ns(content))
        return stamps

    def key_frames(self) -> tuple[KeyFrame, ...]:
        """Return the annotated frames in order of time. Raises UserError for a bag without /sample_token."""
        found = {
            message.frame_id: stamp_to_ns(message.stamp)
            for _, _, message in self.bag.messages(["/sample_token"])
        }
        return tuple(
            KeyFrame(token, stamp) for token, stamp in sorted(found.items(), key=lambda item: item[1])
        )

    def ground_truth(self) -> dict[int, ObjectList]:
        """Return the ground truth in ego by stamp; empty for a bag without ground truth."""
        return read_objects(self.bag, "/ground_truth/detections", "/ground_truth/velocities", optional=True)

    def reference_stamps(self) -> list[int]:
        """Return the stamp of each round, that of its latest exposure, in order. Decodes no image."""
        return [reference_stamp_ns(matched, "latest") for matched in self.matched()]

    def rounds(self, near_ns: Sequence[int] | None = None) -> Iterator[tuple[CameraRound, bool]]:
        """Yield (round with decoded images, True if the stamps jumped back before it) in order.

        With `near_ns`, only rounds within 60 ms of these stamps are decoded. Unusable rounds are skipped.
        Problems of rounds and cameras are counted in `faults`.
        """
        builder = RoundBuilder(self.rig, topics=self._topics, num_views=len(self.channels))
        try:
            for matched in self.matched():
                stamp_ns = reference_stamp_ns(matched, "latest")
                if near_ns is not None and nearest(near_ns, stamp_ns, _ROUND_SPAN_NS) is None:
                    continue
                try:
                    built = builder.build(self._deserialize(matched))
                except UserError as error:
                    self.faults[str(error)] += 1
                    continue
                self.faults.update(built.faults.values())
                yield built.camera_round, matched.after_jump
        finally:
            builder.close()

    def matched(self) -> Iterator[MatchedRound[Any]]:
        """Yield rounds of serialized images, matched as in the node but without a deadline."""
        matcher: RoundMatcher[_SerializedImage] = RoundMatcher(
            num_cameras=len(self.channels),
            slop_ns=SLOP_NS,
            deadline_ns=_NO_DEADLINE_NS,
            min_cameras=self.min_cameras,
        )
        for connection, _, content in self.bag.raw(self._topics, optional=True):
            camera = self._camera_of[connection.topic]
            offset_ns = self._offsets_ns[camera]
            if offset_ns is None:
                self.faults[
                    f"{connection.topic}: its stamps have no constant offset to those of the other cameras"
                ] += 1
                continue
            stamp_ns = _header_stamp_ns(content)
            yield from matcher.add(camera, stamp_ns, _SerializedImage(connection, content), 0, offset_ns)
        yield from matcher.poll(_NO_DEADLINE_NS)

    def _deserialize(self, matched: MatchedRound[Any]) -> MatchedRound[Any]:
        messages = tuple(
            None if message is None else self.bag.deserialize(message.connection, message.content)
            for message in matched.messages
        )
        return MatchedRound(messages=messages, stamps_ns=matched.stamps_ns, after_jump=matched.after_jump)

    def _estimate_offsets(self) -> list[int | None]:
        """Estimate time offsets from all stamps, or from the first stamps if a camera has fewer than six."""
        stamps: list[list[int]] = [[] for _ in self.channels]
        for connection, _, content in self.bag.raw(self._topics, optional=True):
            stamps[self._camera_of[connection.topic]].append(_header_stamp_ns(content))
        present = [own for own in stamps if own]
        if not present:
            raise UserError(f"bag {str(self.bag.path)!r} has no camera image")
        if min(len(own) for own in present) >= MIN_STAMPS:
            return estimate_offsets_ns(stamps)
        first = min(own[0] for own in present)
        return [own[0] - first if own else None for own in stamps]


def bag_cameras(bag: BagReader, channels: Sequence[str] = CAMERA_CHANNELS) -> tuple[str, ...]:
    """Return the cameras of a bag: the given channels if it has no other cameras, else all cameras that it
    has, those of the given names first."""
    names = [name.upper() for name in camera_names(bag)]
    if set(names) <= set(channels):
        return tuple(channels)
    usual = [channel for channel in channels if channel in names]
    return (*usual, *sorted(set(names).difference(usual)))


def camera_names(bag: BagReader) -> list[str]:
    """Return the cameras of a bag as in its topics: those with <camera>/image or <camera>/image/compressed
    and a camera_info."""
    found = {match[1]: None for topic in bag.topics if (match := _IMAGE_TOPIC.match(topic))}
    return [name for name in found if f"/{name}/camera_info" in bag.topics]


def read_objects(
    bag: BagReader, detections_topic: str, velocities_topic: str, *, optional: bool = False
) -> dict[int, ObjectList]:
    """Return the objects of all Detection3DArray messages by header stamp, with velocities of the same stamp.

    Of two messages with equal stamps, the later one is used. Raises UserError for a missing topic unless
    `optional`, and for detections in a frame other than base_link.
    """
    clouds = {
        stamp_to_ns(cloud.header.stamp): cloud
        for _, _, cloud in bag.messages([velocities_topic], optional=True)
    }
    objects = {}
    for _, _, message in bag.messages([detections_topic], optional=optional):
        if message.header.frame_id != BASE_FRAME:
            raise UserError(
                f"bag {str(bag.path)!r}: {detections_topic} is in frame {message.header.frame_id!r}; "
                f"expected {BASE_FRAME}"
            )
        stamp_ns = stamp_to_ns(message.header.stamp)
        objects[stamp_ns] = detections_to_objects(message, clouds.get(stamp_ns))
    return objects


def nearest(stamps_ns: Sequence[int], stamp_ns: int, within_ns: int) -> int | None:
    """Return the stamp that is nearest to `stamp_ns`; None if none is within `within_ns`."""
    found = min(stamps_ns, key=lambda candidate: abs(candidate - stamp_ns), default=None)
    return found if found is not None and abs(found - stamp_ns) <= within_ns else None


def read_image_stamps(drive: Drive) -> list[list[int]]:
    """Return the header stamps in nanoseconds of the images of each camera, in the order of the bag."""
    stamps: list[list[int]] = [[] for _ in drive.channels]
    for connection, _, content in drive.bag.raw(drive.image_topics, optional=True):
        stamps[drive.image_topics.index(connection.topic)].append(_header_stamp_ns(content))
    return stamps


def _image_topics(bag: BagReader, channels: Sequence[str], pattern: str = "") -> list[str]:
    """Return the image topic of each channel: by the pattern, or without one the raw topic if only that
    exists, else the compressed one.

    Raises UserError if the bag has no image topic.
    """
    present = bag.topics
    if pattern:
        topics = [pattern.replace("{camera}", channel.lower()) for channel in channels]
        if len(set(topics)) < len(topics):
            raise UserError(f"image topic {pattern!r} is the same for all cameras; use {{camera}} in it")
        if not any(topic in present for topic in topics):
            raise UserError(
                f"bag {str(bag.path)!r} has no image topic such as {topics[0]}; "
                f"it has {', '.join(sorted(present)) or 'none'}"
            )
        return topics
    compressed = [f"/{channel.lower()}/image/compressed" for channel in channels]
    raw = [f"/{channel.lower()}/image" for channel in channels]
    found = [
        raw_topic if raw_topic in present and topic not in present else topic
        for topic, raw_topic in zip(compressed, raw, strict=True)
    ]
    if not any(topic in present for topic in found):
        raise UserError(
            f"bag {str(bag.path)!r} has no camera topic such as {compressed[0]} (give --image-topic); "
            f"it has {', '.join(sorted(present)) or 'none'}"
        )
    return found


def _transforms(bag: BagReader) -> tuple[PoseTrack, dict[str, Matrix]]:
    """Return the track of map -> base_link, and ego_from_frame by frame."""
    poses = {
        stamp_to_ns(stamped.header.stamp): read_rigid(
            stamped.transform, f"transform {MAP_FRAME} <- {BASE_FRAME}"
        )
        for _, _, message in bag.messages(["/tf"])
        for stamped in message.transforms
        if (stamped.header.frame_id, stamped.child_frame_id) == (MAP_FRAME, BASE_FRAME)
    }
    if not poses:
        raise UserError(f"bag {str(bag.path)!r} has no transform {MAP_FRAME} -> {BASE_FRAME} on /tf")
    static = {
        stamped.child_frame_id: read_rigid(
            stamped.transform, f"transform {BASE_FRAME} <- {stamped.child_frame_id}"
        )
        for _, _, message in bag.messages(["/tf_static"])
        for stamped in message.transforms
        if stamped.header.frame_id == BASE_FRAME
    }
    stamps = sorted(poses)
    return PoseTrack(stamps, [poses[stamp] for stamp in stamps]), static


def _header_stamp_ns(content: bytes) -> int:
    """Return the stamp of a serialized message that begins with a header, after the 4-byte CDR header."""
    order = "<" if content[1] & 1 else ">"
    seconds, nanoseconds = struct.unpack_from(f"{order}iI", content, 4)
    return int(seconds) * 1_000_000_000 + int(nanoseconds)
