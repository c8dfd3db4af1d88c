# SPDX-License-Identifier: Apache-2.0
"""Synchronizers: sets of messages, one per input, with equal or nearly equal stamps.

Queues: one dict per input, from stamp in nanoseconds to message. Callbacks run while the synchronizer holds
its lock, as in the original package, so they must not feed the same synchronizer. Unlike there, the lock is
released if a callback raises an exception.
"""

import threading
from collections.abc import Sequence
from typing import Any

from rclpy.duration import Duration
from rclpy.time import Time

from ._simple import SimpleFilter
from ._stamps import message_stamp

Queue = dict[int, Any]


class TimeSynchronizer(SimpleFilter):
    """Calls `callback(message_1, ..., message_N)` when all N inputs have a message with the same stamp.

    Each queue holds at most `queue_size` messages; the message with the smallest stamp is dropped first.
    """

    def __init__(self, fs: Sequence[SimpleFilter], queue_size: int) -> None:
        super().__init__()
        self.queue_size = queue_size
        self.lock = threading.Lock()
        self.connectInput(fs)

    def connectInput(self, fs: Sequence[SimpleFilter]) -> None:
        """Receive messages from the filters `fs`, whose order is that of the callback arguments."""
        self.queues: list[Queue] = [{} for _ in fs]
        self.input_connections = [
            source.registerCallback(self.add, queue, index)
            for index, (source, queue) in enumerate(zip(fs, self.queues, strict=True))
        ]

    def add(self, msg: Any, my_queue: Queue, my_queue_index: int | None = None) -> None:
        """Store a message of one input and forward every complete set, oldest first."""
        with self.lock:
            self._store(my_queue, Time.from_msg(msg.header.stamp).nanoseconds, msg)
            for stamp in sorted(set(self.queues[0]).intersection(*self.queues[1:])):
                self.signalMessage(*(queue.pop(stamp) for queue in self.queues))

    def _store(self, queue: Queue, stamp: int, msg: Any) -> None:
        queue[stamp] = msg
        while len(queue) > self.queue_size:
            del queue[min(queue)]


class ApproximateTimeSynchronizer(TimeSynchronizer):
    """Forwards sets of N messages whose stamps differ by less than `slop` seconds.

    A new message is matched immediately with messages of the other inputs that are at most `slop` away,
    nearest first. The first set whose earliest and latest stamp differ by less than `slop` is forwarded;
    inputs exactly 0.1 s apart therefore need a `slop` above 0.1. The class does not wait for a better match
    and has no timeout. Newer distributions have another argument before `allow_headerless`, so pass that one
    by keyword.
    """

    def __init__(
        self, fs: Sequence[SimpleFilter], queue_size: int, slop: float, allow_headerless: bool = False
    ) -> None:
        super().__init__(fs, queue_size)
        self.slop = Duration(seconds=slop)
        self.allow_headerless = allow_headerless

    def add(self, msg: Any, my_queue: Queue, my_queue_index: int | None = None) -> None:
        """Store a message of one input and forward the set that it completes, if any."""
        time = message_stamp(msg, self.allow_headerless, "message_filters_approx")
        if time is None:
            return
        stamp = time.nanoseconds
        with self.lock:
            self._store(my_queue, stamp, msg)
            matched = self._match(stamp, my_queue_index)
            if matched is not None:
                pairs = zip(self.queues, matched, strict=True)
                self.signalMessage(*(queue.pop(matching) for queue, matching in pairs))

    def _match(self, stamp: int, index: int | None) -> list[int] | None:
        """Return the set that the new message at `stamp` of input `index` completes: one stamp per input."""
        candidates: list[list[int]] = []
        for position, queue in enumerate(self.queues):
            if position == index:
                # A message older than all others of a full queue has already been dropped.
                nearest = [stamp] if stamp in queue else []
            else:
                near = (other for other in queue if abs(other - stamp) <= self.slop.nanoseconds)
                nearest = sorted(near, key=lambda other: abs(other - stamp))
            if not nearest:
                return None
            candidates.append(nearest)
        return _first_within(candidates, self.slop.nanoseconds, [])


def _first_within(candidates: list[list[int]], slop: int, chosen: list[int]) -> list[int] | None:
    """Return the lexicographically first choice of one candidate per input that spans less than `slop`.

    The depth-first search prunes branches that already span too much, so it does not try the full product of
    long queues.
    """
    if len(chosen) == len(candidates):
        return chosen
    for candidate in candidates[len(chosen)]:
        extended = [*chosen, candidate]
        if max(extended) - min(extended) < slop:
            found = _first_within(candidates, slop, extended)
            if found is not None:
                return found
    return None
