# SPDX-License-Identifier: Apache-2.0
"""Message filters for a machine with no ROS distribution: an own implementation of the API of ROS 2's `message_filters`.

Covered: `SimpleFilter`, `Subscriber`, `Cache`, `TimeSynchronizer` and `ApproximateTimeSynchronizer`, with the behaviour
of the Python package of ROS 2 Humble to Kilted. Names are the genuine ones, spelling included. Stamps are nanoseconds.
"""

from message_filters._cache import Cache
from message_filters._simple import SimpleFilter, Subscriber
from message_filters._synchronizers import ApproximateTimeSynchronizer, TimeSynchronizer

__all__ = ["ApproximateTimeSynchronizer", "Cache", "SimpleFilter", "Subscriber", "TimeSynchronizer"]
