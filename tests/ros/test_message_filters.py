# SPDX-License-Identifier: Apache-2.0
"""`message_filters`: only the original API is used, so the tests also pass with the original package."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from message_filters import ApproximateTimeSynchronizer, Cache, SimpleFilter, Subscriber, TimeSynchronizer
from rclpy.callback_groups import ReentrantCallbackGroup
from rclpy.clock_type import ClockType
from rclpy.qos import qos_profile_sensor_data
from rclpy.serialization import deserialize_message
from rclpy.time import Time
from sensor_msgs.msg import Image
from std_msgs.msg import Header, String

from tests.ros.ros_node import SpinnableNode, spinnable_node

MILLISECOND = 1_000_000
Sets = list[tuple[Any, ...]]


@dataclass(eq=False)
class Stamped:
    """A message with a header, compared by identity."""

    stamp: int  # nanoseconds
    source: int = 0
    header: Header = field(init=False)

    def __post_init__(self) -> None:
        self.header = Header(stamp=Time(nanoseconds=self.stamp).to_msg())


def ros_time(nanoseconds: int) -> Time:
    return Time(nanoseconds=nanoseconds, clock_type=ClockType.ROS_TIME)


def collect(source: SimpleFilter) -> Sets:
    """Return a list that collects all later outputs of `source`."""
    received: Sets = []
    source.registerCallback(lambda *messages: received.append(messages))
    return received


def approximate(inputs: int, queue_size: int, slop: float) -> tuple[list[SimpleFilter], Sets]:
    sources = [SimpleFilter() for _ in range(inputs)]
    return sources, collect(ApproximateTimeSynchronizer(sources, queue_size, slop))


def exact(inputs: int, queue_size: int) -> tuple[list[SimpleFilter], Sets]:
    sources = [SimpleFilter() for _ in range(inputs)]
    return sources, collect(TimeSynchronizer(sources, queue_size))


# SimpleFilter


def test_callbacks_are_called_in_order_of_registration_with_their_arguments() -> None:
    source, calls = SimpleFilter(), []
    assert source.registerCallback(lambda *args: calls.append(("first", *args)), 7, "x") == 0
    assert source.registerCallback(lambda *args: calls.append(("second", *args))) == 1
    source.signalMessage("a", "b")
    assert calls == [("first", "a", "b", 7, "x"), ("second", "a", "b")]


# Cache


def test_cache_looks_up_messages_by_time_with_both_ends_included() -> None:
    source = SimpleFilter()
    cache = Cache(source, 3)
    forwarded = collect(cache)
    messages = [Stamped(second * 10**9) for second in range(1, 6)]
    for message in messages:
        source.signalMessage(message)
    assert [only for (only,) in forwarded] == messages
    assert cache.getInterval(ros_time(0), ros_time(10 * 10**9)) == messages[2:]
    assert cache.getInterval(ros_time(3 * 10**9), ros_time(4 * 10**9)) == messages[2:4]
    assert cache.getElemAfterTime(ros_time(3 * 10**9 + 1)) is messages[3]
    assert cache.getElemAfterTime(ros_time(4 * 10**9)) is messages[3]
    assert cache.getElemAfterTime(ros_time(6 * 10**9)) is None
    assert cache.getElemBeforeTime(ros_time(5 * 10**9 - 1)) is messages[3]
    assert cache.getElemBeforeTime(ros_time(4 * 10**9)) is messages[3]
    assert cache.getElemBeforeTime(ros_time(2 * 10**9)) is None
    assert cache.getOldestTime() == ros_time(3 * 10**9)
    assert cache.getLastestTime() == ros_time(5 * 10**9)
    assert cache.getLast() is messages[4]
    with pytest.raises(AssertionError):
        cache.getInterval(ros_time(2), ros_time(1))


def test_empty_cache_returns_none_and_default_cache_stores_one_message() -> None:
    source = SimpleFilter()
    cache = Cache(source)
    assert cache.getLast() is None
    assert cache.getLastestTime() is None
    assert cache.getOldestTime() is None
    assert cache.getElemAfterTime(ros_time(0)) is None
    assert cache.getInterval(ros_time(0), ros_time(1)) == []
    first, second = Stamped(1), Stamped(2)
    source.signalMessage(first)
    source.signalMessage(second)
    assert cache.getInterval(ros_time(0), ros_time(9)) == [second]


@pytest.mark.parametrize("allowed", [False, True])
def test_cache_stores_a_message_without_header_only_if_allowed(allowed: bool) -> None:
    source = SimpleFilter()
    cache = Cache(source, 4, allow_headerless=allowed)
    forwarded = collect(cache)
    message = String(data="no header")
    source.signalMessage(message)
    assert cache.getLast() is (message if allowed else None)
    assert forwarded == ([(message,)] if allowed else [])


# TimeSynchronizer


@st.composite
def rounds_with_drops(draw: st.DrawFn) -> tuple[int, list[list[int]]]:
    """Number of inputs and, per round, the inputs whose message arrives, in order of arrival."""
    inputs = draw(st.integers(1, 5))
    orders = draw(st.lists(st.permutations(range(inputs)), min_size=1, max_size=12))
    return inputs, [list(order)[: draw(st.integers(0, inputs))] for order in orders]


@given(rounds_with_drops())
@settings(deadline=None)
def test_exact_synchronizer_forwards_each_complete_set_once(rounds: tuple[int, list[list[int]]]) -> None:
    inputs, arrivals = rounds
    sources, received = exact(inputs, queue_size=3)
    complete = []
    for number, order in enumerate(arrivals, start=1):
        messages = {source: Stamped(number * 100 * MILLISECOND, source) for source in order}
        for source, message in messages.items():
            sources[source].signalMessage(message)
        if len(messages) == inputs:
            complete.append(tuple(messages[source] for source in range(inputs)))
    assert received == complete


def test_exact_synchronizer_requires_equal_nanoseconds() -> None:
    sources, received = exact(2, queue_size=10)
    sources[0].signalMessage(Stamped(1_000_000_000))
    sources[1].signalMessage(Stamped(1_000_000_001))
    assert received == []
    late = Stamped(1_000_000_000)
    sources[1].signalMessage(late)
    assert [messages[1] for messages in received] == [late]


def test_full_queue_drops_the_smallest_stamp() -> None:
    sources, received = exact(2, queue_size=2)
    for stamp in (10, 30, 20):  # 10 is dropped when the third arrives
        sources[0].signalMessage(Stamped(stamp))
    for stamp in (10, 20, 30):
        sources[1].signalMessage(Stamped(stamp))
    assert [messages[0].stamp for messages in received] == [20, 30]


# ApproximateTimeSynchronizer


@given(rounds_with_drops(), st.data())
@settings(deadline=None)
def test_approximate_synchronizer_forwards_each_complete_round_once_without_mixing(
    rounds: tuple[int, list[list[int]]], data: st.DataObject
) -> None:
    """Rounds are 100 ms apart and span less than the slop of 40 ms: a drop affects only its own round."""
    inputs, arrivals = rounds
    sources, received = approximate(inputs, queue_size=3, slop=0.04)
    offsets = st.integers(0, 40 * MILLISECOND - 1)
    complete = []
    for number, order in enumerate(arrivals, start=1):
        messages = {
            source: Stamped(number * 100 * MILLISECOND + data.draw(offsets), source) for source in order
        }
        for source, message in messages.items():
            sources[source].signalMessage(message)
        if len(messages) == inputs:
            complete.append(tuple(messages[source] for source in range(inputs)))
    assert received == complete


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 60)), max_size=60), st.integers(1, 4))
@settings(deadline=None)
def test_every_set_is_in_input_order_within_the_slop_and_uses_each_message_once(
    stream: list[tuple[int, int]], queue_size: int
) -> None:
    sources, received = approximate(4, queue_size, slop=0.01)
    for source, milliseconds in stream:
        sources[source].signalMessage(Stamped(milliseconds * MILLISECOND, source))
    for messages in received:
        assert [message.source for message in messages] == [0, 1, 2, 3]
        stamps = [message.stamp for message in messages]
        assert max(stamps) - min(stamps) < 10 * MILLISECOND
    used = [message for messages in received for message in messages]
    assert len(used) == len(set(used))


@given(st.permutations(range(6)), st.permutations(range(6)))
def test_order_of_arrival_within_the_queue_has_no_effect(first: list[int], second: list[int]) -> None:
    sources, received = approximate(2, queue_size=6, slop=0.1)
    messages = [[Stamped(second * 10**9, source) for second in range(6)] for source in range(2)]
    for number in first:
        sources[0].signalMessage(messages[0][number])
    assert received == []
    for number in second:
        sources[1].signalMessage(messages[1][number])
    assert set(received) == set(zip(*messages, strict=True))


@pytest.mark.parametrize(("apart", "matches"), [(100 * MILLISECOND - 1, True), (100 * MILLISECOND, False)])
def test_messages_exactly_the_slop_apart_do_not_match(apart: int, matches: bool) -> None:
    sources, received = approximate(2, queue_size=5, slop=0.1)
    sources[0].signalMessage(Stamped(10**9))
    sources[1].signalMessage(Stamped(10**9 + apart))
    assert bool(received) is matches


def test_the_nearest_message_is_matched_and_the_others_stay_queued() -> None:
    sources, received = approximate(2, queue_size=5, slop=0.1)
    far, near = Stamped(1_000 * MILLISECOND), Stamped(1_030 * MILLISECOND)
    sources[0].signalMessage(far)
    sources[0].signalMessage(near)
    sources[1].signalMessage(Stamped(1_040 * MILLISECOND))
    sources[1].signalMessage(Stamped(1_045 * MILLISECOND))
    assert [messages[0] for messages in received] == [near, far]


def test_a_set_is_found_if_the_nearest_messages_do_not_match_each_other() -> None:
    sources, received = approximate(3, queue_size=5, slop=0.1)
    before, after = Stamped(950 * MILLISECOND), Stamped(1_060 * MILLISECOND)
    sources[0].signalMessage(before)
    sources[0].signalMessage(after)
    sources[1].signalMessage(Stamped(1_055 * MILLISECOND))
    sources[2].signalMessage(Stamped(1_000 * MILLISECOND))
    assert [messages[0] for messages in received] == [after]


def test_a_message_older_than_a_full_queue_is_not_matched() -> None:
    sources, received = approximate(2, queue_size=2, slop=0.1)
    sources[1].signalMessage(Stamped(10**9))
    for seconds in (3, 4):
        sources[0].signalMessage(Stamped(seconds * 10**9))
    sources[0].signalMessage(Stamped(10**9))
    assert received == []


@pytest.mark.parametrize("allowed", [False, True])
def test_messages_without_header_are_matched_by_arrival_only_if_allowed(allowed: bool) -> None:
    sources = [SimpleFilter(), SimpleFilter()]
    received = collect(ApproximateTimeSynchronizer(sources, 5, 60.0, allow_headerless=allowed))
    sources[0].signalMessage(String(data="a"))
    sources[1].signalMessage(String(data="b"))
    assert received == ([(String(data="a"), String(data="b"))] if allowed else [])


def test_a_stamp_may_be_an_rclpy_time() -> None:
    sources, received = approximate(2, queue_size=5, slop=0.1)
    for source in sources:
        source.signalMessage(SimpleNamespace(header=SimpleNamespace(stamp=ros_time(10**9))))
    assert len(received) == 1


def test_a_custom_filter_works_between_inputs_and_synchronizer() -> None:
    class EverySecond(SimpleFilter):
        def __init__(self, source: SimpleFilter) -> None:
            super().__init__()
            self.count = 0
            source.registerCallback(self.add)

        def add(self, message: Stamped) -> None:
            self.count += 1
            if self.count % 2 == 0:
                self.signalMessage(message)

    sources = [SimpleFilter(), SimpleFilter()]
    received = collect(ApproximateTimeSynchronizer([EverySecond(source) for source in sources], 5, 0.1))
    for seconds in range(1, 7):
        for source in sources:
            source.signalMessage(Stamped(seconds * 10**9))
    stamps = [messages[0].stamp for messages in received]
    assert stamps == [2 * 10**9, 4 * 10**9, 6 * 10**9]
    assert all(later > earlier for earlier, later in pairwise(stamps))


# Subscriber


@pytest.fixture
def ros(monkeypatch: pytest.MonkeyPatch) -> Iterator[SpinnableNode]:
    monkeypatch.setenv("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
    with spinnable_node("test_message_filters") as node:
        yield node


@pytest.mark.ros
def test_subscriber_forwards_the_messages_of_its_topic(ros: SpinnableNode) -> None:
    group = ReentrantCallbackGroup()
    subscriber = Subscriber(ros.node, Header, "stamps", qos_profile=5, callback_group=group)
    received = collect(subscriber)
    publisher = ros.node.create_publisher(Header, "stamps", 5)
    assert ros.spin_until(lambda: publisher.get_subscription_count() == 1)
    publisher.publish(Header(frame_id="cam_front"))
    assert ros.spin_until(lambda: received)
    assert received == [(Header(frame_id="cam_front"),)]
    assert subscriber.getTopic() == "stamps"
    assert subscriber.topic_name == "/stamps" == subscriber.sub.topic_name
    ros.node.destroy_subscription(subscriber.sub)
    assert ros.spin_until(lambda: publisher.get_subscription_count() == 0)


@pytest.mark.ros
def test_subscriber_may_be_raw_and_best_effort(ros: SpinnableNode) -> None:
    subscriber = Subscriber(ros.node, Header, "raw", qos_profile=qos_profile_sensor_data, raw=True)
    received = collect(subscriber)
    publisher = ros.node.create_publisher(Header, "raw", qos_profile_sensor_data)
    assert ros.spin_until(lambda: publisher.get_subscription_count() == 1)

    def arrived() -> bool:
        publisher.publish(Header(frame_id="cam_back"))
        return bool(received)

    assert ros.spin_until(arrived)
    ((payload,), *_) = received
    assert isinstance(payload, bytes)
    assert deserialize_message(payload, Header) == Header(frame_id="cam_back")


@pytest.mark.ros
def test_subscriber_is_reliable_by_default(ros: SpinnableNode) -> None:
    """A best-effort publisher does not reach it; cameras therefore use the sensor-data QoS."""
    subscriber = Subscriber(ros.node, Header, "silence")
    received = collect(subscriber)
    publisher = ros.node.create_publisher(Header, "silence", qos_profile_sensor_data)
    for _ in range(10):
        publisher.publish(Header())
        ros.executor.spin_once(timeout_sec=0.02)
    assert received == []


@pytest.mark.ros
def test_subscribers_are_synchronized(ros: SpinnableNode) -> None:
    topics = ("left", "right")
    synchronizer = ApproximateTimeSynchronizer(
        [Subscriber(ros.node, Image, topic, qos_profile=10) for topic in topics], 10, 0.02
    )
    received = collect(synchronizer)
    publishers = [ros.node.create_publisher(Image, topic, 10) for topic in topics]
    assert ros.spin_until(lambda: all(publisher.get_subscription_count() for publisher in publishers))
    for milliseconds in (100, 200, 300):
        for offset, publisher in enumerate(publishers):
            stamp = Time(nanoseconds=(milliseconds + 10 * offset) * MILLISECOND).to_msg()
            publisher.publish(Image(header=Header(stamp=stamp)))
    assert ros.spin_until(lambda: len(received) == 3)
    for left, right in received:
        assert right.header.stamp.nanosec - left.header.stamp.nanosec == 10 * MILLISECOND
