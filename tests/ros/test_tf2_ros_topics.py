# SPDX-License-Identifier: Apache-2.0
"""`tf2_ros` with threads and topics: waiting for transforms, broadcasters and listeners.

As in test_tf2_ros.py only the original API is used. Times are int nanoseconds.
"""

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import rclpy
import yaml
from geometry_msgs.msg import TransformStamped
from rclpy.duration import Duration
from rclpy.node import Node
from rclpy.parameter import Parameter
from rclpy.time import Time
from rosgraph_msgs.msg import Clock as ClockMessage
from tf2_msgs.srv import FrameGraph
from tf2_ros import (
    Buffer,
    ExtrapolationException,
    StaticTransformBroadcaster,
    TransformBroadcaster,
    TransformListener,
)

from tests.ros.ros_node import DOMAIN_ID, SpinnableNode, spinnable_node

SECOND = 10**9
LATEST = Time()


def stamped(parent: str, child: str, nanoseconds: int = 0, x: float = 0.0) -> TransformStamped:
    message = TransformStamped()
    message.header.frame_id, message.child_frame_id = parent, child
    message.header.stamp = Time(nanoseconds=nanoseconds).to_msg()
    message.transform.translation.x = x
    return message


def driving() -> Buffer:
    """`base_link` moves along x of `map` at 1 m/s, with one sample per second from 1 s to 5 s."""
    buffer = Buffer()
    for second in range(1, 6):
        buffer.set_transform(stamped("map", "base_link", second * SECOND, float(second)), "test")
    return buffer


# Waiting


def later(seconds: float, action: Callable[[], Any]) -> threading.Timer:
    timer = threading.Timer(seconds, action)
    timer.start()
    return timer


@pytest.mark.parametrize("full", [False, True])
def test_a_lookup_waits_for_a_transform_from_another_thread(full: bool) -> None:
    buffer = driving()
    at = Time(nanoseconds=6 * SECOND)
    awaited = stamped("map", "base_link", 6 * SECOND, 6.0)
    timer = later(0.1, lambda: buffer.set_transform(awaited, "test"))
    started = time.monotonic()
    timeout = Duration(seconds=10)
    if full:
        found = buffer.lookup_transform_full("map", at, "base_link", at, "map", timeout)
    else:
        found = buffer.lookup_transform("map", "base_link", at, timeout=timeout)
    waited = time.monotonic() - started
    timer.join()
    assert found.transform.translation.x == 6.0
    assert 0.05 < waited < 5.0


def test_a_timeout_raises_the_reason_of_the_missing_transform() -> None:
    buffer = driving()
    started = time.monotonic()
    with pytest.raises(ExtrapolationException):
        buffer.lookup_transform("map", "base_link", Time(nanoseconds=9 * SECOND), Duration(seconds=0.1))
    assert not buffer.can_transform("map", "nowhere", LATEST, Duration(seconds=0.1))
    assert 0.15 < time.monotonic() - started < 5.0


def test_a_future_completes_when_its_transform_arrives() -> None:
    buffer = driving()
    ready = buffer.wait_for_transform_async("map", "base_link", Time(nanoseconds=2 * SECOND))
    assert ready.done()
    at = Time(nanoseconds=6 * SECOND)
    waiting = buffer.wait_for_transform_async("map", "base_link", at)
    waiting_full = buffer.wait_for_transform_full_async("map", at, "base_link", at, "map")
    buffer.set_transform(stamped("map", "base_link", 5 * SECOND + 1), "test")
    assert not waiting.done()
    assert not waiting_full.done()
    buffer.set_transform(stamped("map", "base_link", 6 * SECOND, 6.0), "test")
    assert waiting.done()
    assert waiting_full.done()
    found: Any = waiting_full.result()
    assert found.transform == buffer.lookup_transform("map", "base_link", at).transform


@pytest.mark.parametrize("full", [False, True])
def test_a_coroutine_returns_the_awaited_transform(full: bool) -> None:
    buffer = driving()
    at = Time(nanoseconds=6 * SECOND)
    if full:
        coroutine = buffer.lookup_transform_full_async("map", at, "base_link", at, "map")
    else:
        coroutine = buffer.lookup_transform_async("map", "base_link", at)
    coroutine.send(None)
    buffer.set_transform(stamped("map", "base_link", 6 * SECOND, 6.0), "test")
    with pytest.raises(StopIteration) as finished:
        coroutine.send(None)
    assert finished.value.value.transform.translation.x == 6.0


