# SPDX-License-Identifier: Apache-2.0
"""Detections as RViz markers: box edges with a heading line, velocity arrows, labels.

All edges of a class form one LINE_LIST marker. There are three namespaces, which RViz can hide: `boxes`,
`velocities` and `labels`.
"""

import math
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ftkd_core.boxes import BOX_EDGES, box_corners
from ftkd_core.classes import CLASS_NAMES
from ftkd_core.types import ObjectList
from ftkd_core.visualization import CLASS_COLORS
from ftkd_ros.convert.message_factory import RCLPY, MessageFactory
from ftkd_ros.convert.to_ros import box_pose, make_header, yaw_quaternions

# Constants of visualization_msgs/Marker, because this module also serves bags, without ROS.
_ARROW: Final = 0
_LINE_LIST: Final = 5
_TEXT_VIEW_FACING: Final = 9
_ADD: Final = 0
_DELETE_ALL: Final = 3
_LINE_WIDTH_M: Final = 0.08
_MIN_SPEED_M_S: Final = 0.5
_ARROW_SECONDS: Final = 1.0
_LABEL_HEIGHT_M: Final = 0.5  # above the box


def objects_to_markers(
    objects: ObjectList,
    frame_id: str,
    *,
    lifetime_s: float = 2.5,
    min_score: float = 0.0,
    messages: MessageFactory = RCLPY,
) -> Any:
    """Return a visualization_msgs/MarkerArray of the objects with at least `min_score`, after a DELETEALL
    marker.

    A `lifetime_s` of more than two detector cycles prevents flicker and removes the boxes soon after the
    detector stops. Arrows end at the position one second later. Boxes that are not finite are omitted.
    """
    shown = objects.select((objects.scores >= min_score) & np.isfinite(objects.boxes[:, :7]).all(axis=1))
    first = messages.new("visualization_msgs/msg/Marker")
    first.action = _DELETE_ALL
    markers = [first]
    for label in np.unique(shown.labels).tolist():
        same_class = shown.select(shown.labels == label)
        markers.append(_edges(messages, same_class, label))
        markers += _arrows(messages, same_class, label)
        markers += _labels(messages, same_class, label)
    for marker in markers:
        marker.header = make_header(messages, objects.stamp_ns, frame_id)
    for marker in markers[1:]:
        seconds, nanoseconds = divmod(round(lifetime_s * 1e9), 1_000_000_000)
        marker.lifetime.sec, marker.lifetime.nanosec = seconds, nanoseconds
    array = messages.new("visualization_msgs/msg/MarkerArray")
    array.markers = markers
    return array


def _marker(messages: MessageFactory, kind: int, namespace: str, index: int, label: int) -> Any:
    """Return a marker of the class `label`; `index` numbers the markers of a class in a namespace."""
    marker = messages.new("visualization_msgs/msg/Marker")
    marker.ns, marker.id = namespace, index * len(CLASS_NAMES) + label
    marker.type, marker.action = kind, _ADD
    color = marker.color
    color.r, color.g, color.b = (value / 255 for value in CLASS_COLORS[CLASS_NAMES[label]])
    color.a = 1.0
    marker.pose.orientation.w = 1.0
    return marker


def _edges(messages: MessageFactory, objects: ObjectList, label: int) -> Any:
    marker = _marker(messages, _LINE_LIST, "boxes", 0, label)
    point_class = type(messages.new("geometry_msgs/msg/Point"))
    marker.scale.x = _LINE_WIDTH_M
    for corners in box_corners(objects.boxes):
        front_bottom = (corners[2] + corners[3]) / 2
        bottom = (corners[2] + corners[3] + corners[6] + corners[7]) / 4
        segments = [(corners[a], corners[b]) for a, b in BOX_EDGES] + [(bottom, front_bottom)]
        ends = np.array([end for segment in segments for end in segment]).tolist()
        marker.points += [point_class(x=x, y=y, z=z) for x, y, z in ends]
    return marker


def _arrows(messages: MessageFactory, objects: ObjectList, label: int) -> list[Any]:
    arrows = []
    for index, box in enumerate(objects.boxes.tolist()):
        vx, vy = box[7:9]
        if not math.hypot(vx, vy) >= _MIN_SPEED_M_S:  # also false for nan
            continue
        marker = _marker(messages, _ARROW, "velocities", index, label)
        marker.scale.x, marker.scale.y, marker.scale.z = 0.15, 0.4, 0.5
        start = np.array(box[:3])
        marker.points = [
            _point(messages, start),
            _point(messages, start + _ARROW_SECONDS * np.array([vx, vy, 0.0])),
        ]
        arrows.append(marker)
    return arrows


def _labels(messages: MessageFactory, objects: ObjectList, label: int) -> list[Any]:
    labels = []
    centers = objects.boxes[:, :3] + [0.0, 0.0, _LABEL_HEIGHT_M]
    centers[:, 2] += objects.boxes[:, 5] / 2
    quaternions = yaw_quaternions(objects.boxes[:, 6])
    for index, (center, quaternion, score) in enumerate(
        zip(centers.tolist(), quaternions, objects.scores.tolist(), strict=True)
    ):
        marker = _marker(messages, _TEXT_VIEW_FACING, "labels", index, label)
        marker.pose = box_pose(messages, center, quaternion)
        marker.scale.z = 0.7
        marker.text = f"{CLASS_NAMES[label]} {score:.2f}"
        labels.append(marker)
    return labels


def _point(messages: MessageFactory, xyz: NDArray[np.float64]) -> Any:
    point = messages.new("geometry_msgs/msg/Point")
    point.x, point.y, point.z = (float(value) for value in xyz)
    return point
