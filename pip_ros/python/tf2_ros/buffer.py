# SPDX-License-Identifier: Apache-2.0
"""A transform buffer that can wait: by blocking with a timeout, or by a future.

Times are `rclpy.time.Time` or `builtin_interfaces/Time`; time 0 (`Time()`) asks for the latest. Timeouts
count wall-clock time, also in simulation. A blocking wait needs another thread to feed the buffer: in a
callback of a single-threaded executor it can only run out.
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
Answer = tuple[bool, str]


class Buffer(BufferCore):
    """The transforms of the last `cache_time` (10 s unless given).

    With a `node` it offers the service `tf2_frames` and follows the node's clock, else the system's; it is
    cleared when that clock jumps back by a second or more or changes its kind.
    """

    def __init__(self, cache_time: Duration | None = None, node: Node | None = None) -> None:
        super().__init__(cache_time)
        self._news = threading.Condition()
        self._pending: list[Callable[[], bool]] = []
        if node is None:
            self.clock = Clock()
        else:
            self.srv = node.create_service(FrameGraph, "tf2_frames", self._answer_frame_graph)
            self.clock = node.get_clock()
        jumps = JumpThreshold(min_forward=None, min_backward=Duration(seconds=-1), on_clock_change=True)
        self.jump_handle = self.clock.create_jump_callback(jumps, post_callback=self.time_jump_callback)

    def _answer_frame_graph(
        self, request: FrameGraph.Request, response: FrameGraph.Response
    ) -> FrameGraph.Response:
        response.frame_yaml = self.all_frames_as_yaml()
        return response

    def time_jump_callback(self, time_jump: TimeJump) -> None:
        """Forget what was received before the clock jumped; static transforms stay."""
        get_logger("tf2_buffer").warning("the clock jumped back or changed its kind: cleared the buffer")
        self.clear()

    def set_transform(self, transform: TransformStamped, authority: str) -> None:
        """Store a transform and wake whoever waits for it; see `BufferCore.set_transform`."""
        super().set_transform(transform, authority)
        self._announce()

    def set_transform_static(self, transform: TransformStamped, authority: str) -> None:
        """Store a static transform and wake whoever waits for it; see `BufferCore.set_transform_static`."""
        super().set_transform_static(transform, authority)
        self._announce()

    def _announce(self) -> None:
        with self._news:
            self._news.notify_all()
            pending = list(self._pending)
        # Outside the lock: a future's callbacks may use the buffer. Those that stay unanswered stay in the
        # list meanwhile, so that news from another thread reaches them too.
        answered = [attempt for attempt in pending if attempt()]
        with self._news:
            self._pending = [attempt for attempt in self._pending if attempt not in answered]

    # Transforms at one time

    def lookup_transform(
        self, target_frame: str, source_frame: str, time: Time, timeout: Duration = NO_WAIT
    ) -> TransformStamped:
        """`target_from_source` at `time`, after waiting for it up to `timeout`.

        The message's header names the target frame and the time of the answer, its child frame is the source.
        Raises the TransformException that says why there is none.
        """
        self.can_transform(target_frame, source_frame, time, timeout)
        return self.lookup_transform_core(target_frame, source_frame, time)

    async def lookup_transform_async(
        self, target_frame: str, source_frame: str, time: Time
    ) -> TransformStamped:
        """`target_from_source` at `time`, awaited for as long as it takes."""
        return await self.wait_for_transform_async(target_frame, source_frame, time)

    def can_transform(
        self,
        target_frame: str,
        source_frame: str,
        time: Time,
        timeout: Duration = NO_WAIT,
        return_debug_tuple: bool = False,
    ) -> bool | Answer:
        """Whether there is a transform, after waiting up to `timeout`; if asked for, with the reason."""
        answer = self._wait(lambda: self.can_transform_core(target_frame, source_frame, time), timeout)
        return answer if return_debug_tuple else answer[0]

    def wait_for_transform_async(
        self, target_frame: str, source_frame: str, time: Time
    ) -> Future[TransformStamped]:
        """A future whose result is the transform, done as soon as there is one."""
        return self._future(lambda: self.lookup_transform_core(target_frame, source_frame, time))

    # Transforms between two times, through a frame that does not move

    def lookup_transform_full(
        self,
        target_frame: str,
        target_time: Time,
        source_frame: str,
        source_time: Time,
        fixed_frame: str,
        timeout: Duration = NO_WAIT,
    ) -> TransformStamped:
        """`target` at `target_time` from `source` at `source_time`, through a `fixed_frame` at rest."""
        question = (target_frame, target_time, source_frame, source_time, fixed_frame)
        self.can_transform_full(*question, timeout)
        return self.lookup_transform_full_core(*question)

    async def lookup_transform_full_async(
        self, target_frame: str, target_time: Time, source_frame: str, source_time: Time, fixed_frame: str
    ) -> TransformStamped:
        """As `lookup_transform_full`, awaited for as long as it takes."""
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
    ) -> bool | Answer:
        """Whether `lookup_transform_full` would answer, after waiting up to `timeout`."""
        question = (target_frame, target_time, source_frame, source_time, fixed_frame)
        answer = self._wait(lambda: self.can_transform_full_core(*question), timeout)
        return answer if return_debug_tuple else answer[0]

    def wait_for_transform_full_async(
        self, target_frame: str, target_time: Time, source_frame: str, source_time: Time, fixed_frame: str
    ) -> Future[TransformStamped]:
        """A future whose result is what `lookup_transform_full` returns."""
        question = (target_frame, target_time, source_frame, source_time, fixed_frame)
        return self._future(lambda: self.lookup_transform_full_core(*question))

    # Waiting

    def _wait(self, ask: Callable[[], Answer], timeout: Duration) -> Answer:
        deadline = wall.monotonic() + timeout.nanoseconds / 1e9
        with self._news:
            while not (answer := ask())[0]:
                remaining = deadline - wall.monotonic()
                if remaining <= 0.0:
                    break
                self._news.wait(remaining)
        return answer

    def _future(self, lookup: Callable[[], TransformStamped]) -> Future[TransformStamped]:
        future: Future[TransformStamped] = Future()

        def attempt() -> bool:
            """Try to complete the future; True if it needs no further attempt."""
            if future.done() or future.cancelled():
                return True
            try:
                future.set_result(lookup())
            except TransformException:
                return False
            except Exception as error:
                future.set_exception(error)
            return True

        # Queued before the first attempt: a transform that arrives in between is not missed.
        with self._news:
            self._pending.append(attempt)
        if attempt():
            with self._news:
                if attempt in self._pending:
                    self._pending.remove(attempt)
        return future
