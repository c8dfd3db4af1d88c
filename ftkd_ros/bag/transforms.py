# SPDX-License-Identifier: Apache-2.0
"""Transforms of a bag, resolved as tf2 does: chains, inverse edges and interpolation; without ROS.

A frame has one parent, and its transforms are static or a series over time. Between two stamps of a series,
the translation is interpolated linearly and the rotation on the shorter arc; nothing is extrapolated. Leading
slashes of frame names are ignored. There is no cache time, because a bag is complete.
"""

import bisect
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ftkd_core.errors import UserError
from ftkd_core.geometry import interpolate_rigid, invert_rigid
from ftkd_ros.convert.calibration import read_rigid
from ftkd_ros.convert.from_ros import stamp_to_ns

_MAX_DEPTH: Final = 1000
_WORLD, _VEHICLE = "world", "vehicle"  # frames of odometry

Matrix = NDArray[np.float64]


def frame_name(frame_id: str) -> str:
    """Return a frame name without its leading slash, which ROS 1 used."""
    return frame_id.removeprefix("/")


class TransformError(UserError):
    """A transform that a bag does not have; the message states the two frames, the time and the reason."""


class _Sample(NamedTuple):
    """`parent_from_child` at one time."""

    parent: str
    matrix: Matrix


class _Gap(Exception):  # noqa: N818  # internal: becomes a TransformError that names both frames
    """A frame has no transform at the requested time."""


@dataclass
class _Series:
    """Transforms of one child frame over time; stamps ascend, equal stamps in order of arrival."""

    stamps_ns: list[int] = field(default_factory=list)
    samples: list[_Sample] = field(default_factory=list)

    def insert(self, stamp_ns: int, sample: _Sample) -> None:
        place = bisect.bisect_right(self.stamps_ns, stamp_ns)
        self.stamps_ns.insert(place, stamp_ns)
        self.samples.insert(place, sample)

    def at(self, stamp_ns: int) -> _Sample:
        first, last = self.stamps_ns[0], self.stamps_ns[-1]
        if not first <= stamp_ns <= last:
            raise _Gap(f"its transforms are from {first} to {last} ns")
        if stamp_ns in (first, last):
            return self.samples[-1 if stamp_ns == last else 0]
        after = bisect.bisect_right(self.stamps_ns, stamp_ns)
        older, newer = self.samples[after - 1], self.samples[after]
        elapsed = stamp_ns - self.stamps_ns[after - 1]
        if older.parent != newer.parent or elapsed == 0:
            return older  # a frame that changes its parent keeps the older one until the newer stamp
        share = elapsed / (self.stamps_ns[after] - self.stamps_ns[after - 1])
        return _Sample(older.parent, interpolate_rigid(older.matrix, newer.matrix, share))

    @property
    def latest(self) -> _Sample:
        return self.samples[-1]


@dataclass
class _Static:
    """One transform that is valid at any time."""

    latest: _Sample

    def at(self, stamp_ns: int) -> _Sample:
        return self.latest


