# SPDX-License-Identifier: Apache-2.0
"""Lens models of raw camera images: `plumb_bob`, `rational_polynomial` and `equidistant`, as in
sensor_msgs/CameraInfo and OpenCV.

A lens maps rays of the camera frame to image coordinates at focal length 1. Polynomials only fit inside the
field of view that was calibrated: farther out they may fold back, so that two rays meet in one pixel.
`project` marks such rays.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import cv2
import numpy as np
from numpy.typing import NDArray

from ftkd_core.errors import UserError

Array = NDArray[np.float64]

_COUNTS: Final[dict[str, tuple[int, ...]]] = {
    "plumb_bob": (4, 5),
    "rational_polynomial": (8, 12, 14),
    "equidistant": (4,),
}
_ALIASES: Final = {"fisheye": "equidistant"}
_FARTHEST_DEG: Final = {"plumb_bob": 89.0, "rational_polynomial": 89.0, "equidistant": 180.0}
_FOLD_STEPS: Final = 2000
_EDGE_STEPS: Final = 721
_NEWTON_STEPS: Final = 3
_PLANE_STEP: Final = 1e-6
_SAME_POINT: Final = 1e-6
_RIGHT: Final = np.array([1.0, 0.0])
_DOWN: Final = np.array([0.0, 1.0])


@dataclass(frozen=True)
class Lens:
    """A lens model and its coefficients in OpenCV's order. UserError for an unknown model or a wrong number
    of coefficients."""

    model: str
    coefficients: tuple[float, ...]

    def __post_init__(self) -> None:
        model = _ALIASES.get(self.model, self.model)
        object.__setattr__(self, "model", model)
        if model not in _COUNTS:
            raise UserError(
                f"distortion model {self.model!r} is unknown; expected {', '.join(_COUNTS)}; rectify "
                "the images (image_proc) and use those"
            )
        if len(self.coefficients) not in _COUNTS[model] or not np.isfinite(self.coefficients).all():
            counts = " or ".join(map(str, _COUNTS[model]))
            raise UserError(
                f"distortion coefficients {list(self.coefficients)} of {model}; expected {counts} "
                "finite numbers"
            )

    @property
    def is_identity(self) -> bool:
        """Whether the lens is a pinhole."""
        return self.model != "equidistant" and not any(self.coefficients)

    def project(self, rays: Array) -> tuple[Array, NDArray[np.bool_]]:
        """Return image coordinates (P, 2) at focal length 1 of rays (P, 3), and whether the lens maps them
        (P,)."""
        angles = np.arctan2(np.hypot(rays[:, 0], rays[:, 1]), rays[:, 2])
        valid = angles < self.limit_rad
        if self.model == "equidistant":
            radius = np.maximum(np.hypot(rays[:, 0], rays[:, 1]), 1e-12)
            scale = _fisheye_radius(angles, self.coefficients) / radius
            return rays[:, :2] * scale[:, None], valid
        safe = np.where(valid[:, None], rays, (0.0, 0.0, 1.0))
        points, _ = cv2.projectPoints(
            safe.reshape(-1, 1, 3), np.zeros(3), np.zeros(3), np.eye(3), np.array(self.coefficients)
        )
        return np.asarray(points, dtype=np.float64).reshape(-1, 2), valid

    def unproject(self, points: Array) -> tuple[Array, NDArray[np.bool_]]:
        """Return unit rays (P, 3) of image coordinates (P, 2) at focal length 1, and whether the lens maps a
        ray there (P,); the inverse of `project`."""
        angles = np.linspace(0.0, self.limit_rad, _FOLD_STEPS)
        radius, directions = np.hypot(points[:, 0], points[:, 1]), np.arctan2(points[:, 1], points[:, 0])
        reached = self._radius(angles)
        angle = np.interp(radius, reached, angles)
        if self.model == "equidistant":
            for _ in range(_NEWTON_STEPS):
                step = (_fisheye_radius(angle, self.coefficients) - radius) / _fisheye_slope(
                    angle, self.coefficients
                )
                angle = np.clip(angle - step, 0.0, self.limit_rad)
            rays = _rays_at(angle, directions)
        else:
            # The radial part is inverted by the table; Newton's method adds the tangential part.
            plane = (np.tan(angle)[:, None]) * np.stack([np.cos(directions), np.sin(directions)], axis=1)
            plane = self._newton(plane, points)
            same = np.abs(self._project_plane(plane) - points) < _SAME_POINT
            seen = np.hypot(plane[:, 0], plane[:, 1]) < np.tan(self.limit_rad)
            return _normalised(plane), same.all(axis=1) & seen
        found, valid = self.project(rays)
        return rays, valid & (np.abs(found - points) < _SAME_POINT).all(axis=1)

    def _newton(self, plane: Array, points: Array) -> Array:
        """Refine coordinates (P, 2) in the plane z = 1 so that they project to points (P, 2)."""
        for _ in range(_NEWTON_STEPS):
            value = self._project_plane(plane)
            across = (self._project_plane(plane + _PLANE_STEP * _RIGHT) - value) / _PLANE_STEP
            down = (self._project_plane(plane + _PLANE_STEP * _DOWN) - value) / _PLANE_STEP
            rest = points - value
            determinant = across[:, 0] * down[:, 1] - across[:, 1] * down[:, 0]
            scale = np.where(np.abs(determinant) > 1e-9, determinant, np.inf)[:, None]
            step = np.stack(
                [
                    rest[:, 0] * down[:, 1] - rest[:, 1] * down[:, 0],
                    across[:, 0] * rest[:, 1] - across[:, 1] * rest[:, 0],
                ],
                axis=1,
            )
            plane = plane + np.clip(step / scale, -0.1, 0.1)
        return plane

    def _project_plane(self, plane: Array) -> Array:
        """Return image coordinates (P, 2) of points (P, 2) in the plane z = 1: `project` without its checks,
        several times as fast as OpenCV, which also computes derivatives."""
        k = np.zeros(14)
        k[: len(self.coefficients)] = self.coefficients
        if k[12:].any():  # a tilted sensor
            return self.project(np.concatenate([plane, np.ones((len(plane), 1))], axis=1))[0]
        x, y = plane.T
        r2, xy = x * x + y * y, 2 * x * y
        radial = (1 + r2 * (k[0] + r2 * (k[1] + r2 * k[4]))) / (1 + r2 * (k[5] + r2 * (k[6] + r2 * k[7])))
        u = x * radial + k[2] * xy + k[3] * (r2 + 2 * x * x) + r2 * (k[8] + r2 * k[9])
        v = y * radial + k[2] * (r2 + 2 * y * y) + k[3] * xy + r2 * (k[10] + r2 * k[11])
        return np.stack([u, v], axis=1)

    @cached_property
    def limit_rad(self) -> float:
        """Angle from the optical axis up to which the image radius grows; the polynomial folds back there, or
        its model ends."""
        angles = np.deg2rad(np.linspace(0.0, _FARTHEST_DEG[self.model], _FOLD_STEPS))
        radius = self._radius(angles)
        growing = np.diff(radius) > 0
        first = int(np.argmin(growing)) if not growing.all() else len(growing)
        return float(angles[first])

    def _radius(self, angles: Array) -> Array:
        """Return the image radius at focal length 1 of angles from the optical axis, without the tangential
        terms."""
        if self.model == "equidistant":
            return _fisheye_radius(angles, self.coefficients)
        k = np.zeros(14)
        k[: len(self.coefficients)] = self.coefficients
        r = np.tan(angles)
        r2 = r * r
        above = 1 + r2 * (k[0] + r2 * (k[1] + r2 * k[4]))
        below = 1 + r2 * (k[5] + r2 * (k[6] + r2 * k[7]))
        return np.asarray(np.where(below > 1e-6, r * above / np.maximum(below, 1e-6), 0.0))


def lens_columns(lens: Lens) -> dict[str, Any]:
    """Return the columns of a camera's row in `calibrated_sensor` for a lens, which nuScenes does not have;
    the inverse of `lens_of_row`."""
    return {"distortion_model": lens.model, "distortion_coefficients": list(lens.coefficients)}


def lens_of_row(row: Mapping[str, Any]) -> Lens | None:
    """Return the lens of a row of `calibrated_sensor`, None without its columns. Raises UserError as
    `Lens`."""
    if "distortion_model" not in row:
        return None
    coefficients = row.get("distortion_coefficients")
    if not isinstance(coefficients, list) or not all(isinstance(c, int | float) for c in coefficients):
        raise UserError(f"distortion_coefficients {coefficients!r}: expected a list of numbers")
    return Lens(str(row["distortion_model"]), tuple(float(c) for c in coefficients))


def _fisheye_radius(angles: Array, coefficients: Sequence[float]) -> Array:
    a2 = angles * angles
    k1, k2, k3, k4 = coefficients
    return np.asarray(angles * (1 + a2 * (k1 + a2 * (k2 + a2 * (k3 + a2 * k4)))))


def _fisheye_slope(angles: Array, coefficients: Sequence[float]) -> Array:
    a2 = angles * angles
    k1, k2, k3, k4 = coefficients
    slope = 1 + a2 * (3 * k1 + a2 * (5 * k2 + a2 * (7 * k3 + a2 * 9 * k4)))
    return np.asarray(np.maximum(slope, 1e-3))


def _rays_at(angles: Array, directions: Array) -> Array:
    """Return unit rays (P, 3) at these angles from the optical axis and directions in the image."""
    across = np.sin(angles)
    return np.stack([across * np.cos(directions), across * np.sin(directions), np.cos(angles)], axis=1)


def _normalised(plane: Array) -> Array:
    rays = np.concatenate([plane, np.ones((len(plane), 1))], axis=1)
    return np.asarray(rays / np.linalg.norm(rays, axis=1, keepdims=True))


def project_pixels(rays: Array, intrinsics: Array, lens: Lens | None) -> tuple[Array, NDArray[np.bool_]]:
    """Return pixels (P, 2) of rays (P, 3) in the camera frame, and whether the camera can see them (P,);
    image borders are not checked."""
    if lens is None:
        valid = rays[:, 2] > 1e-6
        points = rays[:, :2] / np.where(valid, rays[:, 2], 1.0)[:, None]
    else:
        points, valid = lens.project(rays)
    return points @ intrinsics[:2, :2].T + intrinsics[:2, 2], valid


def unproject_pixels(pixels: Array, intrinsics: Array, lens: Lens | None) -> tuple[Array, NDArray[np.bool_]]:
    """Return unit rays (P, 3) in the camera frame of pixels (P, 2), and whether the camera sees there (P,);
    the inverse of `project_pixels`."""
    offsets: Array = pixels - intrinsics[:2, 2]
    points: Array = offsets @ np.linalg.inv(intrinsics[:2, :2]).T
    if lens is None:
        return _normalised(points), np.ones(len(points), dtype=bool)
    return lens.unproject(points)


def check_fold(intrinsics: Array, lens: Lens | None, size: tuple[int, int], camera: str) -> None:
    """Raise UserError if the lens folds back before the nearest border of an image of `size` (width,
    height)."""
    if lens is None:
        return
    reached = float(lens._radius(np.array([lens.limit_rad]))[0])
    margins = (
        intrinsics[0, 2] / intrinsics[0, 0], (size[0] - intrinsics[0, 2]) / intrinsics[0, 0],
        intrinsics[1, 2] / intrinsics[1, 1], (size[1] - intrinsics[1, 2]) / intrinsics[1, 1],
    )  # fmt: skip
    ends = _FARTHEST_DEG[lens.model] - np.rad2deg(lens.limit_rad) < 0.1
    if not ends and reached < min(margins):
        raise UserError(
            f"{camera}: distortion {lens.model} {list(lens.coefficients)} folds back "
            f"{np.rad2deg(lens.limit_rad):.0f} degrees from the optical axis, inside the image; "
            "calibrate again"
        )


def horizontal_field(intrinsics: Array, lens: Lens | None, size: tuple[int, int]) -> tuple[float, float]:
    """Return the angles (left, right) in radians from the optical axis to the image borders along the row of
    the principal point; right is positive.

    Both are 0 for a camera whose optical axis lies outside its image.
    """
    angles = np.linspace(-np.pi, np.pi, 2 * _EDGE_STEPS - 1)
    rays = np.stack([np.sin(angles), np.zeros_like(angles), np.cos(angles)], axis=1)
    pixels, valid = project_pixels(rays, intrinsics, lens)
    seen = valid & (pixels[:, 0] >= 0) & (pixels[:, 0] <= size[0])
    middle = _EDGE_STEPS - 1
    if not seen[middle]:
        return 0.0, 0.0
    right = int(np.argmin(np.append(seen[middle:], False))) - 1
    left = int(np.argmin(np.append(seen[middle::-1], False))) - 1
    return float(angles[middle - left]), float(angles[middle + right])
