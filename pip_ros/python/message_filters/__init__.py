# SPDX-License-Identifier: Apache-2.0
"""Reimplementation of ROS 2's `message_filters` for a machine without a ROS distribution.

Contains `SimpleFilter`, `Subscriber`, `Cache`, `TimeSynchronizer` and `ApproximateTimeSynchronizer`. Names
and behaviour are those of the original package 6.0.6 (see pip_ros/README.md).
"""

from ._cache import Cache
from ._simple import SimpleFilter, Subscriber
from ._synchronizers import ApproximateTimeSynchronizer, TimeSynchronizer

__all__ = ["ApproximateTimeSynchronizer", "Cache", "SimpleFilter", "Subscriber", "TimeSynchronizer"]
