# SPDX-License-Identifier: Apache-2.0
"""The transforms of a bag resolve as tf2 does; the independent twin composes and interpolates quaternions."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from geometry_msgs.msg import TransformStamped
from hypothesis import given, settings
from hypothesis import strategies as st
from rclpy.time import Time
from scipy.spatial.transform import Rotation
from tf2_ros import BufferCore, TransformException

from ftkd_core.errors import UserError
from ftkd_core.geometry import is_rigid
from ftkd_ros.bag.transforms import OdometryTrack, TransformError, TransformTree
from ftkd_ros.convert.from_ros import transform_to_matrix

SECOND = 10**9
FRAMES = ("map", "odom", "base_link", "rack", "camera")


def transform(rotation: Rotation, translation: Any) -> Any:
    """Return the fields of a geometry_msgs/Transform."""
    x, y, z, w = rotation.as_quat()
    tx, ty, tz = translation
    return SimpleNamespace(
        rotation=SimpleNamespace(x=x, y=y, z=z, w=w), translation=SimpleNamespace(x=tx, y=ty, z=tz)
    )


def moved(x: float, yaw_deg: float = 0.0) -> Any:
    return transform(Rotation.from_euler("z", yaw_deg, degrees=True), (x, 0.0, 0.0))


def tf2_buffer(edges: list[tuple[str, str, int, Any, bool]]) -> BufferCore:
    """Return a tf2 buffer with the same transforms."""
    from rclpy.duration import Duration

    buffer = BufferCore(Duration(seconds=1e6))
    for parent, child, stamp_ns, value, static in edges:
        message = TransformStamped(child_frame_id=child)
        message.header.frame_id = parent
        message.header.stamp.sec, message.header.stamp.nanosec = divmod(stamp_ns, SECOND)
        for name in "xyz":
            setattr(message.transform.translation, name, float(getattr(value.translation, name)))
        for name in "xyzw":
            setattr(message.transform.rotation, name, float(getattr(value.rotation, name)))
        (buffer.set_transform_static if static else buffer.set_transform)(message, "test")
    return buffer


@settings(max_examples=60, deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**32 - 1))
def test_lookups_equal_those_of_tf2(data: st.DataObject, seed: int) -> None:
    """Random chains, directions, mixes of static and moving frames, stamps and slashes; also the failures."""
    rng = np.random.default_rng(seed)
    order = data.draw(st.permutations(FRAMES))
    edges: list[tuple[str, str, int, Any, bool]] = []
    for depth, child in enumerate(order[1:], start=1):
        parent = order[data.draw(st.integers(0, depth - 1))]
        slash = data.draw(st.sampled_from(["", "/"]))
        static = data.draw(st.booleans())
        for _ in range(1 if static else data.draw(st.integers(1, 4))):
            stamp_ns = data.draw(st.integers(1, 40)) * SECOND // 10
            value = transform(Rotation.random(random_state=rng), rng.normal(size=3) * 10)
            edges.append((slash + parent, slash + child, stamp_ns, value, static))
    tree = TransformTree()
    for parent, child, stamp_ns, value, static in edges:
        tree.add(parent, child, stamp_ns, value, static=static)
    buffer = tf2_buffer(edges)
    stamp_ns = data.draw(st.integers(1, 40)) * SECOND // 10 + data.draw(st.sampled_from([0, 12_345_678]))
    for target in FRAMES:
        for source in FRAMES:
            try:
                expected = buffer.lookup_transform_core(target, source, Time(nanoseconds=stamp_ns)).transform
            except TransformException:
                with pytest.raises(TransformError):
                    tree.lookup(target, source, stamp_ns)
                continue
            found = tree.lookup(target, source, stamp_ns)
            np.testing.assert_allclose(found, transform_to_matrix(expected), atol=1e-6)
            assert is_rigid(found, 1e-9)


def test_pose_between_two_stamps_is_on_the_straight_line_and_the_shorter_arc() -> None:
    tree = TransformTree()
    tree.add("map", "base_link", SECOND, moved(0.0, 170), static=False)
    tree.add("map", "base_link", 2 * SECOND, moved(10.0, -170), static=False)
    half = tree.lookup("map", "base_link", 3 * SECOND // 2)
    np.testing.assert_allclose(half[:3, 3], [5, 0, 0], atol=1e-12)
    np.testing.assert_allclose(half[:2, 0], [-1, 0], atol=1e-9)
    with pytest.raises(TransformError, match="its transforms are from 1000000000 to 2000000000 ns"):
        tree.lookup("map", "base_link", 3 * SECOND)


def test_failures_name_the_frames_and_the_reason() -> None:
    tree = TransformTree()
    tree.add("map", "base_link", SECOND, moved(0.0), static=False)
    tree.add("rack", "camera", 0, moved(0.0), static=True)
    tree.add("base_link", "bent", 0, transform(Rotation.identity(), (np.nan, 0, 0)), static=True)
    tree.add("", "nothing", 0, moved(0.0), static=True)
    with pytest.raises(TransformError, match="map <- roof at 5 ns: no transform has the frame 'roof'"):
        tree.lookup("map", "roof", 5)
    with pytest.raises(TransformError, match="map <- camera .* nothing connects the two frames"):
        tree.lookup("map", "camera", SECOND)
    with pytest.raises(TransformError, match="'bent' .*is not rigid"):
        tree.lookup("map", "bent", SECOND)
    assert sum(tree.ignored.values()) == 2
    assert (tree.connected_to("map"), tree.descendants("rack")) == (["base_link"], ["camera"])


def test_loop_of_frames_is_an_error_and_not_endless() -> None:
    tree = TransformTree()
    for parent, child in (("a", "b"), ("b", "c"), ("c", "a"), ("x", "y")):
        tree.add(parent, child, 0, moved(1.0), static=True)
    with pytest.raises(TransformError, match="loop"):
        tree.lookup("x", "a", 5)


def odometry(seconds: int, x: float, child: str) -> Any:
    pose = SimpleNamespace(orientation=moved(x).rotation, position=SimpleNamespace(x=x, y=0.0, z=0.0))
    return SimpleNamespace(
        header=SimpleNamespace(frame_id="anything", stamp=SimpleNamespace(sec=seconds, nanosec=0)),
        child_frame_id=child,
        pose=SimpleNamespace(pose=pose),
    )


def test_odometry_gives_the_pose_of_the_base_through_its_child_frame() -> None:
    tree = TransformTree()
    tree.add("base_link", "imu", 0, moved(2.0), static=True)
    for child, offset in (("base_link", 0.0), ("/imu", -2.0), ("", 0.0)):
        messages = [("/odom", 0, odometry(second, 10.0 * second, child)) for second in (1, 2)]
        track = OdometryTrack("/odom", messages, "base_link")
        assert track.pose(tree, 3 * SECOND // 2)[0, 3] == pytest.approx(15.0 + offset)
    with pytest.raises(TransformError, match="odometry_topic /odom: no transform world <- vehicle at"):
        track.pose(tree, 3 * SECOND)
    with pytest.raises(UserError, match="no usable message on odometry_topic /odom"):
        OdometryTrack("/odom", [], "base_link")
