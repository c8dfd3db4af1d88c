# SPDX-License-Identifier: Apache-2.0
"""A ROS node in its own context for tests; imports nothing from this repository."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import rclpy
from rclpy.context import Context
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node

DOMAIN_ID = int(os.environ.get("ROS_DOMAIN_ID", "96"))


@dataclass
class SpinnableNode:
    """A node and its executor."""

    node: Node
    executor: SingleThreadedExecutor

    def spin_until(self, done: Callable[[], Any], timeout_s: float = 10.0) -> bool:
        """Run callbacks until `done` returns a true value; return False after the timeout."""
        deadline = time.monotonic() + timeout_s
        while not done() and time.monotonic() < deadline:
            self.executor.spin_once(timeout_sec=0.05)
        return bool(done())


@contextmanager
def spinnable_node(name: str) -> Iterator[SpinnableNode]:
    """Create a node in a new context and destroy both at the end."""
    context = Context()
    rclpy.init(context=context, domain_id=DOMAIN_ID)
    node = Node(name, context=context)
    executor = SingleThreadedExecutor(context=context)
    executor.add_node(node)
    try:
        yield SpinnableNode(node, executor)
    finally:
        executor.shutdown()
        node.destroy_node()
        rclpy.shutdown(context=context)