class TransformTree:
    """Forest of frames. `ignored`: transforms that tf2 would refuse too, by reason."""

    def __init__(self) -> None:
        self.ignored: Counter[str] = Counter()
        self._edges: dict[str, _Series | _Static] = {}  # by child frame

    def add_message(self, message: Any, *, static: bool) -> None:
        """Add the transforms of a tf2_msgs/TFMessage."""
        for stamped in message.transforms:
            self.add(
                stamped.header.frame_id,
                stamped.child_frame_id,
                stamp_to_ns(stamped.header.stamp),
                stamped.transform,
                static=static,
            )

    def add(self, parent: str, child: str, stamp_ns: int, transform: Any, *, static: bool) -> None:
        """Add a geometry_msgs/Transform or Pose; a static one replaces all transforms of its child frame."""
        parent, child = frame_name(parent), frame_name(child)
        if not parent or not child or parent == child:
            self.ignored[
                f"transform {parent or '(empty)'} <- {child or '(empty)'} does not name two frames"
            ] += 1
            return
        try:
            matrix = read_rigid(transform, f"transform {parent} <- {child}")
        except (UserError, ValueError) as error:
            self.ignored[str(error)] += 1
            return
        sample, edge = _Sample(parent, matrix), self._edges.get(child)
        if static:
            self._edges[child] = _Static(sample)
        elif isinstance(edge, _Series):
            edge.insert(stamp_ns, sample)
        else:
            self._edges[child] = _Series([stamp_ns], [sample])

    @property
    def frames(self) -> set[str]:
        """Names of all frames."""
        return {*self._edges, *(edge.latest.parent for edge in self._edges.values())}

    def connects(self, target: str, source: str) -> bool:
        """Return whether the newest transforms connect two frames."""
        return source == target or bool(set(self._newest_path(source)) & set(self._newest_path(target)))

    def connected_to(self, frame: str) -> list[str]:
        """Return the other frames that transforms connect to a frame, by name."""
        return sorted(name for name in self.frames if name != frame and self.connects(frame, name))

    def descendants(self, frame: str) -> list[str]:
        """Return the frames that the newest transforms attach below a frame, by name."""
        return sorted(name for name in self.frames if name != frame and frame in self._newest_path(name))

    def lookup(self, target: str, source: str, stamp_ns: int) -> Matrix:
        """Return `target_from_source` (4, 4) at a stamp. Raises TransformError if there is none."""
        target, source = frame_name(target), frame_name(source)
        if target == source:
            return np.eye(4)
        missing = [name for name in (target, source) if name not in self.frames]
        if missing:
            raise self._error(target, source, stamp_ns, f"no transform has the frame {missing[0]!r}")
        ascent, gap = self._ascend(source, target, stamp_ns)
        ancestor_from_target, frame = np.eye(4), target
        for _ in range(_MAX_DEPTH):
            if frame in ascent:
                return invert_rigid(ancestor_from_target) @ ascent[frame]
            if frame not in self._edges:
                break
            try:
                sample = self._edges[frame].at(stamp_ns)
            except _Gap as error:
                raise self._error(target, source, stamp_ns, f"{frame}: {error}") from None
            ancestor_from_target = sample.matrix @ ancestor_from_target
            frame = sample.parent
        raise self._error(target, source, stamp_ns, gap or "nothing connects the two frames")

    def _ascend(self, source: str, target: str, stamp_ns: int) -> tuple[dict[str, Matrix], str | None]:
        """Return `ancestor_from_source` of the ancestors of `source` up to `target`, the root or a gap, and
        the gap. It is no error yet, because the path from `target` may meet a frame below it."""
        ascent = {source: np.eye(4)}
        frame = source
        while frame != target and frame in self._edges and len(ascent) <= _MAX_DEPTH:
            try:
                sample = self._edges[frame].at(stamp_ns)
            except _Gap as error:
                return ascent, f"{frame}: {error}"
            if sample.parent in ascent:
                raise self._error(target, source, stamp_ns, f"the frames have a loop at {sample.parent}")
            ascent[sample.parent] = sample.matrix @ ascent[frame]
            frame = sample.parent
        return ascent, None

    def _newest_path(self, frame: str) -> list[str]:
        """Return a frame and its ancestors by the newest transforms."""
        path = [frame]
        while frame in self._edges and (frame := self._edges[frame].latest.parent) not in path:
            path.append(frame)
        return path

    def _error(self, target: str, source: str, stamp_ns: int, reason: str) -> TransformError:
        bad = next(iter(self.ignored), None)
        return TransformError(
            f"no transform {target} <- {source} at {stamp_ns} ns: {reason}{f' ({bad})' if bad else ''}"
        )


def tree_of(messages: Iterable[tuple[str, int, Any]]) -> TransformTree:
    """Return the tree of the messages of /tf and /tf_static in the order of their log times."""
    tree = TransformTree()
    for topic, _, message in messages:
        tree.add_message(message, static=topic.endswith("tf_static"))
    return tree


class OdometryTrack:
    """Poses of nav_msgs/Odometry, as `node.ego_motion.OdometryPose` uses them: the frame of the header has no
    meaning, and tf connects the child frame to the base frame."""

    def __init__(self, topic: str, messages: Iterable[tuple[str, int, Any]], base_frame: str) -> None:
        self._topic, self._base = topic, base_frame
        self._poses = TransformTree()
        self._child = base_frame
        for _, _, message in messages:
            self._child = frame_name(message.child_frame_id) or base_frame
            stamp_ns = stamp_to_ns(message.header.stamp)
            self._poses.add(_WORLD, _VEHICLE, stamp_ns, message.pose.pose, static=False)
        if not self._poses.frames:
            raise UserError(f"no usable message on odometry_topic {topic}; check the topic")

    def pose(self, tree: TransformTree, stamp_ns: int) -> Matrix:
        """Return the pose (4, 4) of the base frame. Raises TransformError outside the time range."""
        try:
            world_from_child = self._poses.lookup(_WORLD, _VEHICLE, stamp_ns)
        except TransformError as error:
            raise TransformError(f"odometry_topic {self._topic}: {error}") from None
        return world_from_child @ tree.lookup(self._child, self._base, stamp_ns)
