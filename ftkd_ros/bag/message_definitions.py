# SPDX-License-Identifier: Apache-2.0
"""Message types for bags without ROS: the types in `rosbags`, and vision_msgs, which `rosbags` lacks.

The definitions contain only fields. Comments do not affect a type hash, so the hashes equal the published
ones (a test compares them). Types of other packages are read from an installed ROS, if there is one.
"""

import os
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from rosbags.interfaces import Nodetype
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
_ZEROS: Final[dict[str, Any]] = {"bool": False, "string": "", "float32": 0.0, "float64": 0.0}


@cache
def message_types() -> Typestore:
    """Return the types of ROS 2 Kilted and vision_msgs.

    All types that this package writes have the same fields in Humble and Jazzy.
    """
    store = get_typestore(Stores.ROS2_KILTED)
    for name, text in _VISION_MSGS.items():
        store.register(get_types_from_msg(text, f"vision_msgs/msg/{name}"))
    return store


class RosbagsMessages:
    """Factory of the messages of `message_types()`; see `ftkd_ros.convert.message_factory`."""

    def __init__(self) -> None:
        self._makers: dict[str, Callable[[], Any]] = {}

    def new(self, msgtype: str) -> Any:
        """Return a message whose numbers are zero, texts and sequences empty.

        Raises KeyError for an unknown type.
        """
        maker = self._makers.get(msgtype)
        if maker is None:
            maker = self._makers[msgtype] = self._message_maker(msgtype)
        return maker()

    def sequence(self, values: NDArray[Any]) -> Any:
        """Return the array itself: `rosbags` serializes numpy arrays."""
        return values

    def _message_maker(self, msgtype: str) -> Callable[[], Any]:
        store = message_types()
        message_class = store.types[msgtype]
        makers = [self._field_maker(description) for _, description in store.fielddefs[msgtype][1]]
        return lambda: message_class(*[make() for make in makers])

    def _field_maker(self, description: Any) -> Callable[[], Any]:
        """Return a function that creates the default value of a field, given its description in the type
        store.
        """
        kind, detail = description
        if kind == Nodetype.NAME:
            return self._message_maker(detail)
        if kind == Nodetype.BASE:
            value = _ZEROS.get(detail[0], 0)
            return lambda: value
        (item_kind, item), length = detail
        count = length if kind == Nodetype.ARRAY else 0
        if item_kind == Nodetype.BASE and item[0] != "string":
            return partial(np.zeros, count, dtype=item[0])
        make_item = self._field_maker((item_kind, item))
        return lambda: [make_item() for _ in range(count)]


ROSBAGS = RosbagsMessages()


def ensure_known(msgtype: str) -> None:
    """Register a type such as "package/msg/Name", and the types in it, from the installed ROS if it is
    unknown.

    Raises UserError if a definition is not found.
    """
    store = message_types()
    pending = [msgtype]
    while pending:
        name = pending.pop()
        if name in store.fielddefs:
            continue
        found = get_types_from_msg(_definition_text(name), name)
        store.register(found)
        pending += [name for definition in found.values() for name in _message_names(definition[1])]


def _definition_text(msgtype: str) -> str:
    """Return the content of the .msg file in the share folder of an installed package."""
    package, _, name = msgtype.partition("/msg/")
    # ROS wheels are installed below sys.prefix and set no environment variable.
    for prefix in (*filter(None, os.environ.get("AMENT_PREFIX_PATH", "").split(os.pathsep)), sys.prefix):
        path = Path(prefix, "share", package, "msg", f"{name}.msg")
        if path.is_file():
            return path.read_text(encoding="utf-8")
    raise UserError(
        f"message type {msgtype!r} is unknown; source the ROS workspace that has the package {package!r}"
    )


def _message_names(fields: object) -> list[str]:
    """Return all message types that the field descriptions of a parsed definition refer to."""
    if isinstance(fields, str):
        return [fields] if "/msg/" in fields else []
    if isinstance(fields, (list, tuple)):
        return [name for part in fields for name in _message_names(part)]
    return []
