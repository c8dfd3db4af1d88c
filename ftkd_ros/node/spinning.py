# SPDX-License-Identifier: Apache-2.0
"""Start of ROS, executor and main loop of the detector node."""

import sys
import threading
from collections.abc import Sequence
from typing import Final

import rclpy
from rclpy.context import Context
from rclpy.executors import Executor, ExternalShutdownException, SingleThreadedExecutor
from rclpy.signals import SignalHandlerOptions

from ftkd_core.errors import UserError

_SPIN_S: Final = 0.2


def make_executor(context: Context) -> Executor:
    """Return an EventsExecutor, which has the least work per message, or a SingleThreadedExecutor if rclpy
    lacks it.
    """
    try:
        from rclpy.experimental import EventsExecutor
    except ImportError:
        return SingleThreadedExecutor(context=context)
    return EventsExecutor(context=context)


def start_ros(arguments: Sequence[str] | None) -> None:
    """Initialise rclpy without its signal handlers. UserError for arguments that it cannot parse."""
    try:
        rclpy.init(args=arguments, signal_handler_options=SignalHandlerOptions.NO)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"ROS could not start: {reason}; {_advice(arguments)}") from error


def _advice(arguments: Sequence[str] | None) -> str:
    """Return how to write a value that begins with a brace, which YAML takes for a mapping."""
    for text in sys.argv[1:] if arguments is None else arguments:
        name, separator, value = text.partition(":=")
        if separator and value.startswith("{"):
            return f"quote a value that begins with a brace: -p '{name}:=\"{value}\"'"
    return "give parameters as -p NAME:=VALUE"


def spin(executor: Executor, context: Context, stop: threading.Event) -> None:
    """Run callbacks until `stop` is set or the context is shut down.

    Replaces `executor.spin()`, because the EventsExecutor of the Kilted wheels runs no callback there and
    ignores signals.
    """
    try:
        while context.ok() and not stop.is_set():
            executor.spin_once(timeout_sec=_SPIN_S)
    except ExternalShutdownException:
        return
