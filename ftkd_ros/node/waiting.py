# SPDX-License-Identifier: Apache-2.0
"""RoundQueue: rounds between synchronizer and inference thread, which may wait for late transforms."""

import threading
import time
from collections.abc import Callable
from typing import Final, Generic, TypeVar

T = TypeVar("T")

CAPACITY: Final = 8
"""Rounds that wait for transforms at the same time; a round holds the images of all cameras."""
_POLL_S: Final = 0.004


class RoundQueue(Generic[T]):
    """Holds rounds until they are ready. `put` never blocks; `get` blocks until an item or `close`.

    Of the ready items, `get` returns the newest; older ones are overwritten. So a slow detector processes the
    newest images, and transforms that are late delay all rounds equally instead of dropping some. An item
    that is not ready after `timeout_s` is returned as it is.
    """

    def __init__(self, is_ready: Callable[[T], bool] = lambda _: True, timeout_s: float = 0.0) -> None:
        self._is_ready = is_ready
        self._timeout_s = timeout_s
        self._condition = threading.Condition()
        self._items: list[tuple[T, float]] = []  # item, monotonic time until which it waits
        self._closed = False

    def put(self, item: T) -> int:
        """Store an item. Returns the number of items that are overwritten; of a closed queue, the item."""
        until = time.monotonic() + self._timeout_s
        ready = self._is_ready(item)
        with self._condition:
            if self._closed:
                return 1
            kept = [] if ready else self._items[-CAPACITY + 1 :]
            overwritten = len(self._items) - len(kept)
            self._items = [*kept, (item, until)]
            self._condition.notify()
            return overwritten

    def get(self) -> tuple[T, int] | None:
        """Wait; return an item and the number of older items that it overwrites; None after `close`."""
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._items or self._closed)
                candidates = list(self._items)
            if not candidates:
                return None
            chosen = self._choose(candidates)  # without the lock, because it asks tf
            with self._condition:
                waiting = [index for index, (item, _) in enumerate(self._items) if item is chosen]
                if waiting and chosen is not None:
                    self._items = self._items[waiting[0] + 1 :]
                    return chosen, waiting[0]
                if chosen is None:
                    self._condition.wait(_POLL_S)

    @property
    def has_ready(self) -> bool:
        """Whether an item waits only because nobody takes it."""
        with self._condition:
            items = [item for item, _ in self._items]
        return any(self._is_ready(item) for item in items)

    def close(self) -> int:
        """Wake all waiting threads. Returns the number of items that are discarded."""
        with self._condition:
            left = 0 if self._closed else len(self._items)
            self._closed, self._items = True, []
            self._condition.notify_all()
            return left

    def _choose(self, candidates: list[tuple[T, float]]) -> T | None:
        """Return the newest ready item, or the oldest that has waited long enough."""
        for item, _ in reversed(candidates):
            if self._is_ready(item):
                return item
        item, until = candidates[0]
        return item if time.monotonic() >= until else None
