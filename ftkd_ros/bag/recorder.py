# SPDX-License-Identifier: Apache-2.0
"""Topics -> bag: a ROS 2 node that records serialized messages to MCAP until it is stopped.

It subscribes to a topic when a publisher appears, with the QoS that the publisher offers. Every second it
writes the received messages to disk as a complete chunk, so that a killed recorder loses at most the last
second.
"""

from ftkd_ros.signals import exit_quietly_on_signals

if __name__ == "__main__":
    exit_quietly_on_signals()  # the imports below take seconds

import shutil
import sys
import threading
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, HistoryPolicy, QoSProfile, ReliabilityPolicy

from ftkd_core.errors import UserError
from ftkd_ros.bag.io import BagWriter
from ftkd_ros.bag.node_running import (
    message_class,
    number_parameter,
    queue_depth,
    run_node,
    text_parameter,
    texts_parameter,
)

_POLL_S: Final = 0.05
_FLUSH_S: Final = 1.0
# After the signal to stop, messages in transit are recorded until none has arrived for _QUIET_S.
_QUIET_S: Final = 0.2
_MAX_DRAIN_S: Final = 2.0
_RECOVERY: Final = (
    "earlier messages are in the .mcap file: run `mcap recover` on it, then `ros2 bag reindex` on the folder"
)


