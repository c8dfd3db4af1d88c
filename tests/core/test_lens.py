# SPDX-License-Identifier: Apache-2.0
"""Lens models against OpenCV; folding; fields of view."""

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftkd_core.errors import UserError
from ftkd_core.lens import (
    Lens,
    check_fold,
    horizontal_field,
    lens_columns,
    lens_of_row,
    project_pixels,
    unproject_pixels,
)

K = np.array([[400.0, 0, 320], [0, 410, 240], [0, 0, 1]])
SMALL = st.floats(-0.05, 0.05)


@settings(max_examples=30, deadline=None)
@given(st.tuples(SMALL, SMALL, SMALL, SMALL), st.integers(0, 2**31))
def test_equidistant_is_that_of_opencv(coefficients: tuple[float, float, float, float], seed: int) -> None:
    rays = np.random.default_rng(seed).uniform([-1, -1, 1], [1, 1, 2], (20, 3))
    lens = Lens("equidistant", coefficients)
    found, valid = project_pixels(rays, K, lens)
    expected, _ = cv2.fisheye.projectPoints(  # type: ignore[attr-defined]
        rays[:, None], np.zeros(3), np.zeros(3), K, np.array(coefficients)
    )
    assert valid.any()
    np.testing.assert_allclose(found[valid], expected[valid, 0], atol=1e-6)


@pytest.mark.parametrize(
    ("model", "coefficients"),
    [
        ("plumb_bob", (-0.28, 0.09, 0.001, -0.002)),
        ("plumb_bob", (-0.28, 0.09, 0.001, -0.002, -0.01)),
        ("rational_polynomial", (0.5, -0.1, 0.001, 0.0, 0.02, 0.8, 0.05, 0.03)),
    ],
)
def test_polynomials_undo_opencv(model: str, coefficients: tuple[float, ...]) -> None:
    points = np.random.default_rng(0).uniform(-0.3, 0.3, (50, 2))
    rays = np.column_stack([points, np.ones(50)])
    pixels, valid = project_pixels(rays, K, Lens(model, coefficients))
    criteria = (cv2.TERM_CRITERIA_COUNT | cv2.TERM_CRITERIA_EPS, 100, 1e-9)
    undone = cv2.undistortPointsIter(pixels[:, None], K, np.array(coefficients), None, None, criteria)
    assert valid.all()
    np.testing.assert_allclose(undone[:, 0], points, atol=1e-5)


def test_rays_beyond_the_fold_are_not_seen() -> None:
    lens = Lens("plumb_bob", (-0.3, 0.0, 0.0, 0.0))
    edge = np.rad2deg(lens.limit_rad)  # r (1 - 0.3 r^2) grows up to r = 1.054
    assert edge == pytest.approx(np.rad2deg(np.arctan(np.sqrt(1 / 0.9))), abs=0.1)
    rays = np.array([[np.tan(np.deg2rad(a)), 0, 1] for a in (edge - 1, edge + 1)])
    assert project_pixels(rays, K, lens)[1].tolist() == [True, False]


def test_distortion_that_folds_inside_the_image_is_refused_by_name() -> None:
    check_fold(K, Lens("plumb_bob", (-0.3, 0.0, 0.0, 0.0)), (640, 480), "cam_front")
    with pytest.raises(UserError, match=r"cam_front: distortion plumb_bob .* folds back"):
        check_fold(K, Lens("plumb_bob", (-2.0, 0.0, 0.0, 0.0)), (640, 480), "cam_front")


@pytest.mark.parametrize(
    ("model", "coefficients", "message"),
    [
        ("thin_prism", (0.1,), "'thin_prism' is unknown; expected plumb_bob"),
        ("plumb_bob", (0.1, 0.2), "expected 4 or 5 finite numbers"),
        ("equidistant", (np.nan, 0.0, 0.0, 0.0), "expected 4 finite numbers"),
    ],
)
def test_unknown_lenses_are_refused(model: str, coefficients: tuple[float, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Lens(model, coefficients)


def test_field_of_view_of_a_pinhole_and_of_a_fisheye() -> None:
    left, right = horizontal_field(K, None, (640, 480))
    expected = np.arctan(320 / 400)
    assert (-left, right) == (pytest.approx(expected, abs=0.005), pytest.approx(expected, abs=0.005))
    fisheye = Lens("equidistant", (0.0, 0.0, 0.0, 0.0))
    k = K.copy()
    k[0, 0] = k[1, 1] = 320 / np.deg2rad(95)
    left, right = horizontal_field(k, fisheye, (640, 480))
    assert np.rad2deg(right - left) == pytest.approx(190, abs=1)


TILTED = (0.02, -0.01, 0.001, 0.0, 0.0, 0.03, 0.0, 0.0, 0.001, 0.0, 0.002, 0.0, 0.02, -0.01)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(
        [
            None,
            Lens("equidistant", (0.02, -0.006, 0.001, -0.0002)),
            Lens("plumb_bob", (-0.28, 0.09, 0.001, -0.002, -0.012)),
            Lens("rational_polynomial", (0.9, 0.1, 0.0002, -0.0001, 0.0, 1.15, 0.15, 0.0)),
            Lens("rational_polynomial", TILTED),
        ]
    ),
    st.integers(0, 2**31),
)
def test_pixels_return_to_where_their_rays_project(lens: Lens | None, seed: int) -> None:
    random = np.random.default_rng(seed)
    wide = 2.0 if lens is not None and lens.model == "equidistant" else 0.7  # radians from the axis
    angles, directions = random.uniform(0, wide, 30), random.uniform(-np.pi, np.pi, 30)
    across = np.sin(angles)
    rays = np.stack([across * np.cos(directions), across * np.sin(directions), np.cos(angles)], axis=1)
    pixels, valid = project_pixels(rays, K, lens)
    found, seen = unproject_pixels(pixels, K, lens)
    assert valid.all() and seen.all()
    np.testing.assert_allclose(found, rays, atol=1e-6)


def test_pixels_beyond_the_fold_have_no_ray() -> None:
    lens = Lens("plumb_bob", (-0.3, 0.0, 0.0, 0.0))
    reached = lens.project(np.array([[np.tan(lens.limit_rad - 0.01), 0.0, 1.0]]))[0][0, 0]
    points = np.array([[0.9 * reached, 0.0], [1.1 * reached, 0.0]])
    assert lens.unproject(points)[1].tolist() == [True, False]


def test_lens_is_stored_in_a_row_and_a_damaged_one_is_refused() -> None:
    lens = Lens("equidistant", (0.02, -0.006, 0.001, -0.0002))
    assert lens_of_row(lens_columns(lens)) == lens
    assert lens_of_row({"camera_intrinsic": []}) is None
    for columns in ({"distortion_coefficients": "none"}, {}, {"distortion_coefficients": [1.0]}):
        with pytest.raises(UserError, match=r"distortion.*expected"):
            lens_of_row({"distortion_model": "equidistant", **columns})
