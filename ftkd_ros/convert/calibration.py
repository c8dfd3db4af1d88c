# SPDX-License-Identifier: Apache-2.0
"""Calibration and transform messages -> validated matrices, for messages of rclpy and of `rosbags`."""

from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ftkd_core.errors import UserError
from ftkd_core.geometry import is_rigid
from ftkd_ros.convert.from_ros import transform_to_matrix

_QUATERNION_TOLERANCE: Final = 0.01


class CameraGeometry(NamedTuple):
    """Geometry of one camera: intrinsics (3, 3) in pixels; ego_from_camera and global_from_ego (4, 4) at the
    exposure.
    """

    intrinsics: NDArray[np.float64]
    ego_from_camera: NDArray[np.float64]
    global_from_ego: NDArray[np.float64]


def read_intrinsics(info: Any, camera: str, image_size: tuple[int, int]) -> NDArray[np.float64]:
    """Return the intrinsics (3, 3) of a sensor_msgs/CameraInfo for an image of (width, height).

    Raises UserError that names the camera for a matrix that is not finite or not invertible, and for the
    calibration of another image size. Intrinsics are never rescaled: if the image was cropped, boxes would be
    misplaced.
    """
    matrix = np.array(info.k, dtype=np.float64).reshape(3, 3)
    plausible = np.isfinite(matrix).all() and matrix[0, 0] > 0 and matrix[1, 1] > 0
    if not plausible or not np.allclose(matrix[2], [0, 0, 1]) or abs(np.linalg.det(matrix)) < 1e-6:
        raise UserError(
            f"{camera}: intrinsics {matrix.ravel().tolist()} in camera_info are not those of a camera; "
            "expected finite focal lengths > 0 and a last row of 0 0 1 (is the camera calibrated?)"
        )
    size = (int(info.width), int(info.height))
    if size != image_size:
        raise UserError(
            f"{camera}: camera_info is for {size[0]} x {size[1]} pixels but the image has "
            f"{image_size[0]} x {image_size[1]}; publish the calibration of the published image"
        )
    return matrix


def read_rigid(transform: Any, name: str) -> NDArray[np.float64]:
    """Return the matrix (4, 4) of a geometry_msgs/Transform.

    Raises UserError that starts with `name` if it is not rigid.
    """
    rotation = transform.rotation
    norm = float(np.linalg.norm([rotation.x, rotation.y, rotation.z, rotation.w]))
    if not abs(norm - 1) <= _QUATERNION_TOLERANCE:  # also true for nan
        raise UserError(f"{name} has a quaternion of length {norm:.3f}; expected length 1")
    matrix = transform_to_matrix(transform)
    if not is_rigid(matrix):
        raise UserError(f"{name} is not rigid: {matrix.tolist()}")
    return matrix
