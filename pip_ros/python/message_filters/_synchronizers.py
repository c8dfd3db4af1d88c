# SPDX-License-Identifier: Apache-2.0
"""Sets of messages, one from each input, that were stamped at the same or nearly the same time.

Queues: one dict per input, from stamp in nanoseconds to message. Callbacks run inside the synchronizer's
lock, as in the genuine package: they must not feed the same synchronizer. Here an exception in a callback
leaves the lock free.
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
    """Signals `callback(message_1, ..., message_N)` once all N inputs hold a message of the same stamp.

    Each input holds at most `queue_size` messages; the one with the smallest stamp leaves first.
    """

    def __init__(self, fs: Sequence[SimpleFilter], queue_size: int) -> None:
        super().__init__()
        self.queue_size = queue_size
        self.lock = threading.Lock()
        self.connectInput(fs)

    def connectInput(self, fs: Sequence[SimpleFilter]) -> None:
        """Take messages from the filters `fs`; their order is that of the callback's arguments."""
        self.queues: list[Queue] = [{} for _ in fs]
        self.input_connections = [
            source.registerCallback(self.add, queue, index)
            for index, (source, queue) in enumerate(zip(fs, self.queues, strict=True))
        ]

    def add(self, msg: Any, my_queue: Queue, my_queue_index: int | None = None) -> None:
        """Store `msg` of one input and signal every set that it completes, oldest first."""
        with self.lock:
            self._store(my_queue, Time.from_msg(msg.header.stamp).nanoseconds, msg)
            for stamp in sorted(set(self.queues[0]).intersection(*self.queues[1:])):
                self.signalMessage(*(queue.pop(stamp) for queue in self.queues))

    def _store(self, queue: Queue, stamp: int, msg: Any) -> None:
        queue[stamp] = msg
        while len(queue) > self.queue_size:
            del queue[min(queue)]


class ApproximateTimeSynchronizer(TimeSynchronizer):
    """Signals sets of N messages whose stamps are less than `slop` seconds apart.

    A new message is matched at once with messages of the other inputs at most `slop` away from it, the
    nearest first, and the first set whose earliest and latest stamp are less than `slop` apart wins. `slop`
    itself is thus too far for the set: inputs that are exactly 0.1 s apart need more than 0.1. There is no
    waiting for a better match and no timeout. Newer distributions have a further argument before
    `allow_headerless`: pass that by keyword.
    """

    def __init__(
        self, fs: Sequence[SimpleFilter], queue_size: int, slop: float, allow_headerless: bool = False
    ) -> None:
        super().__init__(fs, queue_size)
        self.slop = Duration(seconds=slop)
        self.allow_headerless = allow_headerless

    def add(self, msg: Any, my_queue: Queue, my_queue_index: int | None = None) -> None:
        """Store `msg` of one input and signal the set that it completes, if it does."""
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
        """The set that a new message at `stamp` of input `index` completes, as one stamp for each input."""
        candidates: list[list[int]] = []
        for position, queue in enumerate(self.queues):
            if position == index:
                # A message older than all of a full queue has already left it again.
                nearest = [stamp] if stamp in queue else []
            else:
                near = (other for other in queue if abs(other - stamp) <= self.slop.nanoseconds)
                nearest = sorted(near, key=lambda other: abs(other - stamp))
            if not nearest:
                return None
            candidates.append(nearest)
        return _first_within(candidates, self.slop.nanoseconds, [])


def _first_within(candidates: list[list[int]], slop: int, chosen: list[int]) -> list[int] | None:
    """The first choice of one candidate each, in lexical order, that spans less than `slop`.

    A depth-first search: branches that already span too much are cut, so that long queues don't cost their
    product.
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
