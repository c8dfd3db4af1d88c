# SPDX-License-Identifier: Apache-2.0
"""Publishes transforms that never change, for those who join later as well."""

from collections.abc import Iterable

from geometry_msgs.msg import TransformStamped
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, HistoryPolicy, QoSProfile
from tf2_msgs.msg import TFMessage

from .transform_broadcaster import as_list


class StaticTransformBroadcaster:
    """Publishes on `/tf_static`, latched.

    Only the last message is kept for late subscribers, so each one repeats all that was sent before; of two
    transforms of the same child frame the newer one counts.
    """

    def __init__(self, node: Node, qos: QoSProfile | int | None = None) -> None:
        if qos is None:
            qos = QoSProfile(
                depth=1, history=HistoryPolicy.KEEP_LAST, durability=DurabilityPolicy.TRANSIENT_LOCAL
            )
        self.pub_tf = node.create_publisher(TFMessage, "/tf_static", qos)
        self._by_child: dict[str, TransformStamped] = {}

    def sendTransform(self, transform: TransformStamped | Iterable[TransformStamped]) -> None:
        """Add one transform or several and publish all that are known."""
        self._by_child.update((one.child_frame_id, one) for one in as_list(transform))
        self.pub_tf.publish(TFMessage(transforms=list(self._by_child.values())))
