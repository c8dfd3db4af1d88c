# SPDX-License-Identifier: Apache-2.0
"""Message factories: one interface to create messages of rclpy or of a rosbags type store.

`ftkd_ros.convert.to_ros` gets empty messages from a factory and fills them field by field. `RCLPY` creates
the messages that nodes publish; `ftkd_ros.bag.message_definitions.ROSBAGS` creates those that `BagWriter`
serializes.
"""

import array
import importlib
from typing import Any, Protocol

from numpy.typing import NDArray


class MessageFactory(Protocol):
    """Creates empty messages by type name, such as "std_msgs/msg/Header"."""

    def new(self, msgtype: str) -> Any:
        """Return a message whose fields have their default values."""
        ...

    def sequence(self, values: NDArray[Any]) -> Any:
        """Return a 1-D array as the value of a field that is an unbounded sequence of numbers."""
        ...


class RclpyMessages:
    """Factory of rclpy messages; imports each message package on first use."""

    def __init__(self) -> None:
        self._classes: dict[str, Any] = {}

    def new(self, msgtype: str) -> Any:
        """Return an empty message. Raises ImportError if its package is not installed."""
        message_class = self._classes.get(msgtype)
        if message_class is None:
            package, _, name = msgtype.partition("/msg/")
            message_class = getattr(importlib.import_module(f"{package}.msg"), name)
            self._classes[msgtype] = message_class
        return message_class()

    def sequence(self, values: NDArray[Any]) -> Any:
        """Return an array.array, which all rclpy versions store without checking each element."""
        return array.array(values.dtype.char, values.tobytes())


RCLPY = RclpyMessages()
