# SPDX-License-Identifier: Apache-2.0
"""The most recent messages of one filter, to be asked for by time."""

from collections import deque
from typing import Any

from rclpy.time import Time

from ._simple import SimpleFilter
from ._stamps import message_stamp


class Cache(SimpleFilter):
    """Keeps the last `cache_size` messages in the order of their arrival and passes each of them on.

    Times are `rclpy.time.Time`; a header's stamp counts as ROS time, and comparing times of two clocks raises
    TypeError. Every question on an empty cache is answered with None (or an empty list).
    """

    def __init__(self, f: SimpleFilter, cache_size: int = 1, allow_headerless: bool = False) -> None:
        super().__init__()
        self.cache_size = cache_size
        self.allow_headerless = allow_headerless
        self._entries: deque[tuple[Time, Any]] = deque(maxlen=cache_size)
        self.connectInput(f)

    @property
    def cache_msgs(self) -> list[Any]:
        """The messages held, oldest arrival first."""
        return [message for _, message in self._snapshot()]

    @property
    def cache_times(self) -> list[Time]:
        """Their stamps, in the same order."""
        return [time for time, _ in self._snapshot()]

    def _snapshot(self) -> list[tuple[Time, Any]]:
        # list(deque) is one step under the interpreter lock, so an arrival cannot upset a search.
        return list(self._entries)

    def connectInput(self, f: SimpleFilter) -> None:
        """Take messages from filter `f`."""
        self.incoming_connection = f.registerCallback(self.add)

    def add(self, msg: Any) -> None:
        """Store `msg` and signal it; one with no stamp is dropped unless `allow_headerless`."""
        stamp = message_stamp(msg, self.allow_headerless, "message_filters_cache")
        if stamp is None:
            return
        self._entries.append((stamp, msg))
        self.signalMessage(msg)

    def getInterval(self, from_stamp: Time, to_stamp: Time) -> list[Any]:
        """The messages from `from_stamp` to `to_stamp`, both included; asserts that they are in order."""
        assert from_stamp <= to_stamp, f"the interval ends before it begins: {from_stamp} > {to_stamp}"
        return [message for time, message in self._snapshot() if from_stamp <= time <= to_stamp]

    def getElemAfterTime(self, stamp: Time) -> Any:
        """The first to have arrived of the messages at or after `stamp`."""
        return next((message for time, message in self._snapshot() if time >= stamp), None)

    def getElemBeforeTime(self, stamp: Time) -> Any:
        """The last to have arrived of the messages at or before `stamp`."""
        return next((message for time, message in reversed(self._snapshot()) if time <= stamp), None)

    def getLastestTime(self) -> Time | None:
        """The stamp of the latest arrival. (The name is spelt as in the genuine package.)"""
        entries = self._snapshot()
        return entries[-1][0] if entries else None

    def getOldestTime(self) -> Time | None:
        """The stamp of the earliest arrival that is still held."""
        entries = self._snapshot()
        return entries[0][0] if entries else None

    def getLast(self) -> Any:
        """The message at the latest time."""
        latest = self.getLastestTime()
        return None if latest is None else self.getElemAfterTime(latest)
