# SPDX-License-Identifier: Apache-2.0
"""Comparison of a checkpoint's settings with those of the run that resumes it."""

from training.checkpoint import settings_difference


def test_difference_of_settings_names_the_values_of_both_sides() -> None:
    saved = {"model": {"layers": 2, "image": [704, 256]}, "method": {"mask": 0.5}}
    same = {"method": {"mask": 0.5}, "model": {"layers": 2, "image": (704, 256)}}
    assert settings_difference(saved, same) == ""
    other = {"model": {"layers": 3, "image": (704, 256)}, "method": {"mask": 0.5, "reach": 0}}
    assert settings_difference(saved, other) == "method.reach unset, here 0; model.layers 2, here 3"


def test_difference_of_settings_is_shortened() -> None:
    assert settings_difference({}, {str(value): value for value in range(9)}).endswith("; 3 more")
