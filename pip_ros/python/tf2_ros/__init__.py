# SPDX-License-Identifier: Apache-2.0
"""Transforms over ROS 2 for a machine with no ROS distribution: an own version of what we use of `tf2_ros`.

Covered: `Buffer`, `TransformListener`, `TransformBroadcaster`, `StaticTransformBroadcaster` and the
exceptions, compared with the genuine package 0.39.1 (docs/how-to/ros-distribution.md).
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
