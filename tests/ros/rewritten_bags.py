# SPDX-License-Identifier: Apache-2.0
"""A converted bag with other transforms, topics or cameras, but the same geometry."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ftkd_core.geometry import invert_rigid, make_transform, yaw_transform
from ftkd_ros.bag.io import BagReader, BagWriter, offered_qos
from ftkd_ros.bag.message_definitions import ROSBAGS
from ftkd_ros.convert.from_ros import stamp_to_ns, transform_to_matrix
from ftkd_ros.convert.to_ros import make_odometry, make_transforms

MAP_FROM_ODOM = yaw_transform(0.7, (12.0, -3.0, 0.5))
BASE_FROM_RACK = yaw_transform(-0.2, (0.4, 0.1, 1.2))

Message = tuple[str, str, Any]
"""Topic, type and message."""


def rewrite(source: Path, target: Path, change: Callable[[Message], Iterator[Message]]) -> Path:
    """Write a bag with every message changed, dropped or multiplied by a function; times are kept."""
    with BagReader(source) as reader, BagWriter(target) as writer:
        added: set[str] = set()
        latched = {
            c.topic for c in reader.connections if any(q.durability.value == 1 for q in offered_qos(c))
        }
        for connection, stamp_ns, content in reader.raw():
            message = reader.deserialize(connection, content)
            for topic, msgtype, changed in change((connection.topic, connection.msgtype, message)):
                if topic not in added:
                    added.add(topic)
                    writer.add_topic(topic, msgtype, depth=1, latched=topic in latched)
                writer.write(topic, stamp_ns, changed)
    return target


def _parts(message: Any) -> dict[str, np.ndarray]:  # type: ignore[type-arg]
    return {part.child_frame_id: transform_to_matrix(part.transform) for part in message.transforms}


def chained(item: Message) -> Iterator[Message]:
    """map -> odom is static, odom -> base_link moves, and base_link -> rack -> cameras; leading slashes."""
    topic, msgtype, message = item
    if topic == "/tf":
        stamp_ns = stamp_to_ns(message.transforms[0].header.stamp)
        odom_from_base = invert_rigid(MAP_FROM_ODOM) @ _parts(message)["base_link"]
        yield topic, msgtype, make_transforms(ROSBAGS, stamp_ns, "/odom", {"/base_link": odom_from_base})
        yield topic, msgtype, make_transforms(ROSBAGS, stamp_ns, "base_link", {"rack": BASE_FROM_RACK})
    elif topic == "/tf_static":
        children = {name: invert_rigid(BASE_FROM_RACK) @ pose for name, pose in _parts(message).items()}
        both = make_transforms(ROSBAGS, 1, "map", {"odom": MAP_FROM_ODOM})
        both.transforms += make_transforms(ROSBAGS, 1, "/rack", children).transforms
        yield topic, msgtype, both
    elif hasattr(message, "header") and message.header.frame_id.startswith("cam"):
        message.header.frame_id = f"/{message.header.frame_id}"
        yield topic, msgtype, message
    else:
        yield item


def inverted(item: Message) -> Iterator[Message]:
    """base_link is the root: it is the parent of odom, which is the parent of map; extrinsics are on /tf."""
    topic, msgtype, message = item
    if topic == "/tf":
        stamp_ns = stamp_to_ns(message.transforms[0].header.stamp)
        base_from_odom = invert_rigid(_parts(message)["base_link"]) @ MAP_FROM_ODOM
        yield topic, msgtype, make_transforms(ROSBAGS, stamp_ns, "base_link", {"odom": base_from_odom})
        yield topic, msgtype, make_transforms(ROSBAGS, stamp_ns, "odom", {"map": invert_rigid(MAP_FROM_ODOM)})
        for name, pose in inverted.extrinsics.items():  # type: ignore[attr-defined]
            yield topic, msgtype, make_transforms(ROSBAGS, stamp_ns, "base_link", {name: pose})
    elif topic == "/tf_static":
        inverted.extrinsics = _parts(message)  # type: ignore[attr-defined]
        yield topic, msgtype, make_transforms(ROSBAGS, 1, "base_link", {"plate": make_transform()})
    else:
        yield item


def renamed(item: Message) -> Iterator[Message]:
    """Four cameras below /car, with Autoware's frame of the vehicle and no map."""
    topic, msgtype, message = item
    if topic.startswith("/cam_back_"):
        return
    if topic in ("/tf", "/tf_static"):
        for part in message.transforms:
            part.header.frame_id = {"map": "odom", "base_link": "ego"}[part.header.frame_id]
            part.child_frame_id = "ego" if part.child_frame_id == "base_link" else part.child_frame_id
    yield f"/car{topic}" if topic.startswith("/cam_") else topic, msgtype, message


def odometry_only(item: Message) -> Iterator[Message]:
    """No tf over ground: the pose is on /odom, of a frame behind the base."""
    topic, msgtype, message = item
    if topic == "/tf":
        return
    if topic == "/tf_static":
        message.transforms += make_transforms(ROSBAGS, 1, "base_link", {"imu": BASE_FROM_RACK}).transforms
    if topic == "/odom":
        stamp_ns = stamp_to_ns(message.header.stamp)
        pose = transform_to_matrix(message.pose.pose) @ BASE_FROM_RACK
        zero = np.zeros(3)
        message = make_odometry(ROSBAGS, stamp_ns, "anything", "imu", pose, zero, zero)
    yield topic, msgtype, message
