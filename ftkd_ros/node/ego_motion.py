# SPDX-License-Identifier: Apache-2.0
"""Pose of the vehicle over ground: from tf, or from nav_msgs/Odometry.

Both interpolate and never extrapolate. The worker thread calls these functions; callbacks store messages.
"""

import time
from collections.abc import Callable
from typing import Any, Final, Protocol

import numpy as np
from geometry_msgs.msg import TransformStamped
from numpy.typing import NDArray
from rclpy.duration import Duration
from rclpy.time import Time
from tf2_ros import Buffer, TransformException

from ftkd_core.errors import UserError
from ftkd_ros.convert.calibration import read_rigid
from ftkd_ros.convert.from_ros import stamp_to_ns
from ftkd_ros.sync.matcher import JUMP_NS

GROUND_FRAMES: Final = ("map", "odom")
"""Frames that `map_frame: auto` tries, in this order."""
AUTO: Final = "auto"
_POLL_S: Final = 0.002
_WORLD, _VEHICLE = "world", "vehicle"  # frames of the buffer of odometry


class RewindingBuffer(Buffer):
    """A tf buffer that is cleared when the stamps of a frame jump back, as in a looped bag.

    A plain Buffer refuses such transforms as too old (if the jump exceeds its cache time) or mixes them with
    those of the previous loop. Only the C++ listener clears its buffer. Static transforms are kept.
    """

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._newest_ns: dict[str, int] = {}

    def set_transform(self, transform: Any, authority: str) -> None:
        """Store a transform; the first transform of a new stream clears those of the previous stream."""
        stamp_ns = stamp_to_ns(transform.header.stamp)
        newest_ns = self._newest_ns.get(transform.child_frame_id, stamp_ns)
        if stamp_ns < newest_ns - JUMP_NS:
            self.clear()
            self._newest_ns.clear()
            newest_ns = stamp_ns
        self._newest_ns[transform.child_frame_id] = max(newest_ns, stamp_ns)
        super().set_transform(transform, authority)


class EgoMotion(Protocol):
    """Source of the vehicle pose."""

    def has_pose(self, stamp_ns: int) -> bool: ...

    def global_from_ego(self, stamp_ns: int, wait_until: float) -> NDArray[np.float64]: ...


class TfPose:
    """Pose from tf. `map_frame` auto takes the first of GROUND_FRAMES that tf has, and logs which one."""

    def __init__(
        self, buffer: Buffer, base_frame: str, map_frame: str, log: Callable[[str], object] = lambda _: None
    ) -> None:
        self._buffer = buffer
        self._base_frame = base_frame
        self._given = map_frame
        self._log = log
        self._chosen = None if map_frame == AUTO else map_frame

    def has_pose(self, stamp_ns: int) -> bool:
        """Return True if tf has the ego pose at a stamp, or if waiting for it cannot help."""
        frame = self._frame()
        return frame is not None and (
            bool(self._buffer.can_transform(frame, self._base_frame, Time(nanoseconds=stamp_ns)))
            or is_past(self._buffer, frame, self._base_frame, stamp_ns)
        )

    def global_from_ego(self, stamp_ns: int, wait_until: float) -> NDArray[np.float64]:
        """Return the ego pose (4, 4) at a stamp. UserError if tf has none at the time `wait_until`."""
        while (frame := self._frame()) is None:
            if time.monotonic() >= wait_until:
                raise UserError(
                    f"tf has neither {' nor '.join(GROUND_FRAMES)} above {self._base_frame}; publish one of "
                    "them, or set map_frame or odometry_topic"
                )
            time.sleep(_POLL_S)
        return look_up(self._buffer, frame, self._base_frame, stamp_ns, wait_until)

    def _frame(self) -> str | None:
        if self._chosen is None:
            for frame in GROUND_FRAMES:
                if self._buffer.can_transform(frame, self._base_frame, Time()):
                    self._chosen = frame
                    self._log(f"map_frame auto: {frame}, because tf has it")
                    break
        return self._chosen


class OdometryPose:
    """Pose from nav_msgs/Odometry; `buffer` gives the transform from its child frame to the base frame."""

    def __init__(self, buffer: Buffer, base_frame: str, topic: str, cache_s: float) -> None:
        self._buffer = buffer
        self._base_frame = base_frame
        self._topic = topic
        self._poses = RewindingBuffer(cache_time=Duration(seconds=cache_s))
        self._child: str | None = None

    def add(self, message: Any) -> None:
        """Store the pose of a nav_msgs/Odometry."""
        transform = TransformStamped(header=message.header, child_frame_id=_VEHICLE)
        transform.header.frame_id = _WORLD
        position, pose = message.pose.pose.position, transform.transform
        pose.translation.x, pose.translation.y, pose.translation.z = position.x, position.y, position.z
        pose.rotation = message.pose.pose.orientation
        self._poses.set_transform(transform, "odometry")
        self._child = message.child_frame_id or self._base_frame

    def has_pose(self, stamp_ns: int) -> bool:
        """Return True if odometry covers a stamp, or if waiting for it cannot help."""
        known = self._poses.can_transform(_WORLD, _VEHICLE, Time(nanoseconds=stamp_ns))
        return bool(known) or is_past(self._poses, _WORLD, _VEHICLE, stamp_ns)

    def global_from_ego(self, stamp_ns: int, wait_until: float) -> NDArray[np.float64]:
        """Return the ego pose (4, 4) at a stamp. UserError without odometry at the time `wait_until`."""
        try:
            pose = look_up(self._poses, _WORLD, _VEHICLE, stamp_ns, wait_until)
        except UserError as error:
            if self._child is None:
                raise UserError(f"no message on odometry_topic {self._topic}; check the topic") from None
            raise UserError(f"odometry_topic {self._topic}: {error}") from None
        if self._child in (None, self._base_frame):
            return pose
        assert self._child is not None
        return pose @ look_up(self._buffer, self._child, self._base_frame, stamp_ns, wait_until)


def look_up(
    buffer: Buffer, target: str, source: str, stamp_ns: int, wait_until: float
) -> NDArray[np.float64]:
    """Return the transform (4, 4) target <- source at a stamp. UserError if it is missing at the monotonic
    time `wait_until`, or if waiting cannot help."""
    stamp = Time(nanoseconds=stamp_ns)
    while True:
        try:
            found = buffer.lookup_transform(target, source, stamp)
        except TransformException as error:
            if time.monotonic() >= wait_until or is_past(buffer, target, source, stamp_ns):
                raise UserError(f"no transform {target} <- {source} at {stamp_ns} ns: {error}") from error
            time.sleep(_POLL_S)
            continue
        return read_rigid(found.transform, f"transform {target} <- {source}")


def is_past(buffer: Buffer, target: str, source: str, stamp_ns: int) -> bool:
    """Return True if the newest transform is later than the stamp, so that waiting cannot help."""
    try:
        newest = buffer.lookup_transform(target, source, Time())
    except TransformException:
        return False
    newest_ns = stamp_to_ns(newest.header.stamp)
    return newest_ns > stamp_ns
