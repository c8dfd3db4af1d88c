# SPDX-License-Identifier: Apache-2.0
"""Common code of the player and recorder nodes: start, parameters, stop, and errors in one sentence."""

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

from ftkd_core.errors import UserError
from ftkd_ros.node.spinning import start_ros

NodeT = TypeVar("NodeT", bound=Node)

_JOIN_TIMEOUT_S: Final = 5.0
_DEPTH: Final = 1000  # messages: ten seconds at 100 Hz
_LARGE_DEPTH: Final = 100
_LARGE_TYPES: Final = (
    "sensor_msgs/msg/CompressedImage",
    "sensor_msgs/msg/Image",
    "sensor_msgs/msg/PointCloud2",
)


def run_node(
    make: Callable[[], NodeT], work: Callable[[NodeT, threading.Event], str], arguments: Sequence[str] | None
) -> int:
    """Create a node, spin it in a background thread, run `work(node, stop)` and print the returned text.

    SIGINT and SIGTERM set `stop`, and the work must then return. Returns exit code 0, or 2 after a UserError,
    which is printed to stderr.
    """
    stop = threading.Event()
    try:
        start_ros(arguments)
        with _stopping_on_signals(stop):
            node = make()
            with spinning(node):
                result = work(node, stop)
    except (UserError, ParameterException) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    finally:
        rclpy.try_shutdown()
    print(result, flush=True)
    return 0


def text_parameter(node: Node, name: str, description: str) -> str:
    """Declare a required text parameter and return its value. Raises UserError if it is empty."""
    value = str(node.declare_parameter(name, "", ParameterDescriptor(description=description)).value)
    if not value:
        raise UserError(f"parameter {name} is empty: {description}; give it with --ros-args -p {name}:=VALUE")
    return value


def texts_parameter(node: Node, name: str, description: str) -> list[str]:
    """Declare a parameter that is a list of texts and return its non-empty entries."""
    value = node.declare_parameter(name, [""], ParameterDescriptor(description=description)).value
    return [text for text in value if text]


def number_parameter(node: Node, name: str, default: float, description: str, minimum: float) -> float:
    """Declare a number parameter (int or float) and return its value.

    Raises UserError for another type and for a value below `minimum`.
    """
    descriptor = ParameterDescriptor(description=description, dynamic_typing=True)
    value = node.declare_parameter(name, default, descriptor).value
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not minimum <= value < 1e9:
        raise UserError(
            f"parameter {name} is {value!r}; expected a number of at least {minimum:g}: {description}"
        )
    return float(value)


def message_class(msgtype: str) -> Any:
    """Return the class of a type such as "std_msgs/msg/Header"; None if its package is not installed."""
    package, _, name = msgtype.partition("/msg/")
    try:
        return getattr(importlib.import_module(f"{package}.msg"), name)
    except (ImportError, AttributeError):
        return None


def queue_depth(msgtype: str) -> int:
    """Return the queue depth for a type: 1000 messages, or 100 for images and point clouds."""
    return _LARGE_DEPTH if msgtype in _LARGE_TYPES else _DEPTH


@contextmanager
def _stopping_on_signals(stop: threading.Event) -> Iterator[None]:
    """Set `stop` on SIGINT and SIGTERM.

    Has no effect outside the main thread, where Python handles signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    signals = (signal.SIGINT, signal.SIGTERM)
    previous = [signal.signal(number, lambda *_: stop.set()) for number in signals]
    try:
        yield
    finally:
        for number, handler in zip(signals, previous, strict=True):
            signal.signal(number, handler)


@contextmanager
def spinning(node: Node) -> Iterator[None]:
    """Spin a node in its own thread; destroy the node at the end."""
    # The EventsExecutor of rclpy 9.1 hangs if another thread wakes it or shuts it down.
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
