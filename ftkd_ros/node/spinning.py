# SPDX-License-Identifier: Apache-2.0
"""The executor of our nodes and the loop around it."""

import threading
from typing import Final

from rclpy.context import Context
from rclpy.executors import Executor, ExternalShutdownException, SingleThreadedExecutor

_SPIN_S: Final = 0.2


def make_executor(context: Context) -> Executor:
    """The executor with the least work a message: EventsExecutor where rclpy has it."""
    try:
        from rclpy.experimental import EventsExecutor
    except ImportError:
        return SingleThreadedExecutor(context=context)
    return EventsExecutor(context=context)


def spin(executor: Executor, context: Context, stop: threading.Event) -> None:
    """Run callbacks until `stop` is set or the context shut down.

    Not `executor.spin()`: that of the EventsExecutor in the Kilted wheels runs nothing and ignores signals.
    """
    try:
        while context.ok() and not stop.is_set():
            executor.spin_once(timeout_sec=_SPIN_S)
    except ExternalShutdownException:
        return
