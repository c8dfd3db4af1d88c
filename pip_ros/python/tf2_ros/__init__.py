# SPDX-License-Identifier: Apache-2.0
"""Reimplementation of the used parts of `tf2_ros` for a machine without a ROS distribution.

Contains `Buffer`, `TransformListener`, `TransformBroadcaster`, `StaticTransformBroadcaster` and the
exceptions, with the behaviour of the original package 0.39.1 (see pip_ros/README.md).
"""

from tf2_py import (
    BufferCore,
    ConnectivityException,
    ExtrapolationException,
    InvalidArgumentException,
    LookupException,
    TimeoutException,
    TransformException,
)

from .buffer import Buffer
from .static_transform_broadcaster import StaticTransformBroadcaster
from .transform_broadcaster import TransformBroadcaster
from .transform_listener import TransformListener

__all__ = [
    "Buffer",
    "BufferCore",
    "ConnectivityException",
    "ExtrapolationException",
    "InvalidArgumentException",
    "LookupException",
    "StaticTransformBroadcaster",
    "TimeoutException",
    "TransformBroadcaster",
    "TransformException",
    "TransformListener",
]
