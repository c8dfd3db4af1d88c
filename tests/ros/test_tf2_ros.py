# SPDX-License-Identifier: Apache-2.0
"""`tf2_ros`: only the original API is used, so the tests also pass with the original package.

Transforms are `parent_from_child` as 4x4 matrices in metres; times are int nanoseconds.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import yaml
from geometry_msgs.msg import TransformStamped
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from rclpy.duration import Duration
from rclpy.time import Time
from scipy.spatial.transform import Rotation
from tf2_ros import (
    Buffer,
    ConnectivityException,
    ExtrapolationException,
    InvalidArgumentException,
    LookupException,
    TimeoutException,
    TransformException,
)

SECOND = 10**9
LATEST = Time()
Matrix = NDArray[np.float64]
QuaternionArray = NDArray[np.float64]


def stamped(
    parent: str,
    child: str,
    nanoseconds: int = 0,
    translation: tuple[float, float, float] = (0.0, 0.0, 0.0),
    rotation: tuple[float, float, float, float] | QuaternionArray = (0.0, 0.0, 0.0, 1.0),
) -> TransformStamped:
    message = TransformStamped()
    message.header.frame_id, message.child_frame_id = parent, child
    message.header.stamp = Time(nanoseconds=nanoseconds).to_msg()
    vector, quaternion = message.transform.translation, message.transform.rotation
    vector.x, vector.y, vector.z = (float(value) for value in translation)
    quaternion.x, quaternion.y, quaternion.z, quaternion.w = (float(value) for value in rotation)
    return message


def matrix(message: TransformStamped) -> Matrix:
    """Return the transform of a message as a matrix (4, 4)."""
    vector = message.transform.translation
    result = np.eye(4)
    result[:3, :3] = Rotation.from_quat(rotation_of(message)).as_matrix()
    result[:3, 3] = vector.x, vector.y, vector.z
    return result


def rotation_of(message: TransformStamped) -> QuaternionArray:
    quaternion = message.transform.rotation
    return np.array([quaternion.x, quaternion.y, quaternion.z, quaternion.w])


def x_of(buffer: Buffer, target: str, source: str, nanoseconds: int) -> float:
    found = buffer.lookup_transform(target, source, Time(nanoseconds=nanoseconds))
    return float(found.transform.translation.x)


def rotation_about(axis: Sequence[float], angle: float) -> Rotation:
    """Return the rotation by an angle about an axis of any length."""
    return Rotation.from_rotvec(angle * np.array(axis) / math.hypot(*axis))


def moving(speed: float = 1.0, first: int = 1, last: int = 5) -> Buffer:
    """`base_link` moves along x of `map`, one sample per second, with a static `cam_front` 2 m ahead."""
    buffer = Buffer()
    for second in range(first, last + 1):
        buffer.set_transform(stamped("map", "base_link", second * SECOND, (speed * second, 0.0, 0.0)), "test")
    buffer.set_transform_static(stamped("base_link", "cam_front", 0, (2.0, 0.0, 0.0)), "test")
    return buffer


units = st.tuples(*[st.floats(-1.0, 1.0)] * 3).filter(lambda vector: math.hypot(*vector) > 0.1)
positions = st.tuples(*[st.floats(-100.0, 100.0)] * 3)
rotations = st.builds(
    lambda axis, angle: rotation_about(axis, angle).as_quat(), units, st.floats(-math.pi, math.pi)
)


# Interpolation


@given(positions, positions, rotations, units, st.floats(0.0, 3.1), st.floats(0.0, 1.0), st.booleans())
@settings(deadline=None)
def test_translation_is_interpolated_linearly_and_rotation_at_constant_speed(
    start: tuple[float, float, float],
    end: tuple[float, float, float],
    rotation: QuaternionArray,
    axis: tuple[float, float, float],
    angle: float,
    ratio: float,
    negated: bool,
) -> None:
    """The rotation follows the shorter arc for either of the two quaternions of a rotation."""
    turned = (Rotation.from_quat(rotation) * rotation_about(axis, angle)).as_quat() * (
        -1.0 if negated else 1.0
    )
    buffer = Buffer()
    buffer.set_transform(stamped("map", "base_link", SECOND, start, rotation), "test")
    buffer.set_transform(stamped("map", "base_link", 2 * SECOND, end, turned), "test")
    at = SECOND + round(ratio * SECOND)
    found = buffer.lookup_transform("map", "base_link", Time(nanoseconds=at))
    exact_ratio = (at - SECOND) / SECOND
    expected = np.array(start) * (1 - exact_ratio) + np.array(end) * exact_ratio
    assert matrix(found)[:3, 3] == pytest.approx(expected, abs=1e-9)
    expected_rotation = (Rotation.from_quat(rotation) * rotation_about(axis, angle * exact_ratio)).as_quat()
    assert abs(rotation_of(found) @ expected_rotation) == pytest.approx(1.0, abs=1e-9)
    assert np.linalg.norm(rotation_of(found)) == pytest.approx(1.0, abs=1e-9)
    assert found.header.stamp == Time(nanoseconds=at).to_msg()


def test_samples_may_arrive_out_of_order() -> None:
    buffer = Buffer()
    for second in (3, 1, 2):
        sample = stamped("map", "base_link", second * SECOND, (float(second) ** 2, 0.0, 0.0))
        buffer.set_transform(sample, "test")
    assert x_of(buffer, "map", "base_link", SECOND * 3 // 2) == pytest.approx(2.5)
    assert x_of(buffer, "map", "base_link", SECOND * 5 // 2) == pytest.approx(6.5)


def test_there_is_no_interpolation_across_a_change_of_parent() -> None:
    buffer = Buffer()
    buffer.set_transform(stamped("left", "load", SECOND, (1.0, 0.0, 0.0)), "test")
    buffer.set_transform(stamped("right", "load", 2 * SECOND, (9.0, 0.0, 0.0)), "test")
    assert x_of(buffer, "left", "load", SECOND * 3 // 2) == 1.0
    assert x_of(buffer, "right", "load", 2 * SECOND) == 9.0


# The tree


@given(st.data())
@settings(deadline=None, max_examples=50)
def test_a_lookup_is_the_product_of_the_matrices_on_the_path(data: st.DataObject) -> None:
    """Random trees with static and moving branches: any two frames, both directions, and a fixed frame."""
    count = data.draw(st.integers(2, 8))
    buffer = Buffer()
    root_from = {"frame0": np.eye(4)}
    for number in range(1, count):
        parent, child = f"frame{data.draw(st.integers(0, number - 1))}", f"frame{number}"
        message = stamped(parent, child, SECOND, data.draw(positions), data.draw(rotations))
        if data.draw(st.booleans()):
            buffer.set_transform_static(message, "test")
        else:
            buffer.set_transform(message, "test")
        root_from[child] = root_from[parent] @ matrix(message)
    target, source, fixed = (f"frame{data.draw(st.integers(0, count - 1))}" for _ in range(3))
    found = buffer.lookup_transform(target, source, Time(nanoseconds=SECOND))
    assert (found.header.frame_id, found.child_frame_id) == (target, source)
    expected = np.linalg.inv(root_from[target]) @ root_from[source]
    assert matrix(found) == pytest.approx(expected, abs=1e-8)
    assert buffer.can_transform(target, source, Time(nanoseconds=SECOND))
    back = buffer.lookup_transform(source, target, Time(nanoseconds=SECOND))
    assert matrix(back) @ matrix(found) == pytest.approx(np.eye(4), abs=1e-8)
    full = buffer.lookup_transform_full(
        target, Time(nanoseconds=SECOND), source, Time(nanoseconds=SECOND), fixed
    )
    assert matrix(full) == pytest.approx(expected, abs=1e-7)


def test_a_static_transform_is_valid_at_any_time_and_gets_the_requested_stamp() -> None:
    buffer = Buffer()
    buffer.set_transform_static(stamped("base_link", "cam_front", 7 * SECOND, (2.0, 0.0, 0.0)), "test")
    found = buffer.lookup_transform("base_link", "cam_front", Time(nanoseconds=123 * SECOND))
    assert found.transform.translation.x == 2.0
    assert found.header.stamp == Time(nanoseconds=123 * SECOND).to_msg()
    assert buffer.lookup_transform("base_link", "cam_front", LATEST).header.stamp == LATEST.to_msg()
    buffer.set_transform_static(stamped("base_link", "cam_front", 0, (3.0, 0.0, 0.0)), "test")
    assert x_of(buffer, "base_link", "cam_front", SECOND) == 3.0


def test_time_zero_selects_the_latest_time_common_to_the_path() -> None:
    buffer = moving()
    buffer.set_transform(stamped("map", "target", 3 * SECOND, (0.0, 1.0, 0.0)), "test")
    buffer.set_transform(stamped("map", "target", 4 * SECOND, (0.0, 2.0, 0.0)), "test")
    found = buffer.lookup_transform("target", "cam_front", LATEST)
    assert found.header.stamp == Time(nanoseconds=4 * SECOND).to_msg()
    assert found.transform.translation.x == pytest.approx(6.0)
    assert found.transform.translation.y == pytest.approx(-2.0)
    assert buffer.get_latest_common_time("target", "cam_front") == Time(nanoseconds=4 * SECOND)
    assert buffer.get_latest_common_time("map", "base_link") == Time(nanoseconds=5 * SECOND)


def test_a_frame_relative_to_itself_is_the_identity_even_if_unknown() -> None:
    found = Buffer().lookup_transform("anywhere", "anywhere", Time(nanoseconds=5))
    assert matrix(found) == pytest.approx(np.eye(4))


def test_full_lookup_accounts_for_the_motion_between_two_exposures() -> None:
    """At 15 m/s a camera exposed 43 ms before the reference time is 0.645 m behind."""
    buffer = moving(speed=15.0)
    reference, exposure = 3 * SECOND, 3 * SECOND - 43_000_000
    found = buffer.lookup_transform_full(
        "base_link", Time(nanoseconds=reference), "cam_front", Time(nanoseconds=exposure), "map"
    )
    assert found.transform.translation.x == pytest.approx(2.0 - 0.645)
    assert found.header.stamp == Time(nanoseconds=reference).to_msg()
    assert (found.header.frame_id, found.child_frame_id) == ("base_link", "cam_front")


def test_times_may_be_messages() -> None:
    buffer = moving()
    found = buffer.lookup_transform("map", "base_link", Time(nanoseconds=2 * SECOND).to_msg())
    assert found.transform.translation.x == 2.0
    no_time: Any = 2.0
    with pytest.raises(TypeError):
        buffer.lookup_transform("map", "base_link", no_time)


# Errors


@pytest.mark.parametrize(
    "kind",
    [
        LookupException,
        ConnectivityException,
        ExtrapolationException,
        InvalidArgumentException,
        TimeoutException,
    ],
)
def test_every_exception_is_a_transform_exception(kind: type[Exception]) -> None:
    assert issubclass(kind, TransformException)


@pytest.mark.parametrize(
    ("target", "source", "seconds", "kind"),
    [
        ("map", "nowhere", 2.0, LookupException),
        ("nowhere", "map", 2.0, LookupException),
        ("", "map", 2.0, InvalidArgumentException),
        ("/map", "base_link", 2.0, InvalidArgumentException),
        ("map", "island", 2.0, ConnectivityException),
        ("map", "island", 0.0, ConnectivityException),
        ("map", "base_link", 0.5, ExtrapolationException),
        ("cam_front", "map", 5.5, ExtrapolationException),
        ("map", "once", 1.5, ExtrapolationException),
    ],
)
def test_a_missing_transform_is_reported_with_its_reason(
    target: str, source: str, seconds: float, kind: type[Exception]
) -> None:
    buffer = moving()
    buffer.set_transform_static(stamped("sea", "island"), "test")
    buffer.set_transform(stamped("map", "once", SECOND), "test")
    at = Time(nanoseconds=round(seconds * SECOND))
    with pytest.raises(TransformException) as caught:
        buffer.lookup_transform(target, source, at)
    assert caught.type is kind
    assert not buffer.can_transform(target, source, at)
    available: Any = buffer.can_transform(target, source, at, return_debug_tuple=True)
    possible, reason = available
    assert not possible
    assert reason


def test_an_extrapolation_error_names_the_direction() -> None:
    buffer = moving()
    with pytest.raises(ExtrapolationException, match="extrapolation into the future"):
        buffer.lookup_transform("map", "base_link", Time(nanoseconds=6 * SECOND))
    with pytest.raises(ExtrapolationException, match="extrapolation into the past"):
        buffer.lookup_transform("map", "base_link", Time(nanoseconds=1))


def test_a_gap_above_the_common_ancestor_has_no_effect() -> None:
    buffer = moving()
    buffer.set_transform_static(stamped("base_link", "lidar_top", 0, (0.0, 0.0, 1.8)), "test")
    found = buffer.lookup_transform("lidar_top", "cam_front", Time(nanoseconds=100 * SECOND))
    assert found.transform.translation.z == pytest.approx(-1.8)


@pytest.mark.parametrize(
    "bad",
    [
        stamped("map", "map", SECOND),
        stamped("", "bad", SECOND),
        stamped("map", "", SECOND),
        stamped("map", "bad", SECOND, (math.nan, 0.0, 0.0)),
        stamped("map", "bad", SECOND, rotation=(0.0, 0.0, 0.0, 0.0)),
        stamped("map", "bad", SECOND, rotation=(math.nan, 0.0, 0.0, 1.0)),
    ],
    ids=["own parent", "no parent", "no child", "NaN translation", "zero quaternion", "NaN quaternion"],
)
def test_an_invalid_transform_is_dropped(bad: TransformStamped) -> None:
    buffer = moving()
    buffer.set_transform(bad, "test")
    assert not buffer.can_transform("map", "bad", LATEST)
    assert x_of(buffer, "map", "base_link", 2 * SECOND) == 2.0


def test_leading_slashes_of_stored_frames_are_removed() -> None:
    buffer = Buffer()
    buffer.set_transform(stamped("/map", "/base_link", SECOND, (1.0, 0.0, 0.0)), "test")
    assert x_of(buffer, "map", "base_link", SECOND) == 1.0


def test_a_loop_in_the_tree_raises_an_error() -> None:
    buffer = Buffer()
    buffer.set_transform_static(stamped("a", "b"), "test")
    buffer.set_transform_static(stamped("b", "c"), "test")
    buffer.set_transform_static(stamped("c", "a"), "test")
    buffer.set_transform_static(stamped("a", "leaf"), "test")
    buffer.set_transform_static(stamped("sea", "island"), "test")
    with pytest.raises(TransformException):
        buffer.lookup_transform("island", "leaf", LATEST)
    with pytest.raises(TransformException):
        buffer.lookup_transform("leaf", "island", Time(nanoseconds=SECOND))


# Cache time and clearing


def test_samples_older_than_the_cache_time_are_dropped() -> None:
    buffer = Buffer(cache_time=Duration(seconds=2))
    for second in range(1, 8):
        buffer.set_transform(stamped("map", "base_link", second * SECOND, (float(second), 0.0, 0.0)), "test")
    assert x_of(buffer, "map", "base_link", 5 * SECOND) == 5.0
    with pytest.raises(ExtrapolationException):
        buffer.lookup_transform("map", "base_link", Time(nanoseconds=3 * SECOND))
    buffer.set_transform(stamped("map", "base_link", 2 * SECOND), "test")
    with pytest.raises(ExtrapolationException):
        buffer.lookup_transform("map", "base_link", Time(nanoseconds=2 * SECOND))


def test_the_default_cache_time_is_ten_seconds() -> None:
    buffer = moving(last=13)
    assert buffer.can_transform("map", "base_link", Time(nanoseconds=3 * SECOND))
    assert not buffer.can_transform("map", "base_link", Time(nanoseconds=SECOND))


def test_clear_deletes_moving_transforms_and_keeps_static_ones() -> None:
    buffer = moving()
    buffer.clear()
    assert not buffer.can_transform("map", "base_link", LATEST)
    assert buffer.can_transform("base_link", "cam_front", LATEST)
    buffer.set_transform(stamped("map", "base_link", SECOND, (4.0, 0.0, 0.0)), "test")
    assert x_of(buffer, "map", "cam_front", SECOND) == 6.0


def test_a_frame_may_become_static_and_moving_again() -> None:
    buffer = moving()
    buffer.set_transform_static(stamped("map", "base_link", 0, (7.0, 0.0, 0.0)), "test")
    assert x_of(buffer, "map", "base_link", 99 * SECOND) == 7.0
    buffer.set_transform(stamped("map", "base_link", SECOND, (8.0, 0.0, 0.0)), "test")
    assert not buffer.can_transform("map", "base_link", Time(nanoseconds=2 * SECOND))
    assert x_of(buffer, "map", "base_link", SECOND) == 8.0


# The tree as text


def test_all_frames_as_yaml_and_as_text() -> None:
    assert yaml.safe_load(Buffer().all_frames_as_yaml()) == []
    buffer = moving()
    frames = yaml.safe_load(buffer.all_frames_as_yaml())
    assert set(frames) == {"base_link", "cam_front"}
    assert frames["base_link"]["parent"] == "map"
    assert frames["base_link"]["broadcaster"] == "test"
    assert frames["base_link"]["rate"] == pytest.approx(5 / 4)
    assert frames["base_link"]["oldest_transform"] == 1.0
    assert frames["base_link"]["most_recent_transform"] == 5.0
    assert frames["base_link"]["buffer_length"] == 4.0
    text = buffer.all_frames_as_string()
    assert all(name in text for name in ("map", "base_link", "cam_front"))
