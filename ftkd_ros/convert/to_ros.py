# SPDX-License-Identifier: Apache-2.0
"""Arrays -> ROS messages; the way back (`reading`, `images`, which need no ROS) is offered here as well."""

import array
from typing import Any

import numpy as np
from builtin_interfaces.msg import Time
from geometry_msgs.msg import Pose
from numpy.typing import NDArray
from sensor_msgs.msg import CompressedImage, Image, PointCloud2, PointField
from std_msgs.msg import Header
from vision_msgs.msg import Detection3D, Detection3DArray, LabelInfo, ObjectHypothesisWithPose, VisionClass

from ftkd_core.classes import CLASS_NAMES
from ftkd_core.types import ObjectList
from ftkd_ros.convert.from_ros import (
    VELOCITY_FIELDS,
    cloud_columns,
    detections_to_objects,
    stamp_to_ns,
    transform_to_matrix,
)
from ftkd_ros.convert.images import encode_jpeg, image_to_rgb

__all__ = [
    "cloud_columns",
    "detections_to_objects",
    "image_to_rgb",
    "label_info",
    "make_header",
    "ns_to_stamp",
    "objects_to_detections",
    "objects_to_velocities",
    "rgb_to_compressed",
    "rgb_to_image",
    "stamp_to_ns",
    "transform_to_matrix",
]


def ns_to_stamp(ns: int) -> Time:
    """builtin_interfaces/Time of nanoseconds; ValueError outside what its int32 seconds hold."""
    seconds, nanoseconds = divmod(int(ns), 1_000_000_000)
    if not -(2**31) <= seconds < 2**31:
        raise ValueError(f"stamp of {ns} ns does not fit a ROS time; expected seconds of 32 bits")
    return Time(sec=seconds, nanosec=nanoseconds)


def make_header(stamp_ns: int, frame_id: str) -> Header:
    """std_msgs/Header of nanoseconds and a frame."""
    return Header(stamp=ns_to_stamp(stamp_ns), frame_id=frame_id)


def objects_to_detections(objects: ObjectList, frame_id: str) -> Detection3DArray:
    """vision_msgs/Detection3DArray: class names as class_id, bbox.size.x the length, one result a detection,
    id from `ids`.

    `frame_id` is the frame the boxes are in (base_link). Velocity has no place in it: see
    `objects_to_velocities`.
    """
    header = make_header(objects.stamp_ns, frame_id)
    ids = objects.ids or ("",) * len(objects.boxes)
    message = Detection3DArray(header=header)
    message.detections = [
        _detection(header, box, score, label, identity)
        for box, score, label, identity in zip(
            objects.boxes.tolist(), objects.scores.tolist(), objects.labels.tolist(), ids, strict=True
        )
    ]
    return message


def _detection(header: Header, box: list[float], score: float, label: int, identity: str) -> Detection3D:
    pose = box_pose(box)
    result = ObjectHypothesisWithPose()
    result.hypothesis.class_id = CLASS_NAMES[label]
    result.hypothesis.score = score
    result.pose.pose = pose
    detection = Detection3D(header=header, results=[result], id=identity)
    detection.bbox.center = pose
    detection.bbox.size.x, detection.bbox.size.y, detection.bbox.size.z = box[3:6]
    return detection


def box_pose(box: list[float]) -> Pose:
    """geometry_msgs/Pose of a box [x, y, z, l, w, h, yaw, ...]."""
    pose = Pose()
    pose.position.x, pose.position.y, pose.position.z = box[:3]
    pose.orientation.z, pose.orientation.w = float(np.sin(box[6] / 2)), float(np.cos(box[6] / 2))
    return pose


def objects_to_velocities(objects: ObjectList, frame_id: str) -> PointCloud2:
    """sensor_msgs/PointCloud2 with float32 fields x y z vx vy vz; point i belongs to detection i of the same
    header.

    vz is 0; an unknown velocity is nan, so `is_dense` tells whether all are known.
    """
    count = len(objects.boxes)
    points = np.zeros((count, len(VELOCITY_FIELDS)), dtype="<f4")
    points[:, :3] = objects.boxes[:, :3]
    points[:, 3:5] = objects.boxes[:, 7:9]
    cloud = PointCloud2(
        header=make_header(objects.stamp_ns, frame_id), height=1, width=count, is_bigendian=False
    )
    cloud.fields = [
        PointField(name=name, offset=4 * index, datatype=PointField.FLOAT32, count=1)
        for index, name in enumerate(VELOCITY_FIELDS)
    ]
    cloud.point_step = 4 * len(VELOCITY_FIELDS)
    cloud.row_step = cloud.point_step * count
    cloud.is_dense = bool(np.isfinite(points).all())
    cloud.data = array.array("B", points.tobytes())
    return cloud


def label_info(frame_id: str, threshold: float, stamp_ns: int = 0) -> LabelInfo:
    """vision_msgs/LabelInfo: our classes by index and the score threshold of the detector."""
    message = LabelInfo(header=make_header(stamp_ns, frame_id), threshold=float(threshold))
    message.class_map = [
        VisionClass(class_id=index, class_name=name) for index, name in enumerate(CLASS_NAMES)
    ]
    return message


def rgb_to_image(image: NDArray[np.uint8], stamp_ns: int, frame_id: str) -> Image:
    """sensor_msgs/Image of encoding rgb8. The bytes go in as array.array: assigning `bytes` takes rclpy 100
    times longer.
    """
    height, width = image.shape[:2]
    message = Image(
        header=make_header(stamp_ns, frame_id), height=height, width=width, encoding="rgb8", step=3 * width
    )
    message.data = array.array("B", np.ascontiguousarray(image).tobytes())
    return message


def rgb_to_compressed(
    image: NDArray[np.uint8] | bytes, stamp_ns: int, frame_id: str, quality: int = 90
) -> CompressedImage:
    """sensor_msgs/CompressedImage of format jpeg, from pixels (H, W, 3) or from a JPEG file that is passed
    untouched.
    """
    content: Any = image if isinstance(image, bytes) else encode_jpeg(image, quality)
    message = CompressedImage(header=make_header(stamp_ns, frame_id), format="jpeg")
    message.data = array.array("B", content)
    return message
