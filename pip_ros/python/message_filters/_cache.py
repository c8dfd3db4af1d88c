# SPDX-License-Identifier: Apache-2.0
"""Cache of the most recent messages of one filter, with look-up by time."""

from collections import deque
from typing import Any

from rclpy.time import Time

from ._simple import SimpleFilter
from ._stamps import message_stamp


class Cache(SimpleFilter):
    """Stores the last `cache_size` messages in order of arrival and forwards each message.

    Times are `rclpy.time.Time`. Header stamps are ROS time; comparing times of different clocks raises
    TypeError. With an empty cache all look-ups return None or an empty list.
    """

    def __init__(self, f: SimpleFilter, cache_size: int = 1, allow_headerless: bool = False) -> None:
        super().__init__()
        self.cache_size = cache_size
        self.allow_headerless = allow_headerless
        self._entries: deque[tuple[Time, Any]] = deque(maxlen=cache_size)
        self.connectInput(f)

    @property
    def cache_msgs(self) -> list[Any]:
        """Stored messages, oldest arrival first."""
        return [message for _, message in self._snapshot()]

    @property
    def cache_times(self) -> list[Time]:
        """Stamps of the stored messages, in the same order."""
        return [time for time, _ in self._snapshot()]

    def _snapshot(self) -> list[tuple[Time, Any]]:
        # list(deque) is atomic under the interpreter lock, so an arriving message cannot disturb a look-up.
        return list(self._entries)

    def connectInput(self, f: SimpleFilter) -> None:
        """Receive messages from filter `f`."""
        self.incoming_connection = f.registerCallback(self.add)

    def add(self, msg: Any) -> None:
        """Store and forward `msg`; a message without a stamp is dropped unless `allow_headerless`."""
        stamp = message_stamp(msg, self.allow_headerless, "message_filters_cache")
        if stamp is None:
            return
        self._entries.append((stamp, msg))
        self.signalMessage(msg)

    def getInterval(self, from_stamp: Time, to_stamp: Time) -> list[Any]:
        """Return the messages from `from_stamp` to `to_stamp`, both included; asserts their order."""
        assert from_stamp <= to_stamp, f"the interval ends before it begins: {from_stamp} > {to_stamp}"
        return [message for time, message in self._snapshot() if from_stamp <= time <= to_stamp]

    def getElemAfterTime(self, stamp: Time) -> Any:
        """Return the first message, in order of arrival, with a stamp at or after `stamp`."""
        return next((message for time, message in self._snapshot() if time >= stamp), None)

    def getElemBeforeTime(self, stamp: Time) -> Any:
        """Return the last message, in order of arrival, with a stamp at or before `stamp`."""
        return next((message for time, message in reversed(self._snapshot()) if time <= stamp), None)

    def getLastestTime(self) -> Time | None:
        """Return the stamp of the latest arrival. (The original package spells the name this way.)"""
        entries = self._snapshot()
        return entries[-1][0] if entries else None

    def getOldestTime(self) -> Time | None:
        """Return the stamp of the earliest arrival that is still stored."""
        entries = self._snapshot()
        return entries[0][0] if entries else None

    def getLast(self) -> Any:
        """Return the first message with a stamp at or after that of the latest arrival."""
        latest = self.getLastestTime()
        return None if latest is None else self.getElemAfterTime(latest)
