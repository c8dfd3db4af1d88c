# SPDX-License-Identifier: Apache-2.0
"""Calibration and transform messages -> validated matrices, for messages of rclpy and of `rosbags`.

A sensor_msgs/CameraInfo describes two images: the raw one by K and D, the rectified one by P.
`image_geometry` selects which of them a camera publishes.
"""

import re
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ftkd_core.errors import UserError
from ftkd_core.geometry import is_rigid, make_transform
from ftkd_core.lens import Lens
from ftkd_ros.convert.from_ros import transform_to_matrix

IMAGE_GEOMETRIES: Final = ("auto", "rectified", "raw")
"""rectified: the images fit P, or K if P is zero. raw: they fit K and D. auto: see `image_geometry_of`."""

_QUATERNION_TOLERANCE: Final = 0.01
_RECTIFIED_TOPIC: Final = re.compile(r"(?<!un)(?<!non_)rect(?!ang)")
_RAW_TOPIC: Final = re.compile(r"(^|[/_])raw([/_]|$)")

Matrix = NDArray[np.float64]


class CameraGeometry(NamedTuple):
    """Geometry of one camera: intrinsics (3, 3) in pixels; ego_from_camera and global_from_ego (4, 4) at the
    exposure; lens, None for images without distortion.
    """

    intrinsics: Matrix
    ego_from_camera: Matrix
    global_from_ego: Matrix
    lens: Lens | None = None


class ImageCalibration(NamedTuple):
    """Calibration of the published images: intrinsics (3, 3) in their pixels; lens; frame_from_camera (4, 4),
    the rectifying rotation of a raw image (identity for a rectified one); reason, one phrase for the log."""

    intrinsics: Matrix
    lens: Lens | None
    frame_from_camera: Matrix
    reason: str


def read_calibration(
    info: Any,
    camera: str,
    image_size: tuple[int, int],
    *,
    image_geometry: str = "auto",
    topic: str = "",
) -> ImageCalibration:
    """Return the calibration of a sensor_msgs/CameraInfo for the images on `topic` of (width, height).

    Binning and region of interest of the message are applied. Raises UserError that names the camera for a
    matrix that is not finite or not invertible, an unknown distortion model, and the calibration of another
    image size: intrinsics are never rescaled without a reason in the message, because boxes would be
    misplaced if the image was cropped.
    """
    chosen, reason = image_geometry_of(info, image_geometry, topic)
    crop = _Crop.of(info, camera, image_size)
    if chosen == "rectified":
        projection = np.array(info.p, dtype=np.float64).reshape(3, 4)[:, :3]
        matrix, name = (projection, "P") if projection.any() else (_camera_matrix(info), "K")
        return ImageCalibration(
            crop.apply(_checked(matrix, name, camera)), None, np.eye(4), f"{reason}: {name}"
        )
    matrix = crop.apply(_checked(_camera_matrix(info), "K", camera))
    lens = _lens(info, camera)
    rotation = np.array(info.r, dtype=np.float64).reshape(3, 3)
    rectifying = make_transform(rotation) if rotation.any() else np.eye(4)
    if not is_rigid(rectifying):
        raise UserError(f"{camera}: R {rotation.ravel().tolist()} in camera_info is not a rotation")
    what = "K" if lens is None else f"K and D ({lens.model})"
    return ImageCalibration(matrix, lens, rectifying, f"{reason}: {what}")


def image_geometry_of(info: Any, image_geometry: str, topic: str) -> tuple[str, str]:
    """Return `rectified` or `raw`, and why.

    `auto`: a topic with "rect" in its name is rectified; one with "raw" is raw; else images with distortion
    coefficients are raw, and those without are rectified.
    """
    if image_geometry not in IMAGE_GEOMETRIES:
        raise UserError(f"image_geometry {image_geometry!r}: expected one of {', '.join(IMAGE_GEOMETRIES)}")
    if image_geometry != "auto":
        return image_geometry, f"{image_geometry} images as set"
    if _RECTIFIED_TOPIC.search(topic.lower()):
        return "rectified", f"rectified images by the name of {topic}"
    distorted = any(info.d) or _is_fisheye(info)
    if _RAW_TOPIC.search(topic.lower()):
        return "raw", f"raw images by the name of {topic}"
    if distorted:
        return "raw", "raw images, because camera_info has distortion"
    return "rectified", "images without distortion"


