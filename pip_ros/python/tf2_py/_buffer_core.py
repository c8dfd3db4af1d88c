# SPDX-License-Identifier: Apache-2.0
"""Forest of coordinate frames with look-up of transforms.

Frames are identified by name. Internal stamps are int nanoseconds. Arguments accept any time with
`nanoseconds` (`rclpy.time.Time`) or with `sec` and `nanosec` (`builtin_interfaces/Time`). Time 0 selects the
latest time common to all transforms on the path. One lock makes all methods thread-safe.
"""

import math
import threading
from collections.abc import Container
from typing import Any

from geometry_msgs.msg import Quaternion as QuaternionMessage
from geometry_msgs.msg import TransformStamped, Vector3
from rclpy.logging import get_logger
from rclpy.time import Time

from ._cache import Sample, StaticCache, TimeCache, seconds
from ._exceptions import (
    ConnectivityException,
    ExtrapolationException,
    InvalidArgumentException,
    LookupException,
    TransformException,
)
from ._rotation import IDENTITY, Rigid, compose, invert, normalized

DEFAULT_CACHE_TIME = 10 * 10**9
MAXIMUM_DEPTH = 1000


class BufferCore:
    """Stores transforms and composes them along the tree, without waiting; `tf2_ros.Buffer` adds waiting."""

    def __init__(self, cache_time: Any = None) -> None:
        """`cache_time` is an `rclpy.duration.Duration` or a Duration message; default 10 s."""
        given = cache_time is not None
        self._cache_time = _nanoseconds(cache_time, "cache_time") if given else DEFAULT_CACHE_TIME
        self._lock = threading.RLock()
        self._frames: dict[str, TimeCache | StaticCache] = {}  # by child frame
        self._names: dict[str, None] = {}  # all frame names, in order of first use
        self._authorities: dict[str, str] = {}

    # Insertion

    def set_transform(self, transform: TransformStamped, authority: str) -> None:
        """Store `frame_id`_from_`child_frame_id` at its stamp; log and drop it if invalid or too old."""
        self._set(transform, authority, is_static=False)

    def set_transform_static(self, transform: TransformStamped, authority: str) -> None:
        """Store a transform that is valid at any time; it replaces all transforms of its child frame."""
        self._set(transform, authority, is_static=True)

    def _set(self, message: TransformStamped, authority: str, is_static: bool) -> None:
        parent, child = message.header.frame_id.removeprefix("/"), message.child_frame_id.removeprefix("/")
        transform = _rigid(message)
        stamp = _nanoseconds(message.header.stamp, "header.stamp")
        name = f'the transform "{child}" in "{parent}" from "{authority}"'
        problem = _problem(parent, child, transform)
        if problem is not None:
            get_logger("tf2").error(f"ignored {name}: {problem}")
            return
        with self._lock:
            cache = self._frames.get(child)
            if cache is None or isinstance(cache, StaticCache) != is_static:
                cache = self._frames[child] = StaticCache() if is_static else TimeCache(self._cache_time)
            self._names.setdefault(child)
            self._names.setdefault(parent)
            if cache.insert(Sample(stamp, parent, transform)):
                self._authorities[child] = authority
                return
        get_logger("tf2").warning(
            f"ignored {name} at {seconds(stamp)} s: "
            f"it is older than the latest one by more than the cache time of {seconds(self._cache_time)} s"
        )

    def clear(self) -> None:
        """Delete all transforms except static ones; frame names are kept."""
        with self._lock:
            for cache in self._frames.values():
                cache.clear()

    # Look-up

    def lookup_transform_core(self, target_frame: str, source_frame: str, time: Any) -> TransformStamped:
        """Return `target_from_source` at `time`. Raises TransformException if it is not available."""
        with self._lock:
            stamp, transform = self._lookup(target_frame, source_frame, _nanoseconds(time, "time"))
        return _message(target_frame, source_frame, stamp, transform)

    def lookup_transform_full_core(
        self, target_frame: str, target_time: Any, source_frame: str, source_time: Any, fixed_frame: str
    ) -> TransformStamped:
        """Return `target` at `target_time` from `source` at `source_time`, with `fixed_frame` at rest."""
        with self._lock:
            for frame in (target_frame, source_frame, fixed_frame):
                self._require_frame(frame)
            source_stamp = _nanoseconds(source_time, "source_time")
            target_stamp = _nanoseconds(target_time, "target_time")
            _, fixed_from_source = self._lookup(fixed_frame, source_frame, source_stamp)
            stamp, target_from_fixed = self._lookup(target_frame, fixed_frame, target_stamp)
        return _message(target_frame, source_frame, stamp, compose(target_from_fixed, fixed_from_source))

    def can_transform_core(self, target_frame: str, source_frame: str, time: Any) -> tuple[bool, str]:
        """Return whether `lookup_transform_core` would succeed, and the reason if not."""
        stamp = _nanoseconds(time, "time")
        try:
            with self._lock:
                self._lookup(target_frame, source_frame, stamp)
        except TransformException as error:
            return False, str(error)
        return True, ""

    def can_transform_full_core(
        self, target_frame: str, target_time: Any, source_frame: str, source_time: Any, fixed_frame: str
    ) -> tuple[bool, str]:
        """Return whether `lookup_transform_full_core` would succeed, and the reason if not."""
        try:
            self.lookup_transform_full_core(target_frame, target_time, source_frame, source_time, fixed_frame)
        except TransformException as error:
            return False, str(error)
        return True, ""

    def get_latest_common_time(self, target_frame: str, source_frame: str) -> Time:
        """Return the latest time with a transform; 0 if the path has only static transforms."""
        with self._lock:
            for frame in (target_frame, source_frame):
                self._require_frame(frame)
            try:
                return Time(nanoseconds=self._latest_common_stamp(target_frame, source_frame))
            except TransformException as error:
                # The original raises the base class for every failure of this method.
                raise TransformException(str(error)) from error

    def all_frames_as_string(self) -> str:
        """Return one line per frame that has a parent."""
        with self._lock:
            latest = {child: cache.latest() for child, cache in self._frames.items()}
        return "".join(
            f"Frame {child} exists with parent {sample.parent if sample else 'NO_PARENT'}.\n"
            for child, sample in latest.items()
        )

    def all_frames_as_yaml(self) -> str:
        """Return the tree with rates and time spans, in the format of the service `tf2_frames`."""
        with self._lock:
            if not self._names:
                return "[]"
            return "".join(self._frame_as_yaml(child) for child in self._frames)

    def _frame_as_yaml(self, child: str) -> str:
        sample = self._frames[child].latest()
        if sample is None:
            return ""
        oldest, latest, count = self._frames[child].span()
        rate = count / max((latest - oldest) / 1e9, 1e-4)
        return (
            f"{child}: \n"
            f"  parent: '{sample.parent}'\n"
            f"  broadcaster: '{self._authorities[child]}'\n"
            f"  rate: {rate:.3f}\n"
            f"  most_recent_transform: {latest / 1e9:.6f}\n"
            f"  oldest_transform: {oldest / 1e9:.6f}\n"
            f"  buffer_length: {(latest - oldest) / 1e9:.3f}\n"
        )

    def _frameExists(self, frame_id: str) -> bool:
        with self._lock:
            return frame_id in self._names

    def _getFrameStrings(self) -> list[str]:
        with self._lock:
            return list(self._names)

    # Tree traversal; the caller holds the lock

    def _require_frame(self, frame: str) -> None:
        if not isinstance(frame, str):
            raise TypeError(f"a frame's name is a str, not {frame!r}")
        if not frame or frame.startswith("/"):
            raise InvalidArgumentException(f'"{frame}" names no frame: it is empty or begins with a slash')
        if frame not in self._names:
            raise LookupException(f'frame "{frame}" does not exist')

    def _lookup(self, target: str, source: str, stamp: int) -> tuple[int, Rigid]:
        """Return the stamp of the transform and `target_from_source`."""
        if target == source:
            # Valid even for a frame that does not exist yet.
            cache = self._frames.get(target)
            return (cache.span()[1] if stamp == 0 and cache else stamp), IDENTITY
        self._require_frame(target)
        self._require_frame(source)
        if stamp == 0:
            stamp = self._latest_common_stamp(target, source)
        ascent, failure = self._ascend(source, target, stamp)
        if target in ascent:
            return stamp, ascent[target]
        ancestor_from_target = IDENTITY
        frame = target
        for _ in range(MAXIMUM_DEPTH):
            if frame in ascent:
                return stamp, compose(invert(ancestor_from_target), ascent[frame])
            if frame not in self._frames:
                break
            try:
                sample = self._frames[frame].at(stamp)
            except ExtrapolationException as error:
                raise _gap(error, frame, target, source) from None
            ancestor_from_target = compose(sample.transform, ancestor_from_target)
            frame = sample.parent
        else:
            raise self._loop()
        if failure is not None:
            raise failure
        raise _unconnected(target, source)

    def _ascend(
        self, source: str, target: str, stamp: int
    ) -> tuple[dict[str, Rigid], ExtrapolationException | None]:
        """Return `ancestor_from_source` for `source` and its ancestors up to `target`, the root or a gap.

        The error for a gap is returned, not raised, because `target` may still be reached below the gap.
        """
        ascent = {source: IDENTITY}
        frame = source
        while frame != target and frame in self._frames:
            try:
                sample = self._frames[frame].at(stamp)
            except ExtrapolationException as error:
                return ascent, _gap(error, frame, target, source)
            if sample.parent in ascent or len(ascent) > MAXIMUM_DEPTH:
                raise self._loop()
            ascent[sample.parent] = compose(sample.transform, ascent[frame])
            frame = sample.parent
        return ascent, None

    def _latest_common_stamp(self, target: str, source: str) -> int:
        """Return the oldest of the latest stamps on the path; static transforms (stamp 0) are ignored."""
        if target == source:
            return self._frames[target].span()[1] if target in self._frames else 0
        from_source = self._latest_chain(source, {target})
        from_target = self._latest_chain(target, from_source)
        common = list(from_target)[-1]
        if common not in from_source:
            raise _unconnected(target, source)
        bounds = [stamp for chain in (from_source, from_target) for stamp in _below(chain, common) if stamp]
        return min(bounds, default=0)

    def _latest_chain(self, frame: str, stop: Container[str]) -> dict[str, int]:
        """Return `frame` and its ancestors up to the first one in `stop` or the root.

        The values are the stamps of the latest transforms; the last one is 0.
        """
        chain: dict[str, int] = {}
        while frame not in stop and (cache := self._frames.get(frame)) and (sample := cache.latest()):
            chain[frame] = sample.stamp
            frame = sample.parent
            if frame in chain:
                raise self._loop()
        chain[frame] = 0
        return chain

    def _loop(self) -> LookupException:
        return LookupException(f"the tree of frames has a loop:\n{self.all_frames_as_string()}")


