# SPDX-License-Identifier: Apache-2.0
"""Broadcaster of static transforms, also for late subscribers."""

from collections.abc import Iterable

from geometry_msgs.msg import TransformStamped
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, HistoryPolicy, QoSProfile
from tf2_msgs.msg import TFMessage

from .transform_broadcaster import as_list


class StaticTransformBroadcaster:
    """Publishes on `/tf_static`, latched.

    Late subscribers receive only the last message, so each message repeats all earlier transforms. A newer
    transform replaces an older one of the same child frame.
    """

    def __init__(self, node: Node, qos: QoSProfile | int | None = None) -> None:
        if qos is None:
            qos = QoSProfile(
                depth=1, history=HistoryPolicy.KEEP_LAST, durability=DurabilityPolicy.TRANSIENT_LOCAL
            )
        self.pub_tf = node.create_publisher(TFMessage, "/tf_static", qos)
        self._by_child: dict[str, TransformStamped] = {}

    def sendTransform(self, transform: TransformStamped | Iterable[TransformStamped]) -> None:
        """Add one or more transforms and publish all of them."""
        self._by_child.update((one.child_frame_id, one) for one in as_list(transform))
        self.pub_tf.publish(TFMessage(transforms=list(self._by_child.values())))
