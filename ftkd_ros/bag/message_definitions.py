# SPDX-License-Identifier: Apache-2.0
"""Message types for bags without ROS: those `rosbags` carries, and vision_msgs, which it does not.

The definitions hold the fields alone; comments are no part of a type, so the type hashes equal the published
ones (a test compares). Types of other packages are read from an installed ROS, where there is one.
"""

import os
import sys
from functools import cache
from pathlib import Path
from typing import Final

from rosbags.typesys import Stores, get_types_from_msg, get_typestore
from rosbags.typesys.store import Typestore

from ftkd_core.errors import UserError

_VISION_MSGS: Final[dict[str, str]] = {
    "ObjectHypothesis": "string class_id\nfloat64 score\n",
    "ObjectHypothesisWithPose": "ObjectHypothesis hypothesis\ngeometry_msgs/PoseWithCovariance pose\n",
    "BoundingBox3D": "geometry_msgs/Pose center\ngeometry_msgs/Vector3 size\n",
    "Detection3D": (
        "std_msgs/Header header\nObjectHypothesisWithPose[] results\nBoundingBox3D bbox\nstring id\n"
    ),
    "Detection3DArray": "std_msgs/Header header\nDetection3D[] detections\n",
    "VisionClass": "uint16 class_id\nstring class_name\n",
    "LabelInfo": "std_msgs/Header header\nvision_msgs/VisionClass[] class_map\nfloat32 threshold\n",
}


@cache
def message_types() -> Typestore:
    """The types of ROS 2 Kilted and vision_msgs; the same fields as in Humble and Jazzy for all that we
    write."""
    store = get_typestore(Stores.ROS2_KILTED)
    for name, text in _VISION_MSGS.items():
        store.register(get_types_from_msg(text, f"vision_msgs/msg/{name}"))
    return store


def ensure_known(msgtype: str) -> None:
    """Make a type such as "package/msg/Name" usable; one that nobody has met yet is read from the installed
    ROS.

    Raises UserError where no definition of it, or of a type inside it, is found.
    """
    store = message_types()
    wanted = [msgtype]
    while wanted:
        name = wanted.pop()
        if name in store.fielddefs:
            continue
        found = get_types_from_msg(_definition_text(name), name)
        store.register(found)
        wanted += [name for definition in found.values() for name in _names_inside(definition[1])]


def _definition_text(msgtype: str) -> str:
    """The .msg file of a type below the share folder of an installed package."""
    package, _, name = msgtype.partition("/msg/")
    # ROS as wheels lies in the environment of the interpreter, and no variable says so.
    for prefix in (*filter(None, os.environ.get("AMENT_PREFIX_PATH", "").split(os.pathsep)), sys.prefix):
        path = Path(prefix, "share", package, "msg", f"{name}.msg")
        if path.is_file():
            return path.read_text(encoding="utf-8")
    raise UserError(
        f"message type {msgtype!r} is unknown; source the ROS workspace that has the package {package!r}"
    )


def _names_inside(fields: object) -> list[str]:
    """Every message type named in the field descriptions of a parsed definition."""
    if isinstance(fields, str):
        return [fields] if "/msg/" in fields else []
    return (
        [name for part in fields for name in _names_inside(part)] if isinstance(fields, (list, tuple)) else []
    )
