# SPDX-License-Identifier: Apache-2.0
"""Message filters for a machine with no ROS distribution: an own version of ROS 2's `message_filters`.

Covered: `SimpleFilter`, `Subscriber`, `Cache`, `TimeSynchronizer` and `ApproximateTimeSynchronizer`, compared
with the genuine package 6.0.6 (docs/how-to/ros-distribution.md). Names are the genuine ones, spelling
included.
"""

from ._cache import Cache
from ._simple import SimpleFilter, Subscriber
from ._synchronizers import ApproximateTimeSynchronizer, TimeSynchronizer

__all__ = ["ApproximateTimeSynchronizer", "Cache", "SimpleFilter", "Subscriber", "TimeSynchronizer"]
