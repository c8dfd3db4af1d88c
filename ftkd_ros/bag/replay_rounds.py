# SPDX-License-Identifier: Apache-2.0
"""A recorded drive as rounds of cameras, read from a bag without ROS.

Matching, decoding, checks and conversions use the code of the detector node (`ftkd_ros.sync`,
`ftkd_ros.convert`). There is no middleware, so the result does not depend on the speed of the machine.
"""

import json
import re
import struct
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Final, NamedTuple

from rosbags.interfaces import Connection

from ftkd_core.errors import UserError
from ftkd_core.types import CameraRound, ObjectList
from ftkd_ros.bag.bag_rig import BagRig, resolve_topic
from ftkd_ros.bag.io import BagReader
from ftkd_ros.bag.round_plan import ImageStamp, iterate_with_contents, plan_rounds, select_rounds
from ftkd_ros.convert.from_ros import detections_to_objects, stamp_to_ns
from ftkd_ros.node.parameters import DetectorParameters
from ftkd_ros.sync.assembly import RoundBuilder, reference_stamp_ns
from ftkd_ros.sync.matcher import MatchedRound

MAP_FRAME: Final = "map"
BASE_FRAME: Final = "base_link"
SLOP_NS: Final = 20_000_000
_IMAGE_TOPIC: Final = re.compile(r"^/(.+)/image(/compressed)?$")
_ROUND_SPAN_NS: Final = 60_000_000
_AT_TIME: Final = re.compile(r" at -?\d+ ns")


class KeyFrame(NamedTuple):
    """An annotated frame: its nuScenes sample token and stamp."""

    token: str
    stamp_ns: int


class _SerializedImage(NamedTuple):
    """A serialized image, decoded only if its round is needed."""

    connection: Connection
    content: bytes


