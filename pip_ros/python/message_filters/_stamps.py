# SPDX-License-Identifier: Apache-2.0
"""The time of a message: its header stamp, or its arrival if headerless messages are allowed."""

from typing import Any

from rclpy.clock import ROSClock
from rclpy.logging import get_logger
from rclpy.time import Time


def message_stamp(msg: Any, allow_headerless: bool, logger_name: str) -> Time | None:
    """Return the time of `msg`; None, with a warning, if it has no stamp and `allow_headerless` is False."""
    stamp = getattr(getattr(msg, "header", None), "stamp", None)
    if stamp is not None:
        return stamp if hasattr(stamp, "nanoseconds") else Time.from_msg(stamp)
    if allow_headerless:
        return ROSClock().now()
    get_logger(logger_name).warning(
        f"dropped a {type(msg).__name__}: it has no header.stamp; "
        "pass allow_headerless=True to use its arrival time"
    )
    return None
