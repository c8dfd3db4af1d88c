# SPDX-License-Identifier: Apache-2.0
"""Output topics of the detector node. Markers and images are computed only if a topic has a subscriber."""

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from rclpy.lifecycle import LifecycleNode
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import CompressedImage, Image, PointCloud2
from vision_msgs.msg import Detection3DArray, LabelInfo
from visualization_msgs.msg import MarkerArray

from ftkd_core.duplicates import without_duplicates
from ftkd_core.types import CameraRound, ObjectList
from ftkd_core.visualization import draw_bird_eye, draw_surround
from ftkd_ros.convert.cv_bridge_images import load_cv_bridge
from ftkd_ros.convert.images import encode_jpeg
from ftkd_ros.convert.markers import objects_to_markers
from ftkd_ros.convert.message_factory import RCLPY
from ftkd_ros.convert.to_ros import (
    compressed_image,
    label_info,
    make_header,
    objects_to_detections,
    objects_to_velocities,
    rgb_to_image,
)
from ftkd_ros.node.output_selection import select_output
from ftkd_ros.node.parameters import DetectorParameters

LATCHED: Final = QoSProfile(
    depth=1, reliability=ReliabilityPolicy.RELIABLE, durability=DurabilityPolicy.TRANSIENT_LOCAL
)
_JPEG_QUALITY: Final = 80


class ResultPublishers:
    """Publishers of one node below `/detections`. `publish` may run on any thread, but not concurrently."""

    def __init__(
        self,
        node: LifecycleNode,
        parameters: DetectorParameters,
        channels: tuple[str, ...],
        recommended_thresholds: Mapping[str, float],
    ) -> None:
        self._node = node
        self.parameters = parameters  # replaced when a parameter of RUN_TIME changes
        names = [camera.upper() for camera in parameters.cameras]
        self._channels = (*names, *(f"NO CAMERA {index}" for index in range(len(names), len(channels))))
        self._recommended = dict(recommended_thresholds)
        self._publishers: list[Any] = []
        self._detections = self._create(Detection3DArray, "detections", 10)
        self._velocities = self._create(PointCloud2, "detections/velocities", 10)
        self._labels = self._create(LabelInfo, "detections/label_info", LATCHED)
        self._markers: Any = None
        if parameters.publish_markers:
            self._markers = self._create(MarkerArray, "detections/markers", 2)
        self._bird_eye: Any = None
        self._surround: Any = None
        self._surround_jpeg: Any = None
        if parameters.publish_images:
            self._bird_eye = self._create(Image, "detections/bird_eye", 2)
            self._surround = self._create(Image, "detections/surround", 2)
            self._surround_jpeg = self._create(CompressedImage, "detections/surround/compressed", 2)

    def _create(self, message_type: Any, topic: str, qos: Any) -> Any:
        self._publishers.append(self._node.create_lifecycle_publisher(message_type, topic, qos))
        return self._publishers[-1]

    def close(self) -> None:
        """Destroy the publishers."""
        while self._publishers:
            self._node.destroy_lifecycle_publisher(self._publishers.pop())

    def publish_labels(self, stamp_ns: int) -> None:
        """Publish the class names once; the topic is latched for late subscribers."""
        parameters = self.parameters
        threshold = min(parameters.class_thresholds(self._recommended).values())
        self._labels.publish(label_info(RCLPY, parameters.base_frame, threshold, stamp_ns))

    def publish(self, objects: ObjectList, camera_round: CameraRound) -> None:
        """Publish velocities and detections first, because control may depend on them, then the
        visualization, without boxes that lie on a stronger one.

        Velocities precede the detections, so that a subscriber to both has them when the detections arrive.
        """
        parameters = self.parameters
        objects = select_output(objects, parameters, self._recommended)
        self._velocities.publish(objects_to_velocities(RCLPY, objects, parameters.base_frame))
        self._detections.publish(objects_to_detections(RCLPY, objects, parameters.base_frame))
        shown = without_duplicates(objects.select(np.isfinite(objects.boxes[:, :7]).all(axis=1)))
        self._publish_markers(shown)
        self._publish_pictures(shown, camera_round)

    def _publish_markers(self, shown: ObjectList) -> None:
        parameters = self.parameters
        if _has_subscriber(self._markers):
            markers = objects_to_markers(
                shown,
                parameters.base_frame,
                lifetime_s=parameters.marker_lifetime_s,
                min_score=parameters.marker_min_score,
            )
            self._markers.publish(markers)

    def _publish_pictures(self, shown: ObjectList, camera_round: CameraRound) -> None:
        frame, min_score = self.parameters.base_frame, self.parameters.marker_min_score
        if _has_subscriber(self._bird_eye):
            picture = draw_bird_eye(shown, min_score=min_score)
            self._bird_eye.publish(make_image(picture, shown.stamp_ns, frame))
        raw, jpeg = _has_subscriber(self._surround), _has_subscriber(self._surround_jpeg)
        if raw or jpeg:
            picture = draw_surround(camera_round, shown, min_score=min_score, channels=self._channels)
            if raw:
                self._surround.publish(make_image(picture, shown.stamp_ns, frame))
            if jpeg:
                content = encode_jpeg(picture, _JPEG_QUALITY)
                self._surround_jpeg.publish(compressed_image(RCLPY, content, shown.stamp_ns, frame))


def make_image(picture: NDArray[np.uint8], stamp_ns: int, frame_id: str) -> Any:
    """Return the sensor_msgs/Image (rgb8) of pixels (H, W, 3), created by cv_bridge if it can be used."""
    try:
        bridge = load_cv_bridge()
    except ImportError:
        return rgb_to_image(RCLPY, picture, stamp_ns, frame_id)
    message = bridge.cv2_to_imgmsg(np.ascontiguousarray(picture), encoding="rgb8")
    message.header = make_header(RCLPY, stamp_ns, frame_id)
    return message


def _has_subscriber(publisher: Any) -> bool:
    return publisher is not None and publisher.get_subscription_count() > 0