def test_concurrent_writers_and_readers_do_not_interfere() -> None:
    buffer = Buffer()  # stores all 3 s, so a transform that exists once exists until the end
    failures: list[BaseException] = []

    def write(child: str) -> None:
        for step in range(1, 300):
            buffer.set_transform(stamped("map", child, step * SECOND // 100, float(step)), child)

    def read() -> None:
        try:
            for _ in range(100):
                if buffer.can_transform("left", "right", LATEST):
                    found = buffer.lookup_transform("left", "right", LATEST)
                    assert found.transform.translation.x == pytest.approx(0.0)
                yaml.safe_load(buffer.all_frames_as_yaml())
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=(child,)) for child in ("left", "right")]
    threads += [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert buffer.lookup_transform("map", "left", LATEST).transform.translation.x == 299.0


# Over ROS


@pytest.fixture
def ros(monkeypatch: pytest.MonkeyPatch) -> Iterator[SpinnableNode]:
    monkeypatch.setenv("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
    with spinnable_node("test_tf2_ros") as node:
        yield node


@pytest.mark.ros
def test_broadcast_transforms_reach_the_buffer(ros: SpinnableNode) -> None:
    buffer = Buffer()
    listener = TransformListener(buffer, ros.node)
    broadcaster = TransformBroadcaster(ros.node)
    static_broadcaster = StaticTransformBroadcaster(ros.node)
    assert ros.spin_until(lambda: broadcaster.pub_tf.get_subscription_count() == 1)
    first = stamped("map", "base_link", SECOND, 1.0)
    broadcaster.sendTransform(first)
    broadcaster.sendTransform([stamped("map", "base_link", 2 * SECOND, 3.0)])
    static_broadcaster.sendTransform((stamped("base_link", "cam_front", 0, 2.0),))
    at = Time(nanoseconds=SECOND * 3 // 2)
    assert ros.spin_until(lambda: buffer.can_transform("map", "cam_front", at))
    assert buffer.lookup_transform("map", "cam_front", at).transform.translation.x == pytest.approx(4.0)
    assert buffer.lookup_transform("map", "base_link", Time(nanoseconds=SECOND)) == first
    listener.unregister()
    assert ros.spin_until(lambda: broadcaster.pub_tf.get_subscription_count() == 0)


@pytest.mark.ros
def test_a_late_listener_receives_all_static_transforms(ros: SpinnableNode) -> None:
    broadcaster = StaticTransformBroadcaster(ros.node)
    broadcaster.sendTransform(stamped("base_link", "cam_front"))
    broadcaster.sendTransform([stamped("base_link", "cam_back"), stamped("base_link", "lidar_top")])
    buffer = Buffer()
    listener = TransformListener(buffer, ros.node)
    assert ros.spin_until(lambda: buffer.can_transform("cam_front", "cam_back", LATEST))
    assert buffer.can_transform("cam_front", "lidar_top", LATEST)
    assert listener.buffer is buffer


@pytest.mark.ros
def test_a_listener_can_spin_in_its_own_thread_while_the_caller_waits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Uses the default context, because the original listener creates its executor there."""
    monkeypatch.setenv("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
    rclpy.init(domain_id=DOMAIN_ID)
    sender, receiver = Node("sender"), Node("receiver")
    buffer = Buffer()
    listener = TransformListener(buffer, receiver, spin_thread=True)
    StaticTransformBroadcaster(sender).sendTransform(stamped("base_link", "cam_front", 0, 2.0))
    found = buffer.lookup_transform("base_link", "cam_front", LATEST, Duration(seconds=10))
    assert found.transform.translation.x == 2.0
    listener.executor.shutdown()
    listener.dedicated_listener_thread.join()
    sender.destroy_node()
    receiver.destroy_node()
    rclpy.shutdown()


@pytest.mark.ros
def test_the_buffer_serves_tf2_frames(ros: SpinnableNode) -> None:
    buffer = Buffer(node=ros.node)
    buffer.set_transform_static(stamped("base_link", "cam_front"), "calibration")
    client: Any = ros.node.create_client(FrameGraph, "tf2_frames")
    assert ros.spin_until(client.service_is_ready)
    future = client.call_async(FrameGraph.Request())
    assert ros.spin_until(future.done)
    frames = yaml.safe_load(future.result().frame_yaml)
    assert frames["cam_front"]["broadcaster"] == "calibration"


@pytest.mark.ros
def test_a_clock_jump_backwards_clears_moving_transforms(ros: SpinnableNode) -> None:
    """In a looped bag, transforms from the end must not mix with those from the beginning."""
    ros.node.set_parameters([Parameter("use_sim_time", value=True)])
    buffer = Buffer(node=ros.node)
    publisher = ros.node.create_publisher(ClockMessage, "/clock", 10)
    assert ros.spin_until(lambda: publisher.get_subscription_count() == 1)

    def clock_reaches(seconds: int) -> bool:
        publisher.publish(ClockMessage(clock=Time(seconds=seconds).to_msg()))
        return bool(ros.spin_until(lambda: ros.node.get_clock().now().nanoseconds == seconds * SECOND))

    assert clock_reaches(100)
    buffer.set_transform(stamped("map", "base_link", 100 * SECOND), "test")
    buffer.set_transform_static(stamped("base_link", "cam_front"), "test")
    assert clock_reaches(101)
    assert buffer.can_transform("map", "base_link", LATEST)
    assert clock_reaches(50)
    assert not buffer.can_transform("map", "base_link", LATEST)
    assert buffer.can_transform("base_link", "cam_front", LATEST)
