# SPDX-License-Identifier: Apache-2.0
"""Detections as RViz markers: box edges with a heading line, velocity arrows, labels.

All edges of a class form one LINE_LIST marker. There are three namespaces, which RViz can hide: `boxes`,
`velocities` and `labels`.
"""

import math
from typing import Final

import numpy as np
from geometry_msgs.msg import Point
from numpy.typing import NDArray
from rclpy.duration import Duration
from std_msgs.msg import ColorRGBA, Header
from visualization_msgs.msg import Marker, MarkerArray

from ftkd_core.boxes import BOX_EDGES, box_corners
from ftkd_core.classes import CLASS_NAMES
from ftkd_core.types import ObjectList
from ftkd_core.visualization import CLASS_COLORS
from ftkd_ros.convert.message_factory import RCLPY
from ftkd_ros.convert.to_ros import box_pose, make_header, yaw_quaternions

_LINE_WIDTH_M: Final = 0.08
_MIN_SPEED_M_S: Final = 0.5
_ARROW_SECONDS: Final = 1.0
_LABEL_HEIGHT_M: Final = 0.5  # above the box


def objects_to_markers(
    objects: ObjectList, frame_id: str, *, lifetime_s: float = 2.5, min_score: float = 0.0
) -> MarkerArray:
    """Return a visualization_msgs/MarkerArray of the objects with at least `min_score`, after a DELETEALL
    marker.

    A `lifetime_s` of more than two detector cycles prevents flicker and removes the boxes soon after the
    detector stops. Arrows end at the position one second later. Boxes that are not finite are omitted.
    """
    header = make_header(RCLPY, objects.stamp_ns, frame_id)
    shown = objects.select((objects.scores >= min_score) & np.isfinite(objects.boxes[:, :7]).all(axis=1))
    markers = [Marker(header=header, action=Marker.DELETEALL)]
    for label in np.unique(shown.labels).tolist():
        same_class = shown.select(shown.labels == label)
        markers.append(_edges(same_class, label))
        markers += _arrows(same_class, label)
        markers += _labels(same_class, label)
    for marker in markers[1:]:
        marker.header = Header(stamp=header.stamp, frame_id=frame_id)
        marker.lifetime = Duration(seconds=lifetime_s).to_msg()
    return MarkerArray(markers=markers)


def _marker(kind: int, namespace: str, index: int, label: int) -> Marker:
    """Return a marker of the class `label`; `index` numbers the markers of a class in a namespace."""
    red, green, blue = (value / 255 for value in CLASS_COLORS[CLASS_NAMES[label]])
    marker = Marker(ns=namespace, id=index * len(CLASS_NAMES) + label, type=kind, action=Marker.ADD)
    marker.color = ColorRGBA(r=red, g=green, b=blue, a=1.0)
    marker.pose.orientation.w = 1.0
    return marker


def _edges(objects: ObjectList, label: int) -> Marker:
    marker = _marker(Marker.LINE_LIST, "boxes", 0, label)
    marker.scale.x = _LINE_WIDTH_M
    for corners in box_corners(objects.boxes):
        front_bottom = (corners[2] + corners[3]) / 2
        bottom = (corners[2] + corners[3] + corners[6] + corners[7]) / 4
        segments = [(corners[a], corners[b]) for a, b in BOX_EDGES] + [(bottom, front_bottom)]
        marker.points += [_point(end) for segment in segments for end in segment]
    return marker


def _arrows(objects: ObjectList, label: int) -> list[Marker]:
    arrows = []
    for index, box in enumerate(objects.boxes.tolist()):
        vx, vy = box[7:9]
        if not math.hypot(vx, vy) >= _MIN_SPEED_M_S:  # also false for nan
            continue
        marker = _marker(Marker.ARROW, "velocities", index, label)
        marker.scale.x, marker.scale.y, marker.scale.z = 0.15, 0.4, 0.5
        start = np.array(box[:3])
        marker.points = [_point(start), _point(start + _ARROW_SECONDS * np.array([vx, vy, 0.0]))]
        arrows.append(marker)
    return arrows


def _labels(objects: ObjectList, label: int) -> list[Marker]:
    labels = []
    centers = objects.boxes[:, :3] + [0.0, 0.0, _LABEL_HEIGHT_M]
    centers[:, 2] += objects.boxes[:, 5] / 2
    quaternions = yaw_quaternions(objects.boxes[:, 6])
    for index, (center, quaternion, score) in enumerate(
        zip(centers.tolist(), quaternions, objects.scores.tolist(), strict=True)
    ):
        marker = _marker(Marker.TEXT_VIEW_FACING, "labels", index, label)
        marker.pose = box_pose(RCLPY, center, quaternion)
        marker.scale.z = 0.7
        marker.text = f"{CLASS_NAMES[label]} {score:.2f}"
        labels.append(marker)
    return labels


def _point(xyz: NDArray[np.float64]) -> Point:
    return Point(x=float(xyz[0]), y=float(xyz[1]), z=float(xyz[2]))
