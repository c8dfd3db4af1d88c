# SPDX-License-Identifier: Apache-2.0
"""Detections of a live detector node that receives the messages of a bag over DDS."""

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import rclpy
from rclpy.context import Context
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.node import Node
from rclpy.parameter import Parameter
from rclpy.qos import DurabilityPolicy, QoSProfile
from sensor_msgs.msg import PointCloud2
from vision_msgs.msg import Detection3DArray

from ftkd_core.types import ObjectList
from ftkd_ros.bag.detect import DETECTIONS_TOPIC, VELOCITIES_TOPIC
from ftkd_ros.bag.io import BagReader
from ftkd_ros.bag.node_running import message_class
from ftkd_ros.bag.replay_rounds import Drive
from ftkd_ros.convert.from_ros import detections_to_objects, stamp_to_ns
from ftkd_ros.node.detector_node import DetectorNode
from ftkd_ros.node.parameters import DetectorParameters

_NOT_PUBLISHED = ("/ground_truth/detections", "/ground_truth/velocities", "/sample_token")


def wait_until(condition: Callable[[], Any], timeout_s: float = 60.0) -> None:
    """Wait until the condition is true; fail after the timeout."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "timeout while waiting for the node"
        time.sleep(0.01)


def detections_of_live_node(
    bag: Path, make_detector: Callable[[], Any], **parameters: Any
) -> dict[int, ObjectList]:
    """Return by stamp the detections of an active node with this detector for the messages of a bag."""
    context = Context()
    rclpy.init(context=context)
    with BagReader(bag) as reader:
        typed = {
            name: tuple(value) if isinstance(value, list) else value for name, value in parameters.items()
        }
        drive = Drive(reader, DetectorParameters(**typed))
        offsets_s = [offset * 1e-9 for offset in drive.offsets_ns if offset is not None]
        connections = [c for c in reader.connections if c.topic not in _NOT_PUBLISHED]
        types = {connection.topic: message_class(connection.msgtype) for connection in connections}
        messages = [(c.topic, bytes(content)) for c, _, content in reader.raw([*types])]
    node = _active_node(context, {"camera_time_offsets_s": offsets_s, **parameters}, make_detector)
    player = _Player(context, types, drive.image_topics)
    executor = SingleThreadedExecutor(context=context)
    executor.add_node(node)
    executor.add_node(player.node)

    def spin() -> None:
        with suppress(ExternalShutdownException):  # raised when the context shuts down
            executor.spin()

    thread = threading.Thread(target=spin, daemon=True)
    thread.start()
    try:
        player.play(messages)
    finally:
        node.close()
        rclpy.shutdown(context=context)
        thread.join(5)
    return player.objects()


def _active_node(context: Context, given: dict[str, Any], make_detector: Callable[[], Any]) -> DetectorNode:
    """Return an active node with long timeouts, so that a slow machine loses nothing."""
    parameters = {
        "qos_reliability": "reliable",
        "sync_deadline_s": 5.0,
        "tf_timeout_s": 5.0,
        "score_threshold": 0.0,
        **given,
    }
    node = DetectorNode(
        lambda _: make_detector(),
        context=context,
        parameter_overrides=[Parameter(name, value=value) for name, value in parameters.items()],
    )
    node.trigger_configure()
    node.trigger_activate()
    return node


class _Player:
    """Publishes serialized messages and collects detections and velocities."""

    def __init__(self, context: Context, types: dict[str, Any], image_topics: Sequence[str]) -> None:
        self._image_topics = image_topics
        self.node: Node = rclpy.create_node("live_node_player", context=context)
        latched = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
        self._publishers = {
            topic: self.node.create_publisher(kind, topic, latched if topic == "/tf_static" else 100)
            for topic, kind in types.items()
        }
        self._detections: list[Any] = []
        self._velocities: list[Any] = []
        self.node.create_subscription(Detection3DArray, DETECTIONS_TOPIC, self._detections.append, 10)
        self.node.create_subscription(PointCloud2, VELOCITIES_TOPIC, self._velocities.append, 10)

    def play(self, messages: list[tuple[str, bytes]]) -> None:
        """Publish one round at a time and wait for its detections, because the node keeps only the newest
        round.
        """
        subscribed = [
            publisher
            for topic, publisher in self._publishers.items()
            if topic in self._image_topics or topic.startswith("/tf") or topic.endswith("camera_info")
        ]
        wait_until(lambda: all(publisher.get_subscription_count() for publisher in subscribed))
        wait_until(lambda: self.node.count_publishers(VELOCITIES_TOPIC) > 0)
        images = 0
        for topic, content in messages:
            self._publishers[topic].publish(content)
            if topic in self._image_topics:
                images += 1
                if images % len(self._image_topics) == 0:
                    rounds = images // len(self._image_topics)
                    wait_until(lambda count=rounds: self._received() == (count, count))

    def objects(self) -> dict[int, ObjectList]:
        """Return the received objects by stamp."""
        clouds = {stamp_to_ns(cloud.header.stamp): cloud for cloud in self._velocities}
        stamps = [stamp_to_ns(message.header.stamp) for message in self._detections]
        return {
            stamp: detections_to_objects(message, clouds[stamp])
            for stamp, message in zip(stamps, self._detections, strict=True)
        }

    def _received(self) -> tuple[int, int]:
        return len(self._velocities), len(self._detections)