class Drive:
    """Rounds, key frames and ground truth of an input bag, with the parameters of the detector node.

    parameters: as `with_bag_cameras` changes them if any_cameras is set. num_views: cameras of the detector;
    rounds are filled up with None. offsets_ns: one per camera; None estimates them. If `image_topic` is
    empty, a camera has `/{camera}/image/compressed`, or the raw `/{camera}/image` if the bag has only that.
    faults: number of unusable rounds and cameras by reason. Raises UserError for a bag without a required
    topic or transform.
    """

    def __init__(
        self,
        bag: BagReader,
        parameters: DetectorParameters | None = None,
        *,
        num_views: int = 0,
        offsets_ns: Sequence[int | None] | None = None,
        any_cameras: bool = True,
    ) -> None:
        self.bag = bag
        parameters = parameters or DetectorParameters()
        self.parameters = with_bag_cameras(bag, parameters) if any_cameras else parameters
        self.cameras = self.parameters.cameras
        self.faults: Counter[str] = Counter()
        self._num_views = max(len(self.cameras), num_views)
        self._topics = _image_topics(bag, self.parameters)
        self.images = _image_stamps(bag, self._topics)
        if not self.images:
            raise UserError(f"bag {str(bag.path)!r} has no camera image")
        self.rig = BagRig(bag, self.parameters, self._topics)
        self.plan = plan_rounds(self.images, self.parameters, self._topics, offsets_ns)
        self._chosen = self.plan.rounds

    @property
    def image_topics(self) -> tuple[str, ...]:
        """Image topic of each camera."""
        return tuple(self._topics)

    @property
    def offsets_ns(self) -> tuple[int | None, ...]:
        """Time offset of each camera; None if the camera is missing, has another clock, or needs none."""
        return self.plan.offsets_ns

    @property
    def min_cameras(self) -> int:
        """Minimum number of cameras in a round."""
        return self.parameters.min_round_cameras

    def select(self, *, start_s: float = 0.0, duration_s: float | None = None, every: int = 1) -> None:
        """Use only every n-th round of a part of the bag, in seconds after the first round."""
        stamps = [self._reference_ns(matched) for matched in self.plan.rounds]
        self._chosen = select_rounds(self.plan.rounds, stamps, start_s, duration_s, every)

    def image_counts(self) -> dict[str, int]:
        """Return the number of images by topic."""
        counts = Counter(image.camera for image in self.images)
        return {topic: counts[camera] for camera, topic in enumerate(self._topics)}

    def latest_stamps(self) -> dict[str, int]:
        """Return the stamp of the latest image by topic; 0 if none was set."""
        return {
            topic: max((image.stamp_ns for image in self.images if image.camera == camera), default=0)
            for camera, topic in enumerate(self._topics)
        }

    def key_frames(self) -> tuple[KeyFrame, ...]:
        """Return the annotated frames in order of time. Raises UserError for a bag without /sample_token."""
        return read_key_frames(self.bag)

    def ground_truth(self) -> dict[int, ObjectList]:
        """Return the ground truth in ego by stamp; empty for a bag without ground truth."""
        return read_objects(self.bag, "/ground_truth/detections", "/ground_truth/velocities", optional=True)

    def reference_stamps(self) -> list[int]:
        """Return the time of the detections of each round, in order. Decodes no image."""
        return [self._reference_ns(matched) for matched in self._chosen]

    def rounds(
        self, near_ns: Sequence[int] | None = None, *, skip: int = 0
    ) -> Iterator[tuple[CameraRound, bool]]:
        """Yield (round with decoded images, True if the stamps jumped back before it) in order.

        With `near_ns`, only rounds within 60 ms of these stamps are decoded; `skip` leaves out the first
        rounds. Unusable rounds are skipped. Problems of rounds and cameras are counted in `faults`.
        """
        for camera_round, after_jump in self.numbered_rounds(near_ns, skip=skip):
            if camera_round is not None:
                yield camera_round, after_jump

    def numbered_rounds(
        self, near_ns: Sequence[int] | None = None, *, skip: int = 0
    ) -> Iterator[tuple[CameraRound | None, bool]]:
        """Yield as `rounds`, but None for an unusable round."""
        if skip == 0:
            self.faults.update(self.plan.faults)
        builder = RoundBuilder(
            self.rig,
            topics=self._topics,
            num_views=self._num_views,
            reference_time=self.parameters.reference_time,
            anchor=self.parameters.anchor,
        )
        try:
            for matched in self.matched(near_ns, skip=skip):
                try:
                    built = builder.build(self._deserialize(matched))
                except UserError as error:
                    self.faults[fault_kind(str(error))] += 1
                    yield None, matched.after_jump
                    continue
                self.faults.update(map(fault_kind, built.faults.values()))
                yield built.camera_round, matched.after_jump
        finally:
            builder.close()

    def matched(self, near_ns: Sequence[int] | None = None, *, skip: int = 0) -> Iterator[MatchedRound[Any]]:
        """Yield the rounds with serialized images."""
        rounds = self._chosen[skip:]
        if near_ns is not None:
            wanted = sorted(near_ns)
            rounds = [r for r in rounds if nearest(wanted, self._reference_ns(r), _ROUND_SPAN_NS) is not None]
        contents = (
            (index, _SerializedImage(connection, content))
            for index, (connection, _, content) in enumerate(self.bag.raw(self._topics, optional=True))
        )
        yield from iterate_with_contents(rounds, contents)

    def latest_rounds_of_cameras(self, before: int) -> Iterator[CameraRound]:
        """Yield, for each camera, the latest of the first `before` rounds that has an image of it."""
        latest: dict[int, int] = {}
        for number, matched in enumerate(self._chosen[:before]):
            latest |= {camera: number for camera, stamp in enumerate(matched.stamps_ns) if stamp is not None}
        whole, faults = self._chosen, self.faults.copy()
        self._chosen = [whole[number] for number in sorted(set(latest.values()))]
        try:
            yield from (found for found, _ in self.rounds())
        finally:
            self._chosen, self.faults = whole, faults

    def _reference_ns(self, matched: MatchedRound[Any]) -> int:
        return reference_stamp_ns(matched, self.parameters.reference_time, self.parameters.anchor)

    def _deserialize(self, matched: MatchedRound[Any]) -> MatchedRound[Any]:
        messages = tuple(
            None if message is None else self.bag.deserialize(message.connection, message.content)
            for message in matched.messages
        )
        return replace(matched, messages=messages)


def fault_kind(text: str) -> str:
    """Return a fault without its time, so that equal faults of many rounds are counted together."""
    return _AT_TIME.sub("", text)


def read_key_frames(bag: BagReader) -> tuple[KeyFrame, ...]:
    """Return the annotated frames of a bag in order of time. Raises UserError without /sample_token."""
    found = {
        message.frame_id: stamp_to_ns(message.stamp) for _, _, message in bag.messages(["/sample_token"])
    }
    return tuple(KeyFrame(token, stamp) for token, stamp in sorted(found.items(), key=lambda item: item[1]))


def with_bag_cameras(bag: BagReader, parameters: DetectorParameters) -> DetectorParameters:
    """Return parameters with the cameras of a bag if they have the default cameras and topics, and the bag
    has others and lacks some of the default ones: all that it has, the default ones first."""
    usual, names = DetectorParameters().cameras, camera_names(bag)
    is_default = parameters.cameras == usual and not parameters.image_topic
    if not is_default or set(names) <= set(usual) or set(usual) <= set(names):
        return parameters
    known = [camera for camera in usual if camera in names]
    return replace(parameters, cameras=(*known, *sorted(set(names).difference(known))))


