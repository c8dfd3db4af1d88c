# SPDX-License-Identifier: Apache-2.0
"""Arrays -> messages, for rclpy and for `rosbags`.

Each function takes a message factory first: `RCLPY` for messages that a node publishes, `ROSBAGS` for
messages that are written to a bag. Stamps are int nanoseconds; transforms are (4, 4) matrices. This module
imports no ROS package.
"""

import json
import struct
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from ftkd_core.classes import CLASS_NAMES
from ftkd_core.geometry import make_transform, rotation_to_quaternion
from ftkd_core.lens import Lens
from ftkd_core.types import ObjectList
from ftkd_ros.convert.from_ros import FLOAT32, VELOCITY_FIELDS
from ftkd_ros.convert.message_factory import MessageFactory

Matrix = NDArray[np.float64]

_POINT_TYPES: Final = {"i1": 1, "u1": 2, "i2": 3, "u2": 4, "i4": 5, "u4": 6, "f4": 7, "f8": 8}
"""sensor_msgs/PointField.datatype by numpy type."""


# -- headers and geometry ------------------------------------------------------------------------------------


def make_header(messages: MessageFactory, stamp_ns: int, frame_id: str) -> Any:
    """Return a std_msgs/Header. Raises ValueError for a stamp that int32 seconds cannot represent."""
    seconds, nanoseconds = divmod(int(stamp_ns), 1_000_000_000)
    if not -(2**31) <= seconds < 2**31:
        raise ValueError(f"stamp of {stamp_ns} ns does not fit a ROS time; expected seconds of 32 bits")
    header = messages.new("std_msgs/msg/Header")
    header.stamp.sec, header.stamp.nanosec = seconds, nanoseconds
    header.frame_id = frame_id
    return header


def make_transforms(
    messages: MessageFactory, stamp_ns: int, frame_id: str, children: Mapping[str, Matrix]
) -> Any:
    """Return a tf2_msgs/TFMessage from frame_from_child matrices by name of the child frame."""
    tf_message = messages.new("tf2_msgs/msg/TFMessage")
    for child, frame_from_child in children.items():
        stamped = messages.new("geometry_msgs/msg/TransformStamped")
        stamped.header = make_header(messages, stamp_ns, frame_id)
        stamped.child_frame_id = child
        _set_xyz(stamped.transform.translation, frame_from_child[:3, 3])
        _set_rotation(stamped.transform.rotation, frame_from_child)
        tf_message.transforms.append(stamped)
    return tf_message


def make_odometry(
    messages: MessageFactory,
    stamp_ns: int,
    frame_id: str,
    child: str,
    frame_from_child: Matrix,
    linear: Matrix,
    angular: Matrix,
) -> Any:
    """Return a nav_msgs/Odometry.

    linear (3,) in m/s and angular (3,) in rad/s are in the child frame. Covariances are zero, which ROS
    defines as unknown.
    """
    odometry = messages.new("nav_msgs/msg/Odometry")
    odometry.header = make_header(messages, stamp_ns, frame_id)
    odometry.child_frame_id = child
    _set_xyz(odometry.pose.pose.position, frame_from_child[:3, 3])
    _set_rotation(odometry.pose.pose.orientation, frame_from_child)
    _set_xyz(odometry.twist.twist.linear, linear)
    _set_xyz(odometry.twist.twist.angular, angular)
    return odometry


def box_pose(messages: MessageFactory, center: list[float], quaternion: list[float]) -> Any:
    """Return the geometry_msgs/Pose of a box from its center (x, y, z) and its quaternion (x, y, z, w)."""
    pose = messages.new("geometry_msgs/msg/Pose")
    position, orientation = pose.position, pose.orientation
    position.x, position.y, position.z = center
    orientation.x, orientation.y, orientation.z, orientation.w = quaternion
    return pose


def yaw_quaternions(yaws: Matrix) -> list[list[float]]:
    """Return quaternions (x, y, z, w) of rotations about z by yaws (N,) in radians."""
    if len(yaws) == 0:  # older SciPy versions refuse an empty array
        return []
    quaternions: list[list[float]] = Rotation.from_euler("z", yaws[:, None]).as_quat().tolist()
    return quaternions


def _set_xyz(target: Any, values: Matrix) -> None:
    target.x, target.y, target.z = (float(value) for value in values)


def _set_rotation(target: Any, transform: Matrix) -> None:
    rotation = np.ascontiguousarray(transform[:3, :3])
    target.w, target.x, target.y, target.z = _quaternion(rotation.tobytes())


@lru_cache(maxsize=64)
def _quaternion(rotation: bytes) -> tuple[float, ...]:
    """Return (w, x, y, z) of a rotation matrix of float64; a pose is written to several topics."""
    matrix = np.frombuffer(rotation, dtype=np.float64).reshape(3, 3)
    return tuple(float(value) for value in rotation_to_quaternion(matrix))