class RecorderNode(Node):
    """Records the topics of parameter `topics` into the new bag `output`.

    Raises UserError for bad parameters.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__("recorder", **options)
        output = text_parameter(self, "output", "new folder of the bag")
        topics = texts_parameter(self, "topics", "topics to record")
        if not topics:
            raise UserError(
                "parameter topics is empty; list the topics to record, such as topics:=[/detections]"
            )
        self._topics = [self.resolve_topic_name(topic) for topic in topics]
        min_free_mb = number_parameter(
            self, "min_free_mb", 64.0, "stop if the disk has less free space, in MB", 0.0
        )
        self._min_free_bytes = int(min_free_mb * 1e6)
        self._output = Path(output)
        self._check_disk_space()
        self._lock = threading.Lock()  # the executor's thread stores; the main thread adds topics and flushes
        self._bag = BagWriter(self._output, atomic=False)
        self._open = True
        self._broken: UserError | None = None
        self._subscribed: dict[str, tuple[Any, QoSProfile]] = {}
        self._refused: set[str] = set()
        self._last_arrival = time.monotonic()
        self._use_sim_time = bool(self.get_parameter("use_sim_time").value)
        self._early: list[tuple[str, bytes]] = []

    def record(self, stop: threading.Event) -> str:
        """Record until `stop` is set; return a summary in one sentence.

        Raises UserError if the disk is full.
        """
        self.get_logger().info(f"recording to {self._bag.output}")
        next_flush = time.monotonic() + _FLUSH_S
        full: UserError | None = None
        while full is None and self._broken is None and not stop.wait(_POLL_S):
            self._find_publishers()
            if time.monotonic() >= next_flush:
                full = self._flush()
                next_flush = time.monotonic() + _FLUSH_S
        self._drain()
        result = self._finish()
        if full is not None:
            raise UserError(f"{full}; {result}")
        return result

    @property
    def has_all_topics(self) -> bool:
        """Whether there is a message of every topic."""
        with self._lock:
            return all(self._bag.counts[topic] for topic in self._topics)

    def _find_publishers(self) -> None:
        for topic in self._topics:
            offers = self.get_publishers_info_by_topic(topic)
            if not offers or topic in self._refused:
                continue
            profile = _common_profile(offers)
            subscribed = self._subscribed.get(topic)
            if subscribed is None:
                self._subscribe(topic, offers[0].topic_type, profile)
            elif not _is_compatible(subscribed[1], profile):
                self.get_logger().warning(
                    f"a new publisher of {topic} offers a weaker QoS; subscribing again"
                )
                self.destroy_subscription(subscribed[0])
                self._subscribe(topic, offers[0].topic_type, profile)

    def _subscribe(self, topic: str, msgtype: str, profile: QoSProfile) -> None:
        kind = message_class(msgtype)
        try:
            if kind is None:
                raise UserError(f"its type {msgtype} is not installed")
            self._add_topic(topic, msgtype, profile)
        except UserError as error:
            self._refused.add(topic)
            self.get_logger().error(f"not recording {topic}: {error}")
            return
        subscription = self.create_subscription(kind, topic, partial(self._store, topic), profile, raw=True)
        self._subscribed[topic] = (subscription, profile)
        self.get_logger().info(f"recording {topic}")

    def _add_topic(self, topic: str, msgtype: str, profile: QoSProfile) -> None:
        if topic in self._subscribed:
            return
        with self._lock:
            self._bag.add_topic(
                topic,
                msgtype,
                depth=10,
                latched=profile.durability is DurabilityPolicy.TRANSIENT_LOCAL,
                reliable=profile.reliability is ReliabilityPolicy.RELIABLE,
            )

    def _store(self, topic: str, content: bytes) -> None:
        """Store a message, on the executor's thread.

        Stores errors too, because raising would end the thread.
        """
        self._last_arrival = time.monotonic()
        with self._lock:
            if not self._open or self._broken is not None:
                return
            try:
                self._write(topic, content)
            except UserError as error:
                self._broken = error

    def _write(self, topic: str, content: bytes) -> None:
        """Write a message with the time of the node's clock: of /clock if use_sim_time is true.

        Messages that arrive before the first /clock are kept and written with its time.
        """
        now_ns = self._clock_ns()
        if now_ns <= 0:
            self._early.append((topic, content))
            return
        self._write_early(now_ns)
        self._bag.write_raw(topic, now_ns, content)

    def _clock_ns(self) -> int:
        return int(self.get_clock().now().nanoseconds) if self._use_sim_time else time.time_ns()

    def _write_early(self, now_ns: int) -> None:
        early, self._early = self._early, []
        for topic, content in early:
            self._bag.write_raw(topic, now_ns, content)

    def _flush(self) -> UserError | None:
        """Flush the bag; return the error if there is too little disk space."""
        with self._lock:
            if self._broken is not None:
                return None
            try:
                self._bag.flush()
            except UserError as error:
                self._broken = error
                return None
        try:
            self._check_disk_space()
        except UserError as error:
            return error
        return None

    def _check_disk_space(self) -> None:
        existing = next(path for path in (self._output, *self._output.absolute().parents) if path.exists())
        free = shutil.disk_usage(existing).free
        if free < self._min_free_bytes:
            raise UserError(
                f"the disk of {str(self._output)!r} has {free / 1e6:.0f} MB left, less than min_free_mb "
                f"{self._min_free_bytes / 1e6:g}; free disk space"
            )

    def _drain(self) -> None:
        """Wait until no message has arrived for _QUIET_S."""
        deadline = time.monotonic() + _MAX_DRAIN_S
        while time.monotonic() < min(deadline, self._last_arrival + _QUIET_S):
            time.sleep(_POLL_S)

    def _finish(self) -> str:
        with self._lock:
            self._open = False
            if self._broken is not None:
                self._bag.abandon()
                raise UserError(f"{self._broken}; {_RECOVERY}")
            self._write_early(max(self._clock_ns(), 1))
            self._bag.close()
        for topic in self._topics:
            if not self._bag.counts[topic]:
                self.get_logger().warning(f"nothing was recorded on {topic}")
        return f"recorded {self._bag.counts.total()} messages to {self._bag.output}"

    def destroy_node(self) -> None:
        """Stop writing the bag and destroy the node."""
        with self._lock:
            if self._open:
                self._open = False
                self._bag.abandon()
        super().destroy_node()


def _common_profile(offers: Sequence[Any]) -> QoSProfile:
    """Return the strongest QoS that all publishers offer; with a stronger one, a subscription gets no
    messages.
    """
    reliable = all(offer.qos_profile.reliability is not ReliabilityPolicy.BEST_EFFORT for offer in offers)
    latched = all(offer.qos_profile.durability is DurabilityPolicy.TRANSIENT_LOCAL for offer in offers)
    return QoSProfile(
        history=HistoryPolicy.KEEP_LAST,
        depth=queue_depth(offers[0].topic_type),
        reliability=ReliabilityPolicy.RELIABLE if reliable else ReliabilityPolicy.BEST_EFFORT,
        durability=DurabilityPolicy.TRANSIENT_LOCAL if latched else DurabilityPolicy.VOLATILE,
    )


def _is_compatible(requested: QoSProfile, offered: QoSProfile) -> bool:
    """Return True if publishers with QoS `offered` reach a subscription with QoS `requested`."""
    wants_reliable = requested.reliability is ReliabilityPolicy.RELIABLE
    wants_latched = requested.durability is DurabilityPolicy.TRANSIENT_LOCAL
    return not (
        (wants_reliable and offered.reliability is ReliabilityPolicy.BEST_EFFORT)
        or (wants_latched and offered.durability is DurabilityPolicy.VOLATILE)
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `ros2 run ftkd_ros recorder --ros-args -p output:=FOLDER -p topics:=[...]`; exit code 2 for bad
    input.
    """
    return run_node(RecorderNode, RecorderNode.record, arguments)


if __name__ == "__main__":
    sys.exit(main())
