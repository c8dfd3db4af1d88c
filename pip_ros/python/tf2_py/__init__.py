# SPDX-License-Identifier: Apache-2.0
"""The transform buffer for a machine with no ROS distribution: an own implementation of what we use of ROS 2's `tf2_py`."""

from tf2_py._buffer_core import BufferCore
from tf2_py._exceptions import (
    ConnectivityException,
    ExtrapolationException,
    InvalidArgumentException,
    LookupException,
    TimeoutException,
    TransformException,
)

__all__ = [
    "BufferCore",
    "ConnectivityException",
    "ExtrapolationException",
    "InvalidArgumentException",
    "LookupException",
    "TimeoutException",
    "TransformException",
]
