# SPDX-License-Identifier: Apache-2.0
"""Transform buffer that waits for transforms: blocking with a timeout, or through a future.

Times are `rclpy.time.Time` or `builtin_interfaces/Time`; time 0 (`Time()`) selects the latest. Timeouts are
wall time, also in simulation. A blocking wait needs another thread that feeds the buffer; in a callback of a
single-threaded executor it always times out.
"""

import threading
import time as wall
from collections.abc import Callable

from geometry_msgs.msg import TransformStamped
from rclpy.clock import Clock, JumpThreshold, TimeJump
from rclpy.duration import Duration
from rclpy.logging import get_logger
from rclpy.node import Node
from rclpy.task import Future
from rclpy.time import Time
from tf2_msgs.srv import FrameGraph
from tf2_py import BufferCore, TransformException

NO_WAIT = Duration()
Availability = tuple[bool, str]  # whether the transform exists, and the reason if not


class Buffer(BufferCore):
    """The transforms of the last `cache_time` (default 10 s).

    With a `node` the buffer offers the service `tf2_frames` and uses the clock of the node, otherwise the
    system clock. It is cleared when that clock jumps back by one second or more or changes its type.
    """

    def __init__(self, cache_time: Duration | None = None, node: Node | None = None) -> None:
        super().__init__(cache_time)
        self._changed = threading.Condition()
        self._pending: list[Callable[[], bool]] = []
        if node is None:
            self.clock = Clock()
        else:
            self.srv = node.create_service(FrameGraph, "tf2_frames", self._serve_frame_graph)
            self.clock = node.get_clock()
        jumps = JumpThreshold(min_forward=None, min_backward=Duration(seconds=-1), on_clock_change=True)
        self.jump_handle = self.clock.create_jump_callback(jumps, post_callback=self.time_jump_callback)

    def _serve_frame_graph(
        self, request: FrameGraph.Request, response: FrameGraph.Response
    ) -> FrameGraph.Response:
        response.frame_yaml = self.all_frames_as_yaml()
        return response

    def time_jump_callback(self, time_jump: TimeJump) -> None:
        """Clear the buffer after a clock jump; static transforms are kept."""
        get_logger("tf2_buffer").warning("the clock jumped back or changed its type: cleared the buffer")
        self.clear()

    def set_transform(self, transform: TransformStamped, authority: str) -> None:
        """Store a transform and notify waiting callers; see `BufferCore.set_transform`."""
        super().set_transform(transform, authority)
        self._notify()

    def set_transform_static(self, transform: TransformStamped, authority: str) -> None:
        """Store a static transform and notify waiting callers; see `BufferCore.set_transform_static`."""
        super().set_transform_static(transform, authority)
        self._notify()

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()
            pending = list(self._pending)
        # Outside the lock, because the callbacks of a future may use the buffer. Pending attempts stay in the
        # list meanwhile, so that a transform from another thread is tried too.
        completed = [attempt for attempt in pending if attempt()]
        with self._changed:
            self._pending = [attempt for attempt in self._pending if attempt not in completed]

    # Transforms at one time

    def lookup_transform(
        self, target_frame: str, source_frame: str, time: Time, timeout: Duration = NO_WAIT
    ) -> TransformStamped:
        """Return `target_from_source` at `time`; wait for it up to `timeout`.

        The header of the message has the target frame and the time of the transform; its child frame is the
        source. Raises TransformException with the reason if there is none.
        """
        self.can_transform(target_frame, source_frame, time, timeout)
        return self.lookup_transform_core(target_frame, source_frame, time)

    async def lookup_transform_async(
        self, target_frame: str, source_frame: str, time: Time
    ) -> TransformStamped:
        """Return `target_from_source` at `time`; wait without a timeout."""
        return await self.wait_for_transform_async(target_frame, source_frame, time)

    def can_transform(
        self,
        target_frame: str,
        source_frame: str,
        time: Time,
        timeout: Duration = NO_WAIT,
        return_debug_tuple: bool = False,
    ) -> bool | Availability:
        """Return whether the transform exists; wait up to `timeout`. `return_debug_tuple` adds the reason."""
        available = self._wait(lambda: self.can_transform_core(target_frame, source_frame, time), timeout)
        return available if return_debug_tuple else available[0]

    def wait_for_transform_async(
        self, target_frame: str, source_frame: str, time: Time
    ) -> Future[TransformStamped]:
        """Return a future that completes with the transform as soon as it exists."""
        return self._future(lambda: self.lookup_transform_core(target_frame, source_frame, time))

    # Transforms between two times, through a frame at rest

    def lookup_transform_full(
        self,
        target_frame: str,
        target_time: Time,
        source_frame: str,
        source_time: Time,
        fixed_frame: str,
        timeout: Duration = NO_WAIT,
    ) -> TransformStamped:
        """Return `target` at `target_time` from `source` at `source_time`, with `fixed_frame` at rest."""
        arguments = (target_frame, target_time, source_frame, source_time, fixed_frame)
        self.can_transform_full(*arguments, timeout)
        return self.lookup_transform_full_core(*arguments)

    async def lookup_transform_full_async(
        self, target_frame: str, target_time: Time, source_frame: str, source_time: Time, fixed_frame: str
    ) -> TransformStamped:
        """Like `lookup_transform_full`, but wait without a timeout."""
        return await self.wait_for_transform_full_async(
            target_frame, target_time, source_frame, source_time, fixed_frame
        )

    def can_transform_full(
        self,
        target_frame: str,
        target_time: Time,
        source_frame: str,
        source_time: Time,
        fixed_frame: str,
        timeout: Duration = NO_WAIT,
        return_debug_tuple: bool = False,
    ) -> bool | Availability:
        """Return whether `lookup_transform_full` would succeed; wait up to `timeout`."""
        arguments = (target_frame, target_time, source_frame, source_time, fixed_frame)
        available = self._wait(lambda: self.can_transform_full_core(*arguments), timeout)
        return available if return_debug_tuple else available[0]

    def wait_for_transform_full_async(
        self, target_frame: str, target_time: Time, source_frame: str, source_time: Time, fixed_frame: str
    ) -> Future[TransformStamped]:
        """Return a future that completes with the result of `lookup_transform_full`."""
        arguments = (target_frame, target_time, source_frame, source_time, fixed_frame)
        return self._future(lambda: self.lookup_transform_full_core(*arguments))

    # Waiting

    def _wait(self, check: Callable[[], Availability], timeout: Duration) -> Availability:
        deadline = wall.monotonic() + timeout.nanoseconds / 1e9
        with self._changed:
            while not (available := check())[0]:
                remaining = deadline - wall.monotonic()
                if remaining <= 0.0:
                    break
                self._changed.wait(remaining)
        return available

    def _future(self, lookup: Callable[[], TransformStamped]) -> Future[TransformStamped]:
        future: Future[TransformStamped] = Future()

        def attempt() -> bool:
            """Try to complete the future; return True if no further attempt is needed."""
            if future.done() or future.cancelled():
                return True
            try:
                future.set_result(lookup())
            except TransformException:
                return False
            except Exception as error:
                future.set_exception(error)
            return True

        # Queued before the first attempt, so that a transform that arrives in between is not missed.
        with self._changed:
            self._pending.append(attempt)
        if attempt():
            with self._changed:
                if attempt in self._pending:
                    self._pending.remove(attempt)
        return future
