# SPDX-License-Identifier: Apache-2.0
"""Bag -> topics: a ROS 2 node that plays a bag without losing messages.

It publishes each serialized message unchanged at its log time, always reliable and with the recorded
durability, and it publishes /clock. A thread reads ahead, so that disk access does not affect the timing.
"""

from ftkd_ros.signals import exit_quietly_on_signals

if __name__ == "__main__":
    exit_quietly_on_signals()  # the imports below take seconds

import queue
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, Final

from rcl_interfaces.msg import ParameterDescriptor
from rclpy.duration import Duration
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, HistoryPolicy, QoSProfile, ReliabilityPolicy
from rosbags.interfaces import Connection
from rosgraph_msgs.msg import Clock

from ftkd_core.errors import UserError
from ftkd_core.percentiles import summarize
from ftkd_ros.bag.io import BagReader, is_latched, offered_qos
from ftkd_ros.bag.node_running import (
    message_class,
    number_parameter,
    queue_depth,
    run_node,
    text_parameter,
    texts_parameter,
)

_READ_AHEAD: Final = 128  # messages
_SETTLE_S: Final = 0.2  # both sides of a DDS match are notified at slightly different times
_ACKNOWLEDGE_S: Final = 5.0
_LOOP_PAUSE_S: Final = 0.5  # before /clock jumps back, and again before the first message
_TIMINGS_KEPT: Final = 100_000

Message = tuple[Connection, int, bytes]


