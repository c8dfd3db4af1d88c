# SPDX-License-Identifier: Apache-2.0
"""The start of every chain of filters: callbacks to signal, and a subscription's messages as signals."""

from collections.abc import Callable
from typing import Any

from rclpy.node import Node
from rclpy.qos import QoSProfile


class SimpleFilter:
    """A filter's output: whoever registers a callback gets every message the filter signals."""

    def __init__(self) -> None:
        self.callbacks: dict[int, tuple[Callable[..., Any], tuple[Any, ...]]] = {}

    def registerCallback(self, cb: Callable[..., Any], *args: Any) -> int:
        """Call `cb(*messages, *args)` at every output; returns the connection's number."""
        connection = len(self.callbacks)
        self.callbacks[connection] = (cb, args)
        return connection

    def signalMessage(self, *msg: Any) -> None:
        """Hand `msg` to every registered callback, in their order, in the caller's thread."""
        for callback, arguments in self.callbacks.values():
            callback(*msg, *arguments)


class Subscriber(SimpleFilter):
    """A subscription as a filter.

    Takes what `Node.create_subscription` takes, less the callback: `qos_profile` (a profile or a depth;
    reliable with depth 10 unless told), `callback_group`, `event_callbacks`, `qos_overriding_options`, `raw`,
    ... by keyword. The first three arguments go by position, as the genuine class demands. Attributes that it
    lacks are looked up in `sub`.
    """

    def __init__(
        self, node: Node, msg_type: Any, topic: str, /, *, qos_profile: QoSProfile | int = 10, **kwargs: Any
    ) -> None:
        super().__init__()
        self.node = node
        self.topic = topic
        self.sub = node.create_subscription(msg_type, topic, self.callback, qos_profile=qos_profile, **kwargs)

    def callback(self, msg: Any) -> None:
        """Pass on one message of the topic (bytes where the subscription is raw)."""
        self.signalMessage(msg)

    def getTopic(self) -> str:
        """The topic's name as it was given, before any remapping or name space."""
        return self.topic

    def __getattr__(self, key: str) -> Any:
        # Reached only for names that the filter lacks; `sub` is one where create_subscription raised.
        if key == "sub":
            raise AttributeError(key)
        return getattr(self.sub, key)
