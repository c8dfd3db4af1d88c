# SPDX-License-Identifier: Apache-2.0
"""Reimplementation of the used parts of `tf2_py` for a machine without a ROS distribution."""

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
