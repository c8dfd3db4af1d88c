# SPDX-License-Identifier: Apache-2.0
"""What the player and the recorder share as ROS 2 nodes: start, parameters, clean stop, errors in one
sentence."""

import importlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, TypeVar

import rclpy
from rcl_interfaces.msg import ParameterDescriptor
from rclpy.exceptions import ParameterException
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.signals import SignalHandlerOptions

from ftkd_core.errors import UserError

NodeT = TypeVar("NodeT", bound=Node)

_JOIN_TIMEOUT_S: Final = 5.0
_DEPTH: Final = 1000
_LARGE_DEPTH: Final = 100
_LARGE_TYPES: Final = (
    "sensor_msgs/msg/CompressedImage",
    "sensor_msgs/msg/Image",
    "sensor_msgs/msg/PointCloud2",
)


def run_node(
    make: Callable[[], NodeT], work: Callable[[NodeT, threading.Event], str], arguments: Sequence[str] | None
) -> int:
    """Make a node, let it answer in a background thread, run `work(node, stop)` here and print its sentence.

    SIGINT and SIGTERM set `stop`; the work then ends by itself. Returns the exit code: 0, or 2 after a
    UserError, whose sentence goes to stderr.
    """
    stop = threading.Event()
    try:
        _start_ros(arguments)
        with _stopping_on_signals(stop):
            node = make()
            with spinning(node):
                sentence = work(node, stop)
    except (UserError, ParameterException) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    finally:
        rclpy.try_shutdown()
    print(sentence, flush=True)
    return 0


def text_parameter(node: Node, name: str, description: str) -> str:
    """A text that must be given. Raises UserError where it is empty."""
    value = str(node.declare_parameter(name, "", ParameterDescriptor(description=description)).value)
    if not value:
        raise UserError(f"parameter {name} is empty: {description}; give it with --ros-args -p {name}:=VALUE")
    return value


def texts_parameter(node: Node, name: str, description: str) -> list[str]:
    """A list of texts, empty ones left out."""
    value = node.declare_parameter(name, [""], ParameterDescriptor(description=description)).value
    return [text for text in value if text]


def number_parameter(node: Node, name: str, default: float, description: str, least: float) -> float:
    """A number, written with or without a decimal point. Raises UserError for another type or one below
    `least`."""
    descriptor = ParameterDescriptor(description=description, dynamic_typing=True)
    value = node.declare_parameter(name, default, descriptor).value
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value < 1e9:
        raise UserError(
            f"parameter {name} is {value!r}; expected a number of at least {least:g}: {description}"
        )
    return float(value)


def message_class(msgtype: str) -> Any:
    """The Python class of a type such as "std_msgs/msg/Header"; None where its package is not installed."""
    package, _, name = msgtype.partition("/msg/")
    try:
        return getattr(importlib.import_module(f"{package}.msg"), name)
    except (ImportError, AttributeError):
        return None


def queue_depth(msgtype: str) -> int:
    """Messages to keep for a reader that stalls: ten seconds of any topic, or of what is large a hundred
    messages."""
    return _LARGE_DEPTH if msgtype in _LARGE_TYPES else _DEPTH


def _start_ros(arguments: Sequence[str] | None) -> None:
    try:
        rclpy.init(args=arguments, signal_handler_options=SignalHandlerOptions.NO)
    except RuntimeError as error:  # what rclpy raises for arguments it cannot parse
        reason = " ".join(str(error).split())
        raise UserError(f"ROS could not start: {reason}; give parameters as -p NAME:=VALUE") from error


@contextmanager
def _stopping_on_signals(stop: threading.Event) -> Iterator[None]:
    """SIGINT and SIGTERM set `stop`. Does nothing outside the main thread, which alone may handle signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda *_: stop.set()) for number in signals]
    try:
        yield
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)


@contextmanager
def spinning(node: Node) -> Iterator[None]:
    """The node's callbacks run in a thread of their own; the node is destroyed at the end."""
    # Not the EventsExecutor: rclpy 9.1 hangs when it is woken or shut down from another thread.
    executor = SingleThreadedExecutor(context=node.context)
    executor.add_node(node)
    thread = threading.Thread(target=executor.spin, name="spin", daemon=True)
    thread.start()
    try:
        yield
    finally:
        executor.shutdown()
        thread.join(_JOIN_TIMEOUT_S)
        node.destroy_node()
