# SPDX-License-Identifier: Apache-2.0
"""Messages -> arrays, for messages of rclpy and of `rosbags`.

This module reads fields only and imports no ROS package.
"""

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ftkd_core.classes import CLASS_NAMES
from ftkd_core.errors import UserError
from ftkd_core.geometry import make_transform
from ftkd_core.types import ObjectList
from ftkd_ros.convert.images import byte_view

VELOCITY_FIELDS: Final = ("x", "y", "z", "vx", "vy", "vz")
"""Fields of the velocities cloud, float32: box center in metres and velocity over ground in m/s."""
FLOAT32: Final = 7
"""Value of sensor_msgs/PointField.FLOAT32."""

_CLASS_INDEX: Final = {name: index for index, name in enumerate(CLASS_NAMES)}


def stamp_to_ns(stamp: Any) -> int:
    """Return the nanoseconds of a builtin_interfaces/Time or Duration."""
    return int(stamp.sec) * 1_000_000_000 + int(stamp.nanosec)


def transform_to_matrix(transform: Any) -> NDArray[np.float64]:
    """Return the matrix (4, 4) of a geometry_msgs/Transform or Pose.

    Raises ValueError for a quaternion that is not finite or has length zero.
    """
    position = transform.translation if hasattr(transform, "translation") else transform.position
    rotation = transform.rotation if hasattr(transform, "rotation") else transform.orientation
    return make_transform(
        [rotation.w, rotation.x, rotation.y, rotation.z], [position.x, position.y, position.z]
    )


def detections_to_objects(detections: Any, velocities: Any | None = None) -> ObjectList:
    """Return the objects of a vision_msgs/Detection3DArray and its velocities PointCloud2.

    Class and score come from the hypothesis with the highest score. Without `velocities`, velocity is nan.
    Raises UserError for an unknown class name, a detection without a result, and a cloud of another message.
    """
    count = len(detections.detections)
    boxes = np.full((count, 9), np.nan)
    scores = np.zeros(count)
    labels = np.zeros(count, dtype=np.int64)
    for row, detection in enumerate(detections.detections):
        labels[row], scores[row] = _best_hypothesis(detection, row)
        center, size = detection.bbox.center, detection.bbox.size
        ego_from_box = transform_to_matrix(center)
        boxes[row, :3] = ego_from_box[:3, 3]
        boxes[row, 3:6] = size.x, size.y, size.z
        boxes[row, 6] = np.arctan2(ego_from_box[1, 0], ego_from_box[0, 0])
    if velocities is not None:
        _check_same_message(detections, velocities, count)
        boxes[:, 7:9] = cloud_columns(velocities, ("vx", "vy"))
    return ObjectList(
        boxes=boxes,
        scores=scores,
        labels=labels,
        stamp_ns=stamp_to_ns(detections.header.stamp),
        ids=tuple(detection.id for detection in detections.detections),
    )


def cloud_columns(cloud: Any, names: tuple[str, ...]) -> NDArray[np.float64]:
    """Return float32 fields of a sensor_msgs/PointCloud2 as columns (P, len(names)), in any order of its
    fields.

    Raises UserError for a missing field and for a cloud with too few bytes.
    """
    offsets = {field.name: int(field.offset) for field in cloud.fields if int(field.datatype) == FLOAT32}
    missing = [name for name in names if name not in offsets]
    if missing:
        raise UserError(
            f"point cloud has no float32 field {missing[0]!r}; it has {', '.join(sorted(offsets))}"
        )
    count = int(cloud.width) * int(cloud.height)
    data = byte_view(cloud.data)
    if len(data) < count * int(cloud.point_step):
        raise UserError(
            f"point cloud of {count} points x {cloud.point_step} bytes has only {len(data)} bytes"
        )
    order = ">" if cloud.is_bigendian else "<"
    layout = np.dtype(
        {
            "names": list(names),
            "formats": [f"{order}f4"] * len(names),
            "offsets": [offsets[name] for name in names],
            "itemsize": int(cloud.point_step),
        }
    )
    points = np.frombuffer(data.tobytes(), dtype=layout, count=count)
    return np.stack([points[name].astype(np.float64) for name in names], axis=-1).reshape(count, len(names))


def _best_hypothesis(detection: Any, row: int) -> tuple[int, float]:
    if not detection.results:
        raise UserError(f"detection {row} has no result; expected a class name and a score")
    best = max(
        (result.hypothesis for result in detection.results), key=lambda hypothesis: float(hypothesis.score)
    )
    if best.class_id not in _CLASS_INDEX:
        raise UserError(
            f"detection {row} has class {best.class_id!r}; expected one of {', '.join(CLASS_NAMES)}"
        )
    return _CLASS_INDEX[best.class_id], float(best.score)


def _check_same_message(detections: Any, velocities: Any, count: int) -> None:
    stamps = stamp_to_ns(detections.header.stamp), stamp_to_ns(velocities.header.stamp)
    points = int(velocities.width) * int(velocities.height)
    if stamps[0] != stamps[1] or points != count:
        raise UserError(
            f"{points} velocities at {stamps[1]} ns do not belong to {count} detections at {stamps[0]} ns; "
            "expected one velocity per detection and equal stamps"
        )
