# SPDX-License-Identifier: Apache-2.0
"""Topics and messages that are to be written to a bag."""

from collections.abc import Callable
from typing import Any, NamedTuple


class Topic(NamedTuple):
    """A topic of a bag to write."""

    name: str
    message_type: str
    depth: int = 10
    latched: bool = False


class Event(NamedTuple):
    """A message to write: log time, rank among messages of equal time, topic, and the function that
    builds it, as a message or as serialized bytes."""

    stamp_ns: int
    rank: int
    topic: str
    build: Callable[[], Any]
