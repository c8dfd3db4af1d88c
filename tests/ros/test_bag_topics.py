# SPDX-License-Identifier: Apache-2.0
"""Bag -> player -> topics -> recorder -> bag over DDS, and the end of both nodes."""

import itertools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import rclpy
from rclpy.context import Context
from rclpy.node import Node
from rclpy.parameter import Parameter
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from rosgraph_msgs.msg import Clock
from std_msgs.msg import Header

from ftkd_core.errors import UserError
from ftkd_ros.bag import player, recorder
from ftkd_ros.bag.io import BagReader, BagWriter, is_latched
from ftkd_ros.bag.message_definitions import ROSBAGS
from ftkd_ros.bag.node_running import spinning
from ftkd_ros.convert import to_ros

pytestmark = pytest.mark.ros

DOMAIN = int(os.environ.get("ROS_DOMAIN_ID", 20 + os.getpid() % 40))
DEADLINE_S = 60.0
TOPICS = {"/image": "sensor_msgs/msg/CompressedImage", "/mark": "std_msgs/msg/Header"}


@pytest.fixture(autouse=True)
def _loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
    monkeypatch.setenv("ROS_DOMAIN_ID", str(DOMAIN))


@pytest.fixture
def context() -> Iterator[Context]:
    made = Context()
    rclpy.init(context=made, domain_id=DOMAIN)
    yield made
    rclpy.try_shutdown(context=made)


