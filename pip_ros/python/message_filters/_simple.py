# SPDX-License-Identifier: Apache-2.0
"""Base class of filters, and a subscription as a filter."""

from collections.abc import Callable
from typing import Any

from rclpy.node import Node
from rclpy.qos import QoSProfile


class SimpleFilter:
    """Base class: calls the registered callbacks with each output message."""

    def __init__(self) -> None:
        self.callbacks: dict[int, tuple[Callable[..., Any], tuple[Any, ...]]] = {}

    def registerCallback(self, cb: Callable[..., Any], *args: Any) -> int:
        """Call `cb(*messages, *args)` for every output; return the number of the connection."""
        connection = len(self.callbacks)
        self.callbacks[connection] = (cb, args)
        return connection

    def signalMessage(self, *msg: Any) -> None:
        """Call every registered callback with `msg`, in order of registration, in the caller's thread."""
        for callback, arguments in self.callbacks.values():
            callback(*msg, *arguments)


class Subscriber(SimpleFilter):
    """A subscription as a filter.

    Takes the arguments of `Node.create_subscription` except the callback. `qos_profile` (a profile or a
    depth; default: reliable, depth 10), `callback_group`, `event_callbacks`, `qos_overriding_options` and
    `raw` are keyword arguments. The first three are positional-only, as in the original class. Missing
    attributes are looked up in `sub`.
    """

    def __init__(
        self, node: Node, msg_type: Any, topic: str, /, *, qos_profile: QoSProfile | int = 10, **kwargs: Any
    ) -> None:
        super().__init__()
        self.node = node
        self.topic = topic
        self.sub = node.create_subscription(msg_type, topic, self.callback, qos_profile=qos_profile, **kwargs)

    def callback(self, msg: Any) -> None:
        """Forward one message of the topic (bytes if the subscription is raw)."""
        self.signalMessage(msg)

    def getTopic(self) -> str:
        """Return the topic name as given, before remapping and namespaces."""
        return self.topic

    def __getattr__(self, key: str) -> Any:
        # Called only for missing attributes; `sub` is missing if create_subscription raised an exception.
        if key == "sub":
            raise AttributeError(key)
        return getattr(self.sub, key)
