# SPDX-License-Identifier: Apache-2.0
"""Transforms: round trips and agreement with SciPy and torch."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation, Slerp

from ftkd_core.geometry import (
    interpolate_rigid,
    invert_rigid,
    is_rigid,
    make_transform,
    quaternion_to_rotation,
    rotation_to_quaternion,
    transform_points,
    yaw_of,
    yaw_transform,
)

angles = st.floats(-3.1, 3.1)
seeds = st.integers(0, 2**32 - 1)


def random_pose(seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    return make_transform(random.normal(size=4), random.uniform(-2000, 2000, 3))


@given(seeds)
def test_invert_rigid_gives_the_inverse_in_numpy_and_torch(seed: int) -> None:
    pose = random_pose(seed)
    assert np.allclose(invert_rigid(pose) @ pose, np.eye(4), atol=1e-9)
    assert np.allclose(invert_rigid(torch.from_numpy(pose)).numpy(), np.linalg.inv(pose), atol=1e-9)


@given(seeds)
def test_quaternions_agree_with_scipy_and_round_trip(seed: int) -> None:
    q = np.random.default_rng(seed).normal(size=4)
    rotation = quaternion_to_rotation(q)
    assert np.allclose(rotation, Rotation.from_quat(np.roll(q, -1)).as_matrix(), atol=1e-12)
    assert np.allclose(quaternion_to_rotation(rotation_to_quaternion(rotation)), rotation, atol=1e-9)


@given(seeds, st.floats(0, 1))
def test_interpolation_agrees_with_scipy_slerp(seed: int, fraction: float) -> None:
    first, second = random_pose(seed), random_pose(seed + 1)
    middle = interpolate_rigid(first, second, fraction)
    slerp = Slerp([0, 1], Rotation.from_matrix(np.stack([first[:3, :3], second[:3, :3]])))
    assert np.allclose(middle[:3, :3], slerp(fraction).as_matrix(), atol=1e-6)
    assert np.allclose(middle[:3, 3], (1 - fraction) * first[:3, 3] + fraction * second[:3, 3])
    assert is_rigid(middle)


@given(angles)
def test_yaw_of_inverts_yaw_transform(yaw: float) -> None:
    assert float(yaw_of(torch.from_numpy(yaw_transform(yaw)))) == pytest.approx(yaw)


def test_transform_points_rotates_and_translates() -> None:
    map_from_ego = yaw_transform(np.pi / 2, (10.0, 0.0, 0.0))
    ahead = transform_points(map_from_ego, np.array([[5.0, 0.0, 1.0]]))
    assert np.allclose(ahead, [[10.0, 5.0, 1.0]])


@pytest.mark.parametrize(
    "matrix", [np.full((4, 4), np.nan), np.diag([1.0, 1.0, -1.0, 1.0]), np.eye(4) * 2, np.eye(3)]
)
def test_is_rigid_rejects_other_matrices(matrix: np.ndarray) -> None:
    assert not is_rigid(matrix)


@pytest.mark.parametrize("quaternion", [[0, 0, 0, 0], [np.nan, 0, 0, 1], [np.inf, 0, 0, 0]])
def test_invalid_quaternions_are_refused(quaternion: list[float]) -> None:
    with pytest.raises(ValueError, match="not a rotation"):
        quaternion_to_rotation(quaternion)
