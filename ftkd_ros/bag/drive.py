# SPDX-License-Identifier: Apache-2.0
"""A recorded drive as a detector sees it, read from a bag without ROS: rounds of cameras, each with its true
geometry.

Grouping, decoding and conversions are the node's own (`round_matching`, `time_offsets`, `images`, `reading`);
only the middleware is left out, so the result does not depend on how fast the machine is.
"""

import struct
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rosbags.highlevel import AnyReader, AnyReaderError
from rosbags.interfaces import Connection

from ftkd_core.classes import CAMERA_CHANNELS
from ftkd_core.errors import UserError
from ftkd_core.geometry import interpolate_rigid
from ftkd_core.types import CameraRound, CameraView, ObjectList
from ftkd_ros.images import image_to_rgb
from ftkd_ros.reading import detections_to_objects, stamp_to_ns, transform_to_matrix
from ftkd_ros.round_matching import MatchedRound, RoundMatcher
from ftkd_ros.time_offsets import MIN_STAMPS, estimate_offsets_ns

GLOBAL_FRAME: Final = "map"
EGO_FRAME: Final = "base_link"
SLOP_NS: Final = 20_000_000
_NO_DEADLINE_NS: Final = 1 << 61


class KeyFrame(NamedTuple):
    """An annotated moment: its nuScenes sample token and stamp."""

    token: str
    stamp_ns: int


class _CameraMessage(NamedTuple):
    connection: Connection
    content: bytes


@dataclass(frozen=True)
class PoseTrack:
    """Rigid transforms over time: stamps (T,) ascending nanoseconds, matrices (T, 4, 4)."""

    stamps_ns: NDArray[np.int64]
    matrices: NDArray[np.float64]

    def at(self, stamp_ns: int) -> NDArray[np.float64] | None:
        """Interpolated transform (4, 4); None before the first and after the last stamp, as tf2 does not
        extrapolate."""
        if not len(self.stamps_ns) or not self.stamps_ns[0] <= stamp_ns <= self.stamps_ns[-1]:
            return None
        after = int(np.searchsorted(self.stamps_ns, stamp_ns))
        if self.stamps_ns[after] == stamp_ns:
            exact: NDArray[np.float64] = self.matrices[after].copy()
            return exact
        before = after - 1
        fraction = (stamp_ns - self.stamps_ns[before]) / (self.stamps_ns[after] - self.stamps_ns[before])
        pose: NDArray[np.float64] = interpolate_rigid(
            self.matrices[before], self.matrices[after], float(fraction)
        )
        return pose


