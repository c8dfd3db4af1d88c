# SPDX-License-Identifier: Apache-2.0
"""Signals that arrive while a program still imports its packages."""

import os
import signal
from types import FrameType


def exit_quietly_on_signals() -> None:
    """Let SIGINT and SIGTERM end the process without a traceback, until its own handlers are installed.

    Exit code 130 or 143, as a shell reports these signals.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _exit)


def _exit(number: int, _: FrameType | None) -> None:
    os._exit(128 + number)