def _below(chain: dict[str, int], ancestor: str) -> list[int]:
    frames = list(chain)
    return [chain[frame] for frame in frames[: frames.index(ancestor)]]


def _gap(error: ExtrapolationException, frame: str, target: str, source: str) -> ExtrapolationException:
    return ExtrapolationException(f'{error} ("{frame}", on the way from "{source}" to "{target}")')


def _unconnected(target: str, source: str) -> ConnectivityException:
    return ConnectivityException(f'"{source}" and "{target}" are in trees that nothing connects')


def _nanoseconds(time: Any, name: str) -> int:
    if hasattr(time, "sec") and hasattr(time, "nanosec"):
        return int(time.sec) * 10**9 + int(time.nanosec)
    if hasattr(time, "nanoseconds"):
        return int(time.nanoseconds)
    raise TypeError(f"{name} must have sec and nanosec, or nanoseconds; {time!r} has neither")


def _rigid(message: TransformStamped) -> Rigid:
    translation, rotation = message.transform.translation, message.transform.rotation
    if not isinstance(translation, Vector3) or not isinstance(rotation, QuaternionMessage):
        raise TypeError(
            "a transform is a geometry_msgs Vector3 and Quaternion, "
            f"not {type(translation).__name__} and {type(rotation).__name__}"
        )
    return Rigid(
        (float(translation.x), float(translation.y), float(translation.z)),
        normalized((float(rotation.x), float(rotation.y), float(rotation.z), float(rotation.w))),
    )


def _problem(parent: str, child: str, transform: Rigid) -> str | None:
    """Return why a transform is invalid; None if it is valid."""
    if not parent or not child:
        return "header.frame_id and child_frame_id must both be set"
    if parent == child:
        return "a frame cannot be its own parent"
    if any(math.isnan(value) for value in (*transform.translation, *transform.rotation)):
        return f"it holds NaN or a quaternion of length 0: {transform}"
    return None


def _message(target: str, source: str, stamp: int, transform: Rigid) -> TransformStamped:
    message = TransformStamped()
    message.header.stamp.sec, message.header.stamp.nanosec = divmod(stamp, 10**9)
    message.header.frame_id = target
    message.child_frame_id = source
    translation, rotation = message.transform.translation, message.transform.rotation
    translation.x, translation.y, translation.z = transform.translation
    rotation.x, rotation.y, rotation.z, rotation.w = normalized(transform.rotation)
    return message
