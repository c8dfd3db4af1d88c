# SPDX-License-Identifier: Apache-2.0
"""A transform buffer for a machine with no ROS distribution: an own version of what we use of `tf2_py`."""

from ._buffer_core import BufferCore
from ._exceptions import (
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