@pytest.fixture(scope="module")
def bag(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bag of half a second: a latched transform, images at 60 Hz and marks at 200 Hz."""
    path = tmp_path_factory.mktemp("bags") / "played"
    with BagWriter(path) as writer:
        writer.add_topic("/latched", "tf2_msgs/msg/TFMessage", depth=1, latched=True)
        for topic, msgtype in TOPICS.items():
            writer.add_topic(topic, msgtype)
        writer.write("/latched", 10**9, to_ros.make_transforms(ROSBAGS, 10**9, "base_link", {}))
        events = [(10**9 + i * 16_000_000, "/image", i) for i in range(30)]
        events += [(10**9 + i * 5_000_000, "/mark", i) for i in range(100)]
        for stamp_ns, topic, number in sorted(events):
            content = bytes([number]) * (40_000 + number)
            message = (
                to_ros.compressed_image(ROSBAGS, content, stamp_ns, "camera")
                if topic == "/image"
                else to_ros.make_header(ROSBAGS, stamp_ns, f"mark {number}")
            )
            writer.write(topic, stamp_ns, message)
    return path


def make_node(kind: Callable[..., Any], context: Context, **parameters: Any) -> Any:
    overrides = [Parameter(name, value=value) for name, value in parameters.items()]
    return kind(context=context, parameter_overrides=overrides)


def contents(path: Path) -> dict[str, list[bytes]]:
    """Return serialized messages by topic, padded with zeros to a multiple of four bytes as by the
    middleware.
    """
    found: dict[str, list[bytes]] = {}
    with BagReader(path) as reader:
        for connection, _, content in reader.raw():
            found.setdefault(connection.topic, []).append(content + bytes(-len(content) % 4))
    return found


def wait_for(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.01)


def test_played_and_recorded_bag_has_the_same_messages(bag: Path, tmp_path: Path, context: Context) -> None:
    topics = [*TOPICS, "/latched"]
    recording = make_node(recorder.RecorderNode, context, output=str(tmp_path / "again"), topics=topics)
    playing = make_node(player.PlayerNode, context, bag=str(bag), wait_for_subscribers=topics, rate=2.0)
    stop = threading.Event()
    with spinning(recording), spinning(playing):
        thread = threading.Thread(target=recording.record, args=(stop,))
        thread.start()
        summary = playing.play(threading.Event())
        stop.set()
        thread.join(DEADLINE_S)
    assert summary.startswith("played 131 messages")
    assert contents(tmp_path / "again") == contents(bag)
    with BagReader(tmp_path / "again") as reader:
        assert {c.topic: is_latched(c) for c in reader.connections} == {
            "/image": False, "/mark": False, "/latched": True
        }  # fmt: skip
        assert all(connection.msgdef.data for connection in reader.connections)
        times = [log_time_ns for _, log_time_ns, _ in reader.raw()]
    # Log times are times of arrival: increasing, recent, and within 0.25 s at rate 2.
    assert times == sorted(times) and abs(times[-1] / 1e9 - time.time()) < DEADLINE_S
    assert (times[-1] - times[0]) / 1e9 > 0.2


def test_clock_jumps_back_at_each_loop(bag: Path, context: Context) -> None:
    playing = make_node(player.PlayerNode, context, bag=str(bag), loop=True, rate=4.0)
    listener = Node("listener", context=context)
    ticks: list[int] = []
    marks: list[str] = []
    listener.create_subscription(
        Clock, "/clock", lambda m: ticks.append(m.clock.sec * 10**9 + m.clock.nanosec), 10
    )
    listener.create_subscription(Header, "/mark", lambda m: marks.append(m.frame_id), 1000)
    stop = threading.Event()
    with spinning(listener), spinning(playing):
        thread = threading.Thread(target=playing.play, args=(stop,))
        thread.start()
        wait_for(lambda: marks.count("mark 99") >= 2)
        stop.set()
        thread.join(DEADLINE_S)
    assert not thread.is_alive()
    assert min(ticks) == 10**9 and max(ticks) == 10**9 + 495_000_000
    jumps = [(a, b) for a, b in itertools.pairwise(ticks) if b < a]
    assert jumps and all(b == 10**9 for _, b in jumps)
    between = marks[marks.index("mark 99") + 1 :]
    assert between[:100] == [f"mark {number}" for number in range(100)]


def test_player_stops_with_an_error_if_subscribers_are_missing(bag: Path, context: Context) -> None:
    playing = make_node(
        player.PlayerNode, context, bag=str(bag), wait_for_subscribers=["/mark=2"], wait_timeout_s=0.3
    )
    playing.create_subscription(Header, "/mark", lambda _: None, 10)
    started = time.monotonic()
    with spinning(playing), pytest.raises(UserError, match=r"no subscriber after 0.3 s on /mark"):
        playing.play(threading.Event())
    assert time.monotonic() - started >= 0.3


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"bag": ""}, "parameter bag is empty"),
        ({"bag": "/nowhere/bag"}, "bag '/nowhere/bag' does not exist"),
        ({"rate": 0.0}, "parameter rate is 0.0"),
        ({"rate": "fast"}, "parameter rate is 'fast'; expected a number"),
        (
            {"wait_for_subscribers": ["/other"]},
            "/other, which the bag does not play; it plays /image, /latched, /mark",
        ),
        ({"wait_for_subscribers": ["/mark=few"]}, "'/mark=few'; expected NAME or NAME=COUNT"),
    ],
)
def test_bad_parameters_of_the_player_are_refused(
    bag: Path, context: Context, parameters: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        make_node(player.PlayerNode, context, **{"bag": str(bag), **parameters})


def test_bad_parameters_of_the_recorder_are_refused(bag: Path, tmp_path: Path, context: Context) -> None:
    def assert_refused(message: str, **parameters: Any) -> None:
        with pytest.raises(UserError, match=message):
            make_node(recorder.RecorderNode, context, **parameters)

    assert_refused("parameter output is empty", topics=["/mark"])
    assert_refused("parameter topics is empty", output=str(tmp_path / "new"))
    assert_refused("exists already", output=str(bag), topics=["/mark"])
    assert_refused("less than min_free_mb", output=str(tmp_path / "new"), topics=["/mark"], min_free_mb=9e8)
    assert not list(tmp_path.iterdir())


def test_recorder_adapts_its_qos_to_the_publishers(tmp_path: Path, context: Context) -> None:
    """The recorder also receives a later publisher that offers a weaker QoS than the first."""
    node = Node("talker", context=context)
    recording = make_node(recorder.RecorderNode, context, output=str(tmp_path / "bag"), topics=["/mark"])
    stop = threading.Event()
    latched = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
    first = node.create_publisher(Header, "/mark", latched)
    first.publish(Header(frame_id="before the recorder"))
    with spinning(recording), spinning(node):
        thread = threading.Thread(target=recording.record, args=(stop,))
        thread.start()
        wait_for(lambda: recording._bag.counts["/mark"] == 1)
        unreliable = QoSProfile(depth=1, reliability=ReliabilityPolicy.BEST_EFFORT)
        second = node.create_publisher(Header, "/mark", unreliable)
        wait_for(lambda: second.get_subscription_count() == 1)
        for _ in range(100):
            second.publish(Header(frame_id="best effort"))
            time.sleep(0.01)
        stop.set()
        thread.join(DEADLINE_S)
    with BagReader(tmp_path / "bag") as reader:
        found = [message.frame_id for _, _, message in reader.messages(["/mark"])]
    assert found[0] == "before the recorder" and "best effort" in found


def test_low_disk_space_ends_the_recording_with_a_complete_bag(
    tmp_path: Path, context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    recording = make_node(recorder.RecorderNode, context, output=str(tmp_path / "bag"), topics=["/mark"])
    node = Node("talker", context=context)
    publisher = node.create_publisher(
        Header, "/mark", QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
    )
    publisher.publish(Header(frame_id="kept"))
    failure: list[UserError] = []

    def record() -> None:
        try:
            recording.record(threading.Event())
        except UserError as error:
            failure.append(error)

    with spinning(recording), spinning(node):
        thread = threading.Thread(target=record)
        thread.start()
        wait_for(lambda: recording._bag.counts["/mark"] == 1)
        monkeypatch.setattr(recording, "_min_free_bytes", 10**18)
        thread.join(DEADLINE_S)
    assert "less than min_free_mb" in str(failure[0]) and "recorded 1 messages" in str(failure[0])
    assert len(contents(tmp_path / "bag")["/mark"]) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_ends_the_recorder_with_a_complete_bag(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    handler = signal.getsignal(number)
    timer = threading.Timer(0.5, os.kill, (os.getpid(), number))
    timer.start()
    arguments = ["--ros-args", "-p", f"output:={tmp_path / 'bag'}", "-p", "topics:=[/silent]"]
    assert recorder.main(arguments) == 0
    timer.join()
    assert f"recorded 0 messages to {tmp_path / 'bag'}" in capsys.readouterr().out
    assert signal.getsignal(number) is handler
    with BagReader(tmp_path / "bag") as reader:
        assert reader.message_count == 0 and reader.topics == {}


def test_player_prints_a_summary_and_returns_0(bag: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert player.main(["--ros-args", "-p", f"bag:={bag}", "-p", "rate:=10"]) == 0
    assert "played 131 messages of" in capsys.readouterr().out


def test_bad_input_gives_one_sentence_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cut = tmp_path / "cut"
    with BagWriter(cut) as writer:
        writer.add_topic("/mark", "std_msgs/msg/Header")
        writer.write("/mark", 1, to_ros.make_header(ROSBAGS, 1, "x"))
    (cut / "cut.mcap").write_bytes((cut / "cut.mcap").read_bytes()[:200])
    for arguments in (
        ["--ros-args", "-p", f"bag:={cut}"],
        ["--ros-args", "-p", "bag:=/nowhere"],
        ["--ros-args", "-p", "bag"],
        [],
    ):
        assert player.main(arguments) == 2
        printed = capsys.readouterr()
        assert printed.err.startswith("error: ") and printed.err.count("\n") == 1 and not printed.out