def camera_names(bag: BagReader) -> list[str]:
    """Return the cameras of a bag as in its topics: those with <camera>/image or <camera>/image/compressed
    and a camera_info."""
    found = {match[1]: None for topic in bag.topics if (match := _IMAGE_TOPIC.match(topic))}
    return [name for name in found if f"/{name}/camera_info" in bag.topics]


def read_objects(
    bag: BagReader,
    detections_topic: str,
    velocities_topic: str,
    *,
    frame: str = BASE_FRAME,
    optional: bool = False,
) -> dict[int, ObjectList]:
    """Return the objects of all Detection3DArray messages by header stamp, with velocities and, if the bag
    has them, attributes of the same stamp.

    Of two messages with equal stamps, the later one is used. Raises UserError for a missing topic unless
    `optional`, and for detections in another frame.
    """
    clouds = {
        stamp_to_ns(cloud.header.stamp): cloud
        for _, _, cloud in bag.messages([velocities_topic], optional=True)
    }
    attributes = _read_attributes(bag, annotations_topic(detections_topic))
    objects = {}
    for _, _, message in bag.messages([detections_topic], optional=optional):
        if message.header.frame_id != frame:
            raise UserError(
                f"bag {str(bag.path)!r}: {detections_topic} is in frame {message.header.frame_id!r}; "
                f"expected {frame}"
            )
        stamp_ns = stamp_to_ns(message.header.stamp)
        found = detections_to_objects(message, clouds.get(stamp_ns))
        names = attributes.get(stamp_ns, ())
        objects[stamp_ns] = replace(found, attributes=names) if len(names) == len(found.boxes) else found
    return objects


def annotations_topic(detections_topic: str) -> str:
    """Return the topic with attributes of detections: /ground_truth/annotations, /detections/annotations."""
    return f"{detections_topic.removesuffix('/detections') or detections_topic}/annotations"


def _read_attributes(bag: BagReader, topic: str) -> dict[int, tuple[str, ...]]:
    """Return the attributes of the objects by stamp; see `to_ros.make_annotations`."""
    found = {}
    for _, _, message in bag.messages([topic], optional=True):
        try:
            content = json.loads(message.data)
            found[int(content["stamp_ns"])] = tuple(str(entry["attribute"]) for entry in content["objects"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"bag {str(bag.path)!r}: {topic} has no annotations ({error})") from error
    return found


def nearest(stamps_ns: Sequence[int], stamp_ns: int, within_ns: int) -> int | None:
    """Return the stamp that is nearest to `stamp_ns`; None if none is within `within_ns`."""
    found = min(stamps_ns, key=lambda candidate: abs(candidate - stamp_ns), default=None)
    return found if found is not None and abs(found - stamp_ns) <= within_ns else None


def read_image_stamps(drive: Drive) -> list[list[int]]:
    """Return the header stamps in nanoseconds of the images of each camera, in the order of the bag."""
    return [
        [image.stamp_ns for image in drive.images if image.camera == camera]
        for camera in range(len(drive.cameras))
    ]


def _image_stamps(bag: BagReader, topics: Sequence[str]) -> list[ImageStamp]:
    """Return camera, stamp and log time of each image in the order of the bag."""
    camera_of = {topic: camera for camera, topic in enumerate(topics)}
    return [
        ImageStamp(camera_of[connection.topic], _header_stamp_ns(content), log_ns)
        for connection, log_ns, content in bag.raw(topics, optional=True)
    ]


def _image_topics(bag: BagReader, parameters: DetectorParameters) -> list[str]:
    """Return the image topic of each camera: by the parameters, or without a pattern the raw topic if only
    that exists.

    Raises UserError if the bag has none of them.
    """
    present = bag.topics
    topics = [resolve_topic(topic) for topic in parameters.image_topics]
    if not parameters.image_topic:
        raw = [f"/{camera}/image" for camera in parameters.cameras]
        topics = [
            raw_topic if raw_topic in present and topic not in present else topic
            for topic, raw_topic in zip(topics, raw, strict=True)
        ]
    if not any(topic in present for topic in topics):
        raise UserError(
            f"bag {str(bag.path)!r} has no camera topic such as {topics[0]} (give --image-topic, or "
            f"-p cameras:=[...]); it has {', '.join(sorted(present)) or 'none'}"
        )
    return topics


def _header_stamp_ns(content: bytes) -> int:
    """Return the stamp of a serialized message that begins with a header, after the 4-byte CDR header."""
    if len(content) < 12:
        return 0  # too short for a header
    order = "<" if content[1] & 1 else ">"
    seconds, nanoseconds = struct.unpack_from(f"{order}iI", content, 4)
    return int(seconds) * 1_000_000_000 + int(nanoseconds)