def _is_fisheye(info: Any) -> bool:
    """Return whether zero coefficients are not a pinhole."""
    return info.distortion_model in ("equidistant", "fisheye") and len(info.d) > 0


def _camera_matrix(info: Any) -> Matrix:
    return np.array(info.k, dtype=np.float64).reshape(3, 3)


def _checked(matrix: Matrix, name: str, camera: str) -> Matrix:
    """Return the matrix if it is that of a camera."""
    plausible = np.isfinite(matrix).all() and matrix[0, 0] > 0 and matrix[1, 1] > 0
    if not plausible or not np.allclose(matrix[2], [0, 0, 1]) or abs(np.linalg.det(matrix)) < 1e-6:
        raise UserError(
            f"{camera}: intrinsics {matrix.ravel().tolist()} ({name}) in camera_info are not those of a "
            "camera; expected finite focal lengths > 0 and a last row of 0 0 1 (is the camera calibrated?)"
        )
    return matrix


def _lens(info: Any, camera: str) -> Lens | None:
    """Return the lens of raw images; None if there is no distortion."""
    coefficients = tuple(float(value) for value in info.d)
    if not any(coefficients) and not _is_fisheye(info):
        return None
    try:
        return Lens(str(info.distortion_model), coefficients)
    except UserError as error:
        raise UserError(f"{camera}: {error}; if they are rectified already, set image_geometry") from None


class _Crop(NamedTuple):
    """Part of the full sensor image that is published: offset and size before binning, and binning, in x and
    y."""

    left: int
    top: int
    binning_x: int
    binning_y: int

    @classmethod
    def of(cls, info: Any, camera: str, image_size: tuple[int, int]) -> "_Crop":
        """Raises UserError if the image has another size than the message states."""
        binning_x, binning_y = max(int(info.binning_x), 1), max(int(info.binning_y), 1)
        roi, full = info.roi, (int(info.width), int(info.height))
        has_roi = roi.width > 0 and roi.height > 0
        width, height = (int(roi.width), int(roi.height)) if has_roi else full
        expected = (width / binning_x, height / binning_y)
        if any(abs(size - wanted) >= 1 for size, wanted in zip(image_size, expected, strict=True)):
            parts = f" (region of interest {width} x {height})" if has_roi else ""
            parts += f" (binning {binning_x} x {binning_y})" if (binning_x, binning_y) != (1, 1) else ""
            raise UserError(
                f"{camera}: camera_info is for {full[0]} x {full[1]} pixels{parts} but the image has "
                f"{image_size[0]} x {image_size[1]}; publish the calibration of the published image"
            )
        left, top = (int(roi.x_offset), int(roi.y_offset)) if has_roi else (0, 0)
        return cls(left, top, binning_x, binning_y)

    def apply(self, matrix: Matrix) -> Matrix:
        """Return the intrinsics of the published image from those of the full image."""
        result = matrix.copy()
        result[0, 2] -= self.left
        result[1, 2] -= self.top
        result[0] /= self.binning_x
        result[1] /= self.binning_y
        return result


def read_rigid(transform: Any, name: str) -> Matrix:
    """Return the matrix (4, 4) of a geometry_msgs/Transform or Pose.

    Raises UserError that starts with `name` if it is not rigid.
    """
    rotation = transform.rotation if hasattr(transform, "rotation") else transform.orientation
    norm = float(np.linalg.norm([rotation.x, rotation.y, rotation.z, rotation.w]))
    if not abs(norm - 1) <= _QUATERNION_TOLERANCE:  # also true for nan
        raise UserError(f"{name} has a quaternion of length {norm:.3f}; expected length 1")
    matrix = transform_to_matrix(transform)
    if not is_rigid(matrix):
        raise UserError(f"{name} is not rigid: {matrix.tolist()}")
    return matrix