class Bag:
    """A bag open for reading; errors name the bag and, for a missing topic, the topics it has.

    Context manager. Raises UserError for a bag that does not exist, is damaged or cut off.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.exists():
            raise UserError(
                f"bag {str(self.path)!r} does not exist; give the folder that holds metadata.yaml"
            )
        try:
            self._reader = AnyReader([self.path])
            self._reader.open()
        except (AnyReaderError, OSError, AssertionError, ValueError, KeyError, struct.error) as error:
            raise UserError(f"bag {str(self.path)!r} cannot be read ({error}); is it complete?") from error

    def __enter__(self) -> "Bag":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._reader.close()

    @property
    def topics(self) -> dict[str, str]:
        """Message type by topic."""
        return {connection.topic: connection.msgtype for connection in self._reader.connections}

    def raw(
        self, topics: Sequence[str], *, optional: bool = False
    ) -> Iterator[tuple[Connection, int, bytes]]:
        """(connection, log time, serialized message) of the topics in log order.

        Raises UserError for a topic that is missing, unless `optional`, and where the bag breaks off.
        """
        topic_names = self.topics
        missing = [topic for topic in topics if topic not in topic_names]
        if missing and not optional:
            raise UserError(
                f"bag {str(self.path)!r} has no topic {missing[0]}; "
                f"it has {', '.join(sorted(topic_names)) or 'none'}"
            )
        wanted = [connection for connection in self._reader.connections if connection.topic in topics]
        if not wanted:
            return
        try:
            yield from self._reader.messages(connections=wanted)
        except (AnyReaderError, OSError, AssertionError, struct.error) as error:
            raise UserError(f"bag {str(self.path)!r} breaks off while reading ({error})") from error

    def messages(self, topics: Sequence[str], *, optional: bool = False) -> Iterator[tuple[str, int, Any]]:
        """(topic, log time, message) of the topics in log order; as `raw`."""
        for connection, log_time_ns, content in self.raw(topics, optional=optional):
            yield connection.topic, log_time_ns, self.deserialize(connection, content)

    def deserialize(self, connection: Connection, content: bytes) -> Any:
        """The message. Raises UserError for one that does not follow its own definition."""
        try:
            return self._reader.deserialize(content, connection.msgtype)
        except (AnyReaderError, struct.error, ValueError, IndexError) as error:
            raise UserError(
                f"bag {str(self.path)!r}: a message of {connection.topic} is no valid "
                f"{connection.msgtype} ({error})"
            ) from error


class Drive:
    """The rounds, key frames and ground truth of an input bag.

    channels name the cameras, in the order of the rounds' views; a camera is the topics
    `/<channel>/image/compressed` (or `/image`) and `/<channel>/camera_info`, lower case. `offsets_ns`, one a
    camera, None estimates them from the stamps. `counts` says what was not used and why. A camera without any
    message in the bag stays None in every round.
    """

    def __init__(
        self, bag: Bag, channels: Sequence[str] = CAMERA_CHANNELS, offsets_ns: Sequence[int] | None = None
    ) -> None:
        self.bag = bag
        self.channels = tuple(channels)
        self.counts: Counter[str] = Counter()
        self._image_topics = _image_topics(bag, self.channels)
        self.global_from_ego, self._ego_from_frame = _transforms(bag)
        self._cameras = {self._image_topics[c]: c for c in range(len(self.channels)) if self._image_topics[c]}
        self._offsets_ns = list(offsets_ns) if offsets_ns is not None else None

    def key_frames(self) -> tuple[KeyFrame, ...]:
        """The annotated moments in order of time. Raises UserError for a bag without /sample_token."""
        found = {
            message.frame_id: stamp_to_ns(message.stamp)
            for _, _, message in self.bag.messages(["/sample_token"])
        }
        return tuple(
            KeyFrame(token, stamp) for token, stamp in sorted(found.items(), key=lambda item: item[1])
        )

    def ground_truth(self) -> dict[int, ObjectList]:
        """True objects in ego by stamp; empty for a bag without them."""
        return read_objects(self.bag, "/ground_truth/detections", "/ground_truth/velocities", optional=True)

    def pose_at(self, stamp_ns: int) -> NDArray[np.float64]:
        """global_from_ego (4, 4). Raises UserError outside the time that /tf covers."""
        pose = self.global_from_ego.at(stamp_ns)
        if pose is None:
            raise UserError(
                f"bag {str(self.bag.path)!r} has no transform {GLOBAL_FRAME} -> {EGO_FRAME} at "
                f"{stamp_ns} ns; do the detections belong to another drive?"
            )
        return pose

    def reference_stamps(self) -> list[int]:
        """The stamp of each round, in order: that of its newest exposure. Reads no image."""
        return [_reference_stamp(matched) for matched in self._matched()]

    def rounds(self, only_near_ns: Sequence[int] | None = None) -> Iterator[tuple[CameraRound, bool]]:
        """(round, whether the stream starts anew) in order of time, images decoded.

        Reference is the newest exposure, the node's default. With `only_near_ns` just the rounds within 60 ms
        of one of these stamps. A view that has no camera_info, no transform or no readable image is None and
        counted.
        """
        infos = self._camera_infos()
        for matched in self._matched():
            reference_ns = _reference_stamp(matched)
            if only_near_ns is not None and not any(
                abs(reference_ns - stamp) <= 60_000_000 for stamp in only_near_ns
            ):
                continue
            pose = self.global_from_ego.at(reference_ns)
            if pose is None:
                self.counts["round_without_pose"] += 1
                continue
            views = tuple(
                None if message is None or stamp_ns is None else self._view(camera, message, stamp_ns, infos)
                for camera, (message, stamp_ns) in enumerate(
                    zip(matched.messages, matched.stamps_ns, strict=True)
                )
            )
            yield (
                CameraRound(views=views, reference_stamp_ns=reference_ns, global_from_ego=pose),
                matched.after_jump,
            )

    def _matched(self) -> Iterator[MatchedRound[_CameraMessage]]:
        offsets = self._offsets()
        matcher: RoundMatcher[_CameraMessage] = RoundMatcher(
            num_cameras=len(self.channels), slop_ns=SLOP_NS, deadline_ns=_NO_DEADLINE_NS
        )
        for connection, _, content in self.bag.raw(tuple(self._cameras)):
            camera = self._cameras[connection.topic]
            offset = offsets[camera]
            if offset is None:
                self.counts["unaligned"] += 1
                continue
            message = _CameraMessage(connection, content)
            yield from matcher.add(camera, _header_stamp_ns(content), message, 0, offset)
        yield from matcher.poll(_NO_DEADLINE_NS)

    def _offsets(self) -> list[int | None]:
        """Time offset of each camera, from all stamps of the bag; from the first stamps where there are too
        few."""
        if self._offsets_ns is None:
            stamps: list[list[int]] = [[] for _ in self.channels]
            for connection, _, content in self.bag.raw(tuple(self._cameras)):
                stamps[self._cameras[connection.topic]].append(_header_stamp_ns(content))
            if min(len(own) for own in stamps if own) >= MIN_STAMPS:
                return estimate_offsets_ns(stamps)
            first = min(own[0] for own in stamps if own)
            return [own[0] - first if own else None for own in stamps]
        return list(self._offsets_ns)

    def _camera_infos(self) -> dict[int, list[tuple[int, Any]]]:
        """(stamp, camera_info) of each camera in order of time."""
        topics = {_topic(channel, "camera_info"): camera for camera, channel in enumerate(self.channels)}
        present = [topic for topic in topics if _topic_camera(topic, self._cameras, topics)]
        infos: dict[int, list[tuple[int, Any]]] = defaultdict(list)
        for topic, _, message in self.bag.messages(present):
            infos[topics[topic]].append((stamp_to_ns(message.header.stamp), message))
        return infos

    def _view(
        self, camera: int, message: _CameraMessage, stamp_ns: int, infos: dict[int, list[tuple[int, Any]]]
    ) -> CameraView | None:
        channel = self.channels[camera]
        pose = self.global_from_ego.at(stamp_ns)
        own = infos.get(camera, [])
        if pose is None or not own:
            self.counts[f"{channel}: no {'transform' if own else 'camera_info'}"] += 1
            return None
        info = next((info for stamp, info in reversed(own) if stamp <= stamp_ns), own[0][1])
        frame = info.header.frame_id
        if frame not in self._ego_from_frame:
            raise UserError(
                f"bag {str(self.bag.path)!r} has no transform {EGO_FRAME} -> {frame} on /tf_static, "
                f"the frame of {channel}; it has {', '.join(sorted(self._ego_from_frame)) or 'none'}"
            )
        try:
            image = image_to_rgb(
                self.bag.deserialize(message.connection, message.content), message.connection.topic
            )
        except UserError:
            self.counts[f"{channel}: unreadable image"] += 1
            return None
        return CameraView(
            image=image,
            intrinsics=np.asarray(info.k, dtype=np.float64).reshape(3, 3),
            ego_from_camera=self._ego_from_frame[frame],
            global_from_ego=pose,
            stamp_ns=stamp_ns,
        )


def read_objects(
    bag: Bag, detections_topic: str, velocities_topic: str, *, optional: bool = False
) -> dict[int, ObjectList]:
    """Objects of every Detection3DArray on a topic by header stamp, with the velocities of the same stamp.

    Of two messages with one stamp the later counts. Raises UserError for a missing topic unless `optional`.
    """
    clouds = {
        stamp_to_ns(cloud.header.stamp): cloud
        for _, _, cloud in bag.messages([velocities_topic], optional=True)
    }
    objects = {}
    for _, _, message in bag.messages([detections_topic], optional=optional):
        stamp_ns = stamp_to_ns(message.header.stamp)
        if message.header.frame_id != EGO_FRAME:
            raise UserError(
                f"bag {str(bag.path)!r}: {detections_topic} is in frame {message.header.frame_id!r}; "
                f"expected {EGO_FRAME}"
            )
        objects[stamp_ns] = detections_to_objects(message, clouds.get(stamp_ns))
    return objects


def nearest(stamps_ns: Sequence[int], stamp_ns: int, within_ns: int) -> int | None:
    """The stamp nearest to `stamp_ns`, None where none is within `within_ns`."""
    found = min(stamps_ns, key=lambda candidate: abs(candidate - stamp_ns), default=None)
    return found if found is not None and abs(found - stamp_ns) <= within_ns else None


def _topic(channel: str, name: str) -> str:
    return f"/{channel.lower()}/{name}"


def _topic_camera(topic: str, cameras: dict[str, int], infos: dict[str, int]) -> bool:
    """Whether the camera of this camera_info topic has images in the bag."""
    return infos[topic] in cameras.values()


def _image_topics(bag: Bag, channels: Sequence[str]) -> list[str]:
    """Image topic of each channel, "" where the bag has none. Raises UserError where no channel has one."""
    present = bag.topics
    found = [
        next((t for t in (_topic(channel, "image/compressed"), _topic(channel, "image")) if t in present), "")
        for channel in channels
    ]
    if not any(found):
        raise UserError(
            f"bag {str(bag.path)!r} has no camera topic such as {_topic(channels[0], 'image/compressed')}; "
            f"it has {', '.join(sorted(present)) or 'none'}"
        )
    return found


def _transforms(bag: Bag) -> tuple[PoseTrack, dict[str, NDArray[np.float64]]]:
    """The track of global_from_ego and, by frame, ego_from_frame."""
    poses: dict[int, NDArray[np.float64]] = {}
    for _, _, message in bag.messages(["/tf"]):
        for transform in message.transforms:
            if (transform.header.frame_id, transform.child_frame_id) == (GLOBAL_FRAME, EGO_FRAME):
                poses[stamp_to_ns(transform.header.stamp)] = transform_to_matrix(transform.transform)
    if not poses:
        raise UserError(f"bag {str(bag.path)!r} has no transform {GLOBAL_FRAME} -> {EGO_FRAME} on /tf")
    static = {
        transform.child_frame_id: transform_to_matrix(transform.transform)
        for _, _, message in bag.messages(["/tf_static"])
        for transform in message.transforms
        if transform.header.frame_id == EGO_FRAME
    }
    stamps = sorted(poses)
    track = PoseTrack(np.array(stamps, dtype=np.int64), np.stack([poses[stamp] for stamp in stamps]))
    return track, static


def _reference_stamp(matched: MatchedRound[Any]) -> int:
    return max(stamp for stamp in matched.stamps_ns if stamp is not None)


def _header_stamp_ns(content: bytes) -> int:
    """Stamp of a serialized message that begins with a header: CDR has four bytes of its own first."""
    order = "<" if content[1] & 1 else ">"
    seconds, nanoseconds = struct.unpack_from(f"{order}iI", content, 4)
    return int(seconds) * 1_000_000_000 + int(nanoseconds)
