# SPDX-License-Identifier: Apache-2.0
"""Transforms over ROS 2 for a machine with no ROS distribution: an own implementation of what we use of `tf2_ros`.

Covered: `Buffer`, `TransformListener`, `TransformBroadcaster`, `StaticTransformBroadcaster` and the exceptions, with the
genuine names, module layout and behaviour of ROS 2 Humble to Kilted.
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
from tf2_ros.buffer import Buffer
from tf2_ros.static_transform_broadcaster import StaticTransformBroadcaster
from tf2_ros.transform_broadcaster import TransformBroadcaster
from tf2_ros.transform_listener import TransformListener

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
