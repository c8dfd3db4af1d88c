# SPDX-License-Identifier: Apache-2.0
"""Arrays -> messages of `rosbags`, for programs that write bags without ROS. `ftkd_ros.convert.to_ros` is the
twin for nodes.

Stamps are int nanoseconds; transforms `dst_from_src` are (4, 4).
"""

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from ftkd_core.classes import CLASS_NAMES
from ftkd_core.geometry import rotation_to_quaternion
from ftkd_core.types import ObjectList
from ftkd_ros.bag.message_definitions import message_types
from ftkd_ros.convert.from_ros import VELOCITY_FIELDS

Matrix = NDArray[np.float64]

_FLOAT32: Final = 7  # sensor_msgs/PointField.FLOAT32
_NO_COVARIANCE: Final = np.zeros(36)


def make(msgtype: str, **fields: Any) -> Any:
    """A message of a type such as "std_msgs/msg/Header"; every field is needed."""
    return message_types().types[msgtype](**fields)


def header(stamp_ns: int, frame_id: str) -> Any:
    """std_msgs/Header."""
    seconds, nanoseconds = divmod(stamp_ns, 1_000_000_000)
    stamp = make("builtin_interfaces/msg/Time", sec=seconds, nanosec=nanoseconds)
    return make("std_msgs/msg/Header", stamp=stamp, frame_id=frame_id)


def transforms(stamp_ns: int, frame_id: str, children: dict[str, Matrix]) -> Any:
    """tf2_msgs/TFMessage: by name of the child frame, its pose frame_from_child."""
    stamped = [
        make(
            "geometry_msgs/msg/TransformStamped",
            header=header(stamp_ns, frame_id),
            child_frame_id=child,
            transform=make(
                "geometry_msgs/msg/Transform",
                translation=_vector(matrix[:3, 3]),
                rotation=_quaternion(matrix[:3, :3]),
            ),
        )
        for child, matrix in children.items()
    ]
    return make("tf2_msgs/msg/TFMessage", transforms=stamped)


def odometry(stamp_ns: int, frame_id: str, child: str, pose: Matrix, linear: Matrix, angular: Matrix) -> Any:
    """nav_msgs/Odometry: pose frame_from_child; linear (3,) m/s and angular (3,) rad/s along the axes of the
    child.

    Covariances are zero, which ROS reads as unknown.
    """
    twist = make("geometry_msgs/msg/Twist", linear=_vector(linear), angular=_vector(angular))
    return make(
        "nav_msgs/msg/Odometry",
        header=header(stamp_ns, frame_id),
        child_frame_id=child,
        pose=_with_covariance(_pose(pose)),
        twist=make("geometry_msgs/msg/TwistWithCovariance", twist=twist, covariance=_NO_COVARIANCE),
    )


def compressed_image(stamp_ns: int, frame_id: str, content: bytes, image_format: str = "jpeg") -> Any:
    """sensor_msgs/CompressedImage of a file's bytes, untouched."""
    return make(
        "sensor_msgs/msg/CompressedImage",
        header=header(stamp_ns, frame_id),
        format=image_format,
        data=np.frombuffer(content, dtype=np.uint8),
    )


def camera_info(stamp_ns: int, frame_id: str, width: int, height: int, intrinsics: Matrix) -> Any:
    """sensor_msgs/CameraInfo of a rectified camera with intrinsics (3, 3) in pixels."""
    projection = np.zeros((3, 4))
    projection[:, :3] = intrinsics
    whole_image = make(
        "sensor_msgs/msg/RegionOfInterest", x_offset=0, y_offset=0, height=0, width=0, do_rectify=False
    )
    return make(
        "sensor_msgs/msg/CameraInfo",
        header=header(stamp_ns, frame_id),
        height=height,
        width=width,
        distortion_model="plumb_bob",
        d=np.zeros(5),
        k=intrinsics.astype(np.float64).reshape(9),
        r=np.eye(3).reshape(9),
        p=projection.reshape(12),
        binning_x=0,
        binning_y=0,
        roi=whole_image,
    )


def detections(objects: ObjectList, frame_id: str) -> Any:
    """vision_msgs/Detection3DArray: class names as class_id, bbox.size.x the length, one result each, id from
    `ids`."""
    head = header(objects.stamp_ns, frame_id)
    ids = objects.ids or ("",) * len(objects.boxes)
    found = [
        _detection(head, box, float(score), int(label), identity)
        for box, score, label, identity in zip(
            objects.boxes, objects.scores, objects.labels, ids, strict=True
        )
    ]
    return make("vision_msgs/msg/Detection3DArray", header=head, detections=found)


def velocities(objects: ObjectList, frame_id: str) -> Any:
    """sensor_msgs/PointCloud2 with float32 x y z vx vy vz; point i belongs to detection i of the same header.

    vz is 0; an unknown velocity is nan, and `is_dense` says whether there is none.
    """
    count, width = len(objects.boxes), 4 * len(VELOCITY_FIELDS)
    points = np.zeros((count, len(VELOCITY_FIELDS)), dtype="<f4")
    points[:, :3] = objects.boxes[:, :3]
    points[:, 3:5] = objects.boxes[:, 7:9]
    fields = [
        make("sensor_msgs/msg/PointField", name=name, offset=4 * index, datatype=_FLOAT32, count=1)
        for index, name in enumerate(VELOCITY_FIELDS)
    ]
    return make(
        "sensor_msgs/msg/PointCloud2",
        header=header(objects.stamp_ns, frame_id),
        height=1,
        width=count,
        fields=fields,
        is_bigendian=False,
        point_step=width,
        row_step=width * count,
        data=np.frombuffer(points.tobytes(), dtype=np.uint8),
        is_dense=bool(np.isfinite(points).all()),
    )


def _detection(head: Any, box: Matrix, score: float, label: int, identity: str) -> Any:
    upright = Rotation.from_euler("z", box[6]).as_matrix()
    center = make("geometry_msgs/msg/Pose", position=_point(box[:3]), orientation=_quaternion(upright))
    hypothesis = make("vision_msgs/msg/ObjectHypothesis", class_id=CLASS_NAMES[label], score=score)
    result = make(
        "vision_msgs/msg/ObjectHypothesisWithPose", hypothesis=hypothesis, pose=_with_covariance(center)
    )
    bbox = make("vision_msgs/msg/BoundingBox3D", center=center, size=_vector(box[3:6]))
    return make("vision_msgs/msg/Detection3D", header=head, results=[result], bbox=bbox, id=identity)


def _with_covariance(pose: Any) -> Any:
    return make("geometry_msgs/msg/PoseWithCovariance", pose=pose, covariance=_NO_COVARIANCE)


def _pose(matrix: Matrix) -> Any:
    return make(
        "geometry_msgs/msg/Pose", position=_point(matrix[:3, 3]), orientation=_quaternion(matrix[:3, :3])
    )


def _point(values: Matrix) -> Any:
    x, y, z = (float(value) for value in values)
    return make("geometry_msgs/msg/Point", x=x, y=y, z=z)


def _vector(values: Matrix) -> Any:
    x, y, z = (float(value) for value in values)
    return make("geometry_msgs/msg/Vector3", x=x, y=y, z=z)


def _quaternion(rotation: Matrix) -> Any:
    w, x, y, z = (float(value) for value in rotation_to_quaternion(rotation))
    return make("geometry_msgs/msg/Quaternion", x=x, y=y, z=z, w=w)
