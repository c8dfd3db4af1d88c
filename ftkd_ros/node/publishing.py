# SPDX-License-Identifier: Apache-2.0
"""The detector's output topics; nothing is computed for a picture that nobody looks at."""

from typing import Any, Final

from rclpy.lifecycle import LifecycleNode
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import Image, PointCloud2
from vision_msgs.msg import Detection3DArray, LabelInfo
from visualization_msgs.msg import MarkerArray

from ftkd_core.types import CameraRound, ObjectList
from ftkd_core.visualization import draw_bird_eye, draw_surround
from ftkd_ros.convert.markers import objects_to_markers
from ftkd_ros.convert.to_ros import label_info, objects_to_detections, objects_to_velocities, rgb_to_image
from ftkd_ros.node.parameters import DetectorParameters

LATCHED: Final = QoSProfile(
    depth=1, reliability=ReliabilityPolicy.RELIABLE, durability=DurabilityPolicy.TRANSIENT_LOCAL
)


class ResultPublishers:
    """Publishers below `/detections` of one node; `publish` may be called from any thread, one at a time."""

    def __init__(
        self, node: LifecycleNode, parameters: DetectorParameters, channels: tuple[str, ...]
    ) -> None:
        self._node = node
        self._parameters = parameters
        self._channels = channels
        self._topics: list[Any] = []
        self._detections = self._create(Detection3DArray, "detections", 10)
        self._velocities = self._create(PointCloud2, "detections/velocities", 10)
        self._labels = self._create(LabelInfo, "detections/label_info", LATCHED)
        self._markers: Any = None
        if parameters.publish_markers:
            self._markers = self._create(MarkerArray, "detections/markers", 2)
        self._bird_eye: Any = None
        self._surround: Any = None
        if parameters.publish_images:
            self._bird_eye = self._create(Image, "detections/bird_eye", 2)
            self._surround = self._create(Image, "detections/surround", 2)

    def _create(self, message_type: Any, topic: str, qos: Any) -> Any:
        self._topics.append(self._node.create_lifecycle_publisher(message_type, topic, qos))
        return self._topics[-1]

    def close(self) -> None:
        """Remove the topics."""
        while self._topics:
            self._node.destroy_lifecycle_publisher(self._topics.pop())

    def publish_labels(self, stamp_ns: int) -> None:
        """The class names, once; latecomers get them as well."""
        parameters = self._parameters
        self._labels.publish(label_info(parameters.base_frame, parameters.score_threshold, stamp_ns))

    def publish(self, objects: ObjectList, camera_round: CameraRound) -> None:
        """Detections and velocities first, since somebody may drive by them; then what people look at."""
        parameters = self._parameters
        # A consumer that joins both finds the velocities waiting when the detections arrive.
        self._velocities.publish(objects_to_velocities(objects, parameters.base_frame))
        self._detections.publish(objects_to_detections(objects, parameters.base_frame))
        if self._is_wanted(self._markers):
            self._markers.publish(
                objects_to_markers(
                    objects,
                    parameters.base_frame,
                    lifetime_s=parameters.marker_lifetime_s,
                    min_score=parameters.marker_min_score,
                )
            )
        if self._is_wanted(self._bird_eye):
            picture = draw_bird_eye(objects, min_score=parameters.marker_min_score)
            self._bird_eye.publish(rgb_to_image(picture, objects.stamp_ns, parameters.base_frame))
        if self._is_wanted(self._surround):
            picture = draw_surround(
                camera_round, objects, min_score=parameters.marker_min_score, channels=self._channels
            )
            self._surround.publish(rgb_to_image(picture, objects.stamp_ns, parameters.base_frame))

    def _is_wanted(self, publisher: Any) -> bool:
        return publisher is not None and publisher.get_subscription_count() > 0
