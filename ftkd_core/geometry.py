# SPDX-License-Identifier: Apache-2.0
"""Rigid transforms and rotations.

A transform is a (..., 4, 4) array named `dst_from_src`; transforms are composed so that the inner names
cancel (`global_from_camera = global_from_ego @ ego_from_camera`). Quaternions are (w, x, y, z), as in
nuScenes and pyquaternion. Ego is base_link (x forward, y left, z up, REP-103); camera is optical (z forward,
x right, y down). `invert_rigid` and `transform_points` accept torch tensors and numpy arrays.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.spatial.transform import Rotation
from torch import Tensor

Array = NDArray[Any]
Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")
ArrayT = TypeVar("ArrayT", NDArray[Any], Tensor)


def full_precision(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Decorate a function to compute in the precision of its arguments, also under autocast.

    Poses, projections and global positions need it: in bfloat16, x = 1,000 m has an error of up to 4 m.
    """

    @functools.wraps(function)
    def computed(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        with torch.autocast(_device_type((*args, *kwargs.values())), enabled=False):
            return function(*args, **kwargs)

    return computed


def _device_type(values: tuple[Any, ...]) -> str:
    """Return the device type of the first tensor in values, also inside tuples; cpu without a tensor."""
    for value in values:
        if isinstance(value, Tensor):
            return value.device.type
        if isinstance(value, tuple) and (found := _device_type(value)) != "cpu":
            return found
    return "cpu"


def invert_rigid(dst_from_src: ArrayT) -> ArrayT:
    """Return the inverse (..., 4, 4) of rigid transforms by transposition, which is exact."""
    rotation = dst_from_src[..., :3, :3].swapaxes(-1, -2)
    inverse: ArrayT = dst_from_src.clone() if isinstance(dst_from_src, Tensor) else dst_from_src.copy()
    inverse[..., :3, :3] = rotation
    inverse[..., :3, 3:] = -(rotation @ dst_from_src[..., :3, 3:])
    return inverse


def transform_points(dst_from_src: ArrayT, points_src: ArrayT) -> ArrayT:
    """Return points (..., P, 3) of frame src in frame dst; `dst_from_src` is (..., 4, 4)."""
    rotation = dst_from_src[..., :3, :3].swapaxes(-1, -2)
    moved: ArrayT = points_src @ rotation + dst_from_src[..., None, :3, 3]
    return moved


def yaw_of(dst_from_src: Tensor) -> Tensor:
    """Return the heading (...) in radians of the src x axis in the dst x-y plane."""
    return torch.atan2(dst_from_src[..., 1, 0], dst_from_src[..., 0, 0])


def line_of_sight(points_ego: Tensor) -> Tensor:
    """Return unit vectors (..., 2) in the ground plane from the origin to points (..., 3); x at 0."""
    towards = points_ego[..., :2]
    distance = towards.norm(dim=-1, keepdim=True)
    forward = torch.eye(2, device=towards.device)[0]  # torch.tensor([1, 0]) would be a copy from the host
    return torch.where(distance > 1e-3, towards / distance.clamp(min=1e-3), forward)


def rotate_2d(vectors: Tensor, axis: Tensor) -> Tensor:
    """Rotate vectors (..., 2) by the angle of the unit vectors `axis` (..., 2)."""
    (x, y), (cos, sin) = vectors.unbind(-1), axis.unbind(-1)
    return torch.stack([x * cos - y * sin, x * sin + y * cos], dim=-1)


def rotate_2d_back(vectors: Tensor, axis: Tensor) -> Tensor:
    """Invert `rotate_2d`."""
    return rotate_2d(vectors, torch.stack([axis[..., 0], -axis[..., 1]], dim=-1))


def optional_matrix(rows: Sequence[Sequence[float]] | None) -> Tensor | None:
    """Return rows of a matrix as a float64 tensor; None stays None."""
    return None if rows is None else torch.tensor(rows, dtype=torch.float64)


def quaternion_to_rotation(quaternion: ArrayLike) -> Array:
    """Rotation matrices (..., 3, 3) float64 of quaternions (..., 4) given as (w, x, y, z); they are
    normalised first.

    Raises ValueError for a quaternion that is not finite or has (almost) no length.
    """
    q = np.asarray(quaternion, dtype=np.float64)
    norm = np.linalg.norm(q, axis=-1, keepdims=True)
    if not np.all(np.isfinite(norm)) or np.any(norm < 1e-8):
        raise ValueError(
            f"quaternion {q.tolist()} is not a rotation; expected four finite numbers of non-zero length"
        )
    flat = Rotation.from_quat(q.reshape(-1, 4)[:, [1, 2, 3, 0]])
    matrices: Array = flat.as_matrix().reshape(*q.shape[:-1], 3, 3)
    return matrices


def rotation_to_quaternion(rotation: ArrayLike) -> Array:
    """Unit quaternion (4,) as (w, x, y, z), w >= 0, of one rotation matrix (3, 3)."""
    x, y, z, w = Rotation.from_matrix(np.asarray(rotation, dtype=np.float64)).as_quat()
    q = np.array([w, x, y, z])
    return q if w >= 0 else -q


def make_transform(rotation: ArrayLike | None = None, translation: ArrayLike | None = None) -> Array:
    """Return a float64 (4, 4) transform of a rotation (3, 3) or quaternion (4,) and a translation (3,); None
    is identity."""
    matrix = np.eye(4)
    if rotation is not None:
        r = np.asarray(rotation, dtype=np.float64)
        matrix[:3, :3] = quaternion_to_rotation(r) if r.shape == (4,) else r
    if translation is not None:
        matrix[:3, 3] = np.asarray(translation, dtype=np.float64)
    return matrix


def yaw_transform(yaw: float, translation: ArrayLike = (0.0, 0.0, 0.0)) -> Array:
    """Return the float64 (4, 4) transform that rotates by `yaw` radians about z and translates by
    `translation` metres."""
    c, s = np.cos(yaw), np.sin(yaw)
    return make_transform(np.array([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]]), translation)


def rotate_about_z(vectors: Array, yaw: Array) -> Array:
    """Vectors (..., 2) or (..., 3) rotated about z by yaw (...) radians, broadcast against each other."""
    cos, sin = np.cos(yaw), np.sin(yaw)
    x = cos * vectors[..., 0] - sin * vectors[..., 1]
    y = sin * vectors[..., 0] + cos * vectors[..., 1]
    return np.stack([x, y, *np.moveaxis(vectors[..., 2:], -1, 0)], axis=-1)


def is_rigid(matrix: Array, tolerance: float = 1e-3) -> bool:
    """Return whether a (4, 4) matrix is finite and consists of a proper rotation and a translation."""
    if matrix.shape != (4, 4) or not np.all(np.isfinite(matrix)):
        return False
    rotation = matrix[:3, :3]
    return bool(
        np.allclose(rotation @ rotation.T, np.eye(3), atol=tolerance)
        and np.linalg.det(rotation) > 0
        and np.allclose(matrix[3], [0, 0, 0, 1], atol=tolerance)
    )


def interpolate_rigid(first: Array, second: Array, fraction: float) -> Array:
    """Pose (4, 4) between two poses: linear translation and spherical-linear rotation; `fraction` may lie
    outside 0..1."""
    start, end = (Rotation.from_matrix(pose[:3, :3]) for pose in (first, second))
    turned = start * Rotation.from_rotvec(fraction * (start.inv() * end).as_rotvec())
    return make_transform(turned.as_matrix(), (1 - fraction) * first[:3, 3] + fraction * second[:3, 3])