class PlayerNode(Node):
    """Plays the bag of parameter `bag`.

    Raises UserError for bad parameters; their descriptions explain them.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__("player", **options)
        bag = text_parameter(self, "bag", "bag to play: the folder that contains metadata.yaml")
        self._rate = number_parameter(self, "rate", 1.0, "playback speed; 1 is real time", 1e-3)
        self._clock_hz = number_parameter(self, "clock_hz", 100.0, "rate of /clock in Hz; 0: no /clock", 0.0)
        self._start_delay_s = number_parameter(
            self, "start_delay_s", 0.0, "delay before the start in seconds", 0.0
        )
        self._wait_timeout_s = number_parameter(
            self, "wait_timeout_s", 60.0, "maximum wait for subscribers in seconds", 0.0
        )
        self._required_subscribers = _subscriber_counts(
            texts_parameter(
                self,
                "wait_for_subscribers",
                "topics that need a subscriber before the start; NAME=COUNT for several subscribers",
            )
        )
        descriptor = ParameterDescriptor(
            description="play again after the end, after a pause of one second; /clock jumps back"
        )
        self._loop = bool(self.declare_parameter("loop", False, descriptor).value)
        self._bag = BagReader(bag)
        self._outputs = self._make_publishers()
        self._clock = self.create_publisher(Clock, "/clock", 10) if self._clock_hz else None
        self._published = 0
        self._lateness_s: deque[float] = deque(maxlen=_TIMINGS_KEPT)

    def play(self, stop: threading.Event) -> str:
        """Play until the end or until `stop` is set; return a summary in one sentence.

        Raises UserError for a damaged bag and if the expected subscribers do not appear.
        """
        self._wait_for_subscribers(stop)
        stop.wait(self._start_delay_s)
        started = time.monotonic()
        while not stop.is_set():
            self._play_once(stop)
            if not self._loop:
                break
            # Rounds in progress finish before the clock jumps, and tf buffers are cleared after it.
            stop.wait(_LOOP_PAUSE_S)
            self._publish_clock(self._bag.start_ns)
            stop.wait(_LOOP_PAUSE_S)
        for publisher in self._outputs.values():
            publisher.wait_for_all_acked(Duration(seconds=0 if stop.is_set() else _ACKNOWLEDGE_S))
        elapsed = time.monotonic() - started
        return f"played {self._published} messages of {self._bag.path} in {elapsed:.1f} s{self._timing()}"

    def _make_publishers(self) -> dict[str, Any]:
        publishers = {}
        for connection in self._bag.connections:
            kind = message_class(connection.msgtype)
            if kind is None:
                self.get_logger().warning(
                    f"not playing {connection.topic}: its type {connection.msgtype} is not installed"
                )
                continue
            publishers[connection.topic] = self.create_publisher(kind, connection.topic, _profile(connection))
        unknown = [topic for topic in self._required_subscribers if topic not in publishers]
        if unknown:
            raise UserError(
                f"parameter wait_for_subscribers names {unknown[0]}, which the bag does not play; "
                f"it plays {', '.join(sorted(publishers)) or 'nothing'}"
            )
        return publishers

    def _wait_for_subscribers(self, stop: threading.Event) -> None:
        deadline = time.monotonic() + self._wait_timeout_s
        while missing := self._missing_subscribers():
            if time.monotonic() > deadline:
                raise UserError(
                    f"no subscriber after {self._wait_timeout_s:g} s on {', '.join(missing)}; "
                    "check that the node runs with this ROS_DOMAIN_ID"
                )
            if stop.wait(0.02):
                return
        if self._required_subscribers:
            stop.wait(_SETTLE_S)

    def _missing_subscribers(self) -> list[str]:
        return [
            topic
            for topic, count in self._required_subscribers.items()
            if self._outputs[topic].get_subscription_count() < count
        ]

    def _play_once(self, stop: threading.Event) -> None:
        self._publish_clock(self._bag.start_ns)
        with _ReadAhead(self._bag, [*self._outputs]) as messages:
            pace = _Pace(
                self._bag.start_ns, self._rate, 1 / self._clock_hz if self._clock_hz else float("inf")
            )
            for connection, log_time_ns, content in messages:
                if not self._wait_until(log_time_ns, pace, stop):
                    return
                self._outputs[connection.topic].publish(content)
                self._lateness_s.append(time.monotonic() - pace.due(log_time_ns))
                self._published += 1
        self._publish_clock(self._bag.end_ns)

    def _wait_until(self, log_time_ns: int, pace: "_Pace", stop: threading.Event) -> bool:
        """Sleep until a message is due and publish /clock meanwhile; return False if `stop` is set."""
        due = pace.due(log_time_ns)
        while True:
            now = time.monotonic()
            if now >= pace.next_tick:
                # On a slow machine, the clock must not overtake the messages.
                self._publish_clock(min(pace.bag_time(now), log_time_ns))
                pace.tick(now)
            wake = min(due, pace.next_tick)
            if now >= due:
                return not stop.is_set()
            if stop.wait(max(0.0, wake - now)):
                return False

    def _publish_clock(self, bag_time_ns: int) -> None:
        if self._clock is not None:
            message = Clock()
            message.clock.sec, message.clock.nanosec = divmod(bag_time_ns, 1_000_000_000)
            self._clock.publish(message)

    def _timing(self) -> str:
        late_ms = summarize([1e3 * seconds for seconds in self._lateness_s])
        if late_ms.p50 is None or late_ms.p99 is None:
            return ""
        return f"; published {late_ms.p50:.2f} ms after their time (median), {late_ms.p99:.2f} ms (99 %)"

    def destroy_node(self) -> None:
        """Close the bag and destroy the node."""
        self._bag.close()
        super().destroy_node()


class _Pace:
    """Maps bag time (ns) to the monotonic clock (s), and schedules /clock."""

    def __init__(self, start_ns: int, rate: float, tick_s: float) -> None:
        self._start_ns = start_ns
        self._rate = rate
        self._tick_s = tick_s
        self._started = time.monotonic()
        self.next_tick = self._started + tick_s

    def due(self, log_time_ns: int) -> float:
        """Return the monotonic time at which a message is due."""
        return self._started + (log_time_ns - self._start_ns) / 1e9 / self._rate

    def bag_time(self, now: float) -> int:
        """Return the bag time at a monotonic time."""
        return self._start_ns + int((now - self._started) * self._rate * 1e9)

    def tick(self, now: float) -> None:
        """Schedule the next tick; missed ticks are skipped."""
        self.next_tick = max(self.next_tick + self._tick_s, now)


class _ReadAhead:
    """Iterates over messages that a thread reads ahead.

    Raises errors of the thread in the order of the messages.
    """

    def __init__(self, bag: BagReader, topics: Sequence[str]) -> None:
        self._queue: queue.Queue[Message | Exception | None] = queue.Queue(_READ_AHEAD)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._read, args=(bag, topics), name="read ahead", daemon=True)

    def __enter__(self) -> Iterator[Message]:
        self._thread.start()
        while (
            self._queue.empty()
        ):  # opening a chunk takes longer than the interval between the first messages
            self._stopped.wait(0.001)
        return self._messages()

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        while self._thread.is_alive():  # it may block on a full queue
            try:
                self._queue.get(timeout=0.01)
            except queue.Empty:
                continue

    def _messages(self) -> Iterator[Message]:
        while (item := self._queue.get()) is not None:
            if isinstance(item, Exception):
                raise item
            yield item

    def _read(self, bag: BagReader, topics: Sequence[str]) -> None:
        try:
            for message in bag.raw(topics):
                if self._stopped.is_set():
                    return
                self._queue.put(message)
            self._queue.put(None)
        except Exception as error:  # passed to the consumer, which would otherwise wait forever
            self._queue.put(error)


def _subscriber_counts(texts: Sequence[str]) -> dict[str, int]:
    """Parse the required number of subscribers by topic from "NAME" or "NAME=COUNT"."""
    counts = {}
    for text in texts:
        topic, equals, count = text.partition("=")
        if equals and not (count.isdigit() and int(count) > 0):
            raise UserError(f"parameter wait_for_subscribers has {text!r}; expected NAME or NAME=COUNT")
        counts[topic] = int(count) if equals else 1
    return counts


def _profile(connection: Connection) -> QoSProfile:
    latched = is_latched(connection)
    depth = max((profile.depth for profile in offered_qos(connection)), default=0)
    return QoSProfile(
        history=HistoryPolicy.KEEP_LAST,
        depth=max(depth, 1) if latched else max(depth, queue_depth(connection.msgtype)),
        reliability=ReliabilityPolicy.RELIABLE,
        durability=DurabilityPolicy.TRANSIENT_LOCAL if latched else DurabilityPolicy.VOLATILE,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `ros2 run ftkd_ros player --ros-args -p bag:=FOLDER`; exit code 2 for bad input."""
    return run_node(PlayerNode, PlayerNode.play, arguments)


if __name__ == "__main__":
    sys.exit(main())
