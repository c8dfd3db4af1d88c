# SPDX-License-Identifier: Apache-2.0
"""Executor and main loop of the detector node."""

import threading
from typing import Final

from rclpy.context import Context
from rclpy.executors import Executor, ExternalShutdownException, SingleThreadedExecutor

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