# -- detections ----------------------------------------------------------------------------------------------


def objects_to_detections(messages: MessageFactory, objects: ObjectList, frame_id: str) -> Any:
    """Return a vision_msgs/Detection3DArray with one result per detection.

    class_id is the class name, bbox.size.x the length, and id the entry of `objects.ids`. `frame_id` is the
    frame of the boxes (base_link). The message has no field for velocity; see `objects_to_velocities`.
    """
    header = make_header(messages, objects.stamp_ns, frame_id)
    array = messages.new("vision_msgs/msg/Detection3DArray")
    array.header = header
    array.detections = [
        _detection(messages, header, box, quaternion, CLASS_NAMES[label], score, identity)
        for box, quaternion, label, score, identity in zip(
            objects.boxes[:, :6].tolist(),
            yaw_quaternions(objects.boxes[:, 6]),
            objects.labels.tolist(),
            objects.scores.tolist(),
            objects.ids or ("",) * len(objects.boxes),
            strict=True,
        )
    ]
    return array


def _detection(
    messages: MessageFactory,
    header: Any,
    box: list[float],
    quaternion: list[float],
    class_name: str,
    score: float,
    identity: str,
) -> Any:
    pose = box_pose(messages, box[:3], quaternion)
    result = messages.new("vision_msgs/msg/ObjectHypothesisWithPose")
    result.hypothesis.class_id, result.hypothesis.score = class_name, score
    result.pose.pose = pose
    detection = messages.new("vision_msgs/msg/Detection3D")
    detection.header, detection.results, detection.id = header, [result], identity
    detection.bbox.center = pose
    size = detection.bbox.size
    size.x, size.y, size.z = box[3:6]
    return detection


def objects_to_velocities(messages: MessageFactory, objects: ObjectList, frame_id: str) -> Any:
    """Return a sensor_msgs/PointCloud2 with float32 fields x y z vx vy vz; point i belongs to detection i.

    vz is 0. Unknown velocities are nan, and `is_dense` is True if there are none. Stamp and frame equal those
    of the detections.
    """
    count, point_step = len(objects.boxes), 4 * len(VELOCITY_FIELDS)
    points = np.zeros((count, len(VELOCITY_FIELDS)), dtype="<f4")
    points[:, :3] = objects.boxes[:, :3]
    points[:, 3:5] = objects.boxes[:, 7:9]
    cloud = messages.new("sensor_msgs/msg/PointCloud2")
    cloud.header = make_header(messages, objects.stamp_ns, frame_id)
    cloud.height, cloud.width = 1, count
    for index, name in enumerate(VELOCITY_FIELDS):
        point_field = messages.new("sensor_msgs/msg/PointField")
        point_field.name, point_field.offset = name, 4 * index
        point_field.datatype, point_field.count = FLOAT32, 1
        cloud.fields.append(point_field)
    cloud.point_step, cloud.row_step = point_step, point_step * count
    cloud.is_dense = bool(np.isfinite(points).all())
    cloud.data = messages.sequence(points.reshape(-1).view(np.uint8))
    return cloud


def make_text(messages: MessageFactory, value: Any) -> Any:
    """Return a std_msgs/String with a JSON value."""
    message = messages.new("std_msgs/msg/String")
    message.data = json.dumps(value, ensure_ascii=False)
    return message


def make_annotations(messages: MessageFactory, stamp_ns: int, objects: Sequence[Mapping[str, Any]]) -> Any:
    """Return a std_msgs/String with facts about the objects of a Detection3DArray of the same stamp, in its
    order: at least `id` and `attribute` of each."""
    return make_text(messages, {"stamp_ns": stamp_ns, "objects": list(objects)})


def make_imu(
    messages: MessageFactory,
    stamp_ns: int,
    frame_id: str,
    orientation: Sequence[float],
    acceleration: Matrix,
    rate: Matrix,
) -> Any:
    """Return a sensor_msgs/Imu. orientation (w, x, y, z); acceleration (3,) in m/s^2; rate (3,) in rad/s."""
    imu = messages.new("sensor_msgs/msg/Imu")
    imu.header = make_header(messages, stamp_ns, frame_id)
    _set_rotation(imu.orientation, make_transform(list(orientation)))
    _set_xyz(imu.linear_acceleration, acceleration)
    _set_xyz(imu.angular_velocity, rate)
    return imu


def occupancy_grid(
    messages: MessageFactory,
    values: NDArray[np.int8],
    cell_m: float,
    origin: Matrix,
    stamp_ns: int,
    frame_id: str,
) -> Any:
    """Return a nav_msgs/OccupancyGrid of values (rows, columns), row 0 at the bottom; origin (2,) in m."""
    grid = messages.new("nav_msgs/msg/OccupancyGrid")
    grid.header = make_header(messages, stamp_ns, frame_id)
    grid.info.map_load_time = grid.header.stamp
    grid.info.resolution = cell_m
    grid.info.height, grid.info.width = values.shape
    _set_xyz(grid.info.origin.position, np.array([*origin, 0.0]))
    grid.info.origin.orientation.w = 1.0
    grid.data = messages.sequence(np.ascontiguousarray(values).reshape(-1))
    return grid


