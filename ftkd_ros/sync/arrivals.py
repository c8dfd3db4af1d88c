# SPDX-License-Identifier: Apache-2.0
"""Images that are decoded and scaled when they arrive, before their round is complete.

The newest images of each camera have slots. An image that is not in a slot when its round is built (because
it is older, or was never added) is decoded then, with the same result.
"""

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any, Final, Generic, TypeVar

T = TypeVar("T")

SLOTS: Final = 2
"""Images per camera: that of the round that is being collected, and that of the next one."""


class ArrivingImages(Generic[T]):
    """`add` starts `decode(camera, message)` on a pool; `take` returns its future.

    add is called on the executor's thread, take on the inference thread. Newer images of a camera replace
    older ones, so at most SLOTS per camera are held. An image may be taken for several rounds.
    """

    def __init__(self, pool: Executor, decode: Callable[[int, Any], T], cameras: int) -> None:
        self._pool, self._decode = pool, decode
        self._slots: list[deque[tuple[Any, Future[T]]]] = [deque() for _ in range(cameras)]
        self._lock = threading.Lock()

    def add(self, camera: int, message: Any) -> None:
        """Start to decode an image that has just arrived."""
        with self._lock:
            slots = self._slots[camera]
            while len(slots) >= SLOTS:
                slots.popleft()[1].cancel()
            slots.append((message, self._pool.submit(self._decode, camera, message)))

    def take(self, camera: int, message: Any) -> "Future[T]":
        """Return the future of an image; one that was not added, or was dropped, is started now."""
        with self._lock:
            for held, future in self._slots[camera]:
                if held is message:
                    return future
        return self._pool.submit(self._decode, camera, message)

    def clear(self) -> None:
        """Drop all images."""
        with self._lock:
            for slots in self._slots:
                while slots:
                    slots.popleft()[1].cancel()