def point_cloud(messages: MessageFactory, cloud: NDArray[Any], stamp_ns: int, frame_id: str) -> Any:
    """Return a sensor_msgs/PointCloud2 of a structured array (P,), with its fields and bytes."""
    message = messages.new("sensor_msgs/msg/PointCloud2")
    message.header = make_header(messages, stamp_ns, frame_id)
    message.height, message.width = 1, len(cloud)
    for name in cloud.dtype.names or ():
        point_field = messages.new("sensor_msgs/msg/PointField")
        kind, offset = cloud.dtype.fields[name][:2]  # type: ignore[index]  # structured, so it has fields
        point_field.name, point_field.offset = name, int(offset)
        point_field.datatype, point_field.count = _POINT_TYPES[kind.str[1:]], 1
        message.fields.append(point_field)
    message.point_step, message.row_step = cloud.dtype.itemsize, cloud.dtype.itemsize * len(cloud)
    message.is_dense = True
    message.data = messages.sequence(np.frombuffer(cloud.tobytes(), dtype=np.uint8))
    return message


def label_info(messages: MessageFactory, frame_id: str, threshold: float, stamp_ns: int = 0) -> Any:
    """Return a vision_msgs/LabelInfo with the class names by index and the detector's score threshold."""
    labels = messages.new("vision_msgs/msg/LabelInfo")
    labels.header = make_header(messages, stamp_ns, frame_id)
    labels.threshold = float(threshold)
    for index, name in enumerate(CLASS_NAMES):
        vision_class = messages.new("vision_msgs/msg/VisionClass")
        vision_class.class_id, vision_class.class_name = index, name
        labels.class_map.append(vision_class)
    return labels


# -- images and calibration ----------------------------------------------------------------------------------


def rgb_to_image(messages: MessageFactory, image: NDArray[np.uint8], stamp_ns: int, frame_id: str) -> Any:
    """Return a sensor_msgs/Image of encoding rgb8 from pixels (H, W, 3)."""
    height, width = image.shape[:2]
    message = messages.new("sensor_msgs/msg/Image")
    message.header = make_header(messages, stamp_ns, frame_id)
    message.height, message.width, message.step = height, width, 3 * width
    message.encoding = "rgb8"
    message.data = messages.sequence(np.ascontiguousarray(image).reshape(-1))
    return message


def compressed_image(
    messages: MessageFactory, content: bytes, stamp_ns: int, frame_id: str, image_format: str = "jpeg"
) -> Any:
    """Return a sensor_msgs/CompressedImage with the bytes of an image file, unchanged."""
    message = messages.new("sensor_msgs/msg/CompressedImage")
    message.header = make_header(messages, stamp_ns, frame_id)
    message.format = image_format
    message.data = messages.sequence(np.frombuffer(content, dtype=np.uint8))
    return message


def compressed_image_bytes(content: bytes, stamp_ns: int, frame_id: str, image_format: str = "jpeg") -> bytes:
    """Return the serialized message of `compressed_image` (CDR), with one copy of the content."""
    seconds, nanoseconds = divmod(stamp_ns, 1_000_000_000)
    parts = [b"\x00\x01\x00\x00", struct.pack("<iI", seconds, nanoseconds)]
    for text in (frame_id, image_format):
        encoded = text.encode() + b"\x00"
        parts.append(struct.pack("<I", len(encoded)) + encoded + bytes(-len(encoded) % 4))
    return b"".join([*parts, struct.pack("<I", len(content)), content])


def camera_info(
    messages: MessageFactory, intrinsics: Matrix, image_size: tuple[int, int], stamp_ns: int, frame_id: str,
    lens: Lens | None = None,
) -> Any:  # fmt: skip
    """Return the sensor_msgs/CameraInfo of a rectified camera, or of raw images with a lens.

    intrinsics (3, 3) are in pixels; image_size is (width, height).
    """
    projection = np.zeros((3, 4))
    projection[:, :3] = intrinsics
    info = messages.new("sensor_msgs/msg/CameraInfo")
    info.header = make_header(messages, stamp_ns, frame_id)
    info.width, info.height = image_size
    info.distortion_model = "plumb_bob" if lens is None else lens.model
    info.d = messages.sequence(np.zeros(5) if lens is None else np.array(lens.coefficients))
    info.k = np.asarray(intrinsics, dtype=np.float64).reshape(9)
    info.r = np.eye(3).reshape(9)
    info.p = projection.reshape(12)
    return info
