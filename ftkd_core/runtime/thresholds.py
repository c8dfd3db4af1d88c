# SPDX-License-Identifier: Apache-2.0
"""Score thresholds: one for all classes, or one per named class."""

import numbers
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ftkd_core.errors import UserError

DEFAULT_THRESHOLD: Final = 0.05
"""Threshold of classes that a mapping leaves out."""

ScoreThreshold = float | Mapping[str, float]


def class_thresholds(threshold: ScoreThreshold, class_names: Sequence[str]) -> NDArray[np.float64]:
    """Return the threshold (K,) of each class; classes absent from a mapping get `DEFAULT_THRESHOLD`.

    UserError with class and value for an unknown class and for a number outside 0 .. 1.
    """
    if not isinstance(threshold, Mapping):
        return np.full(len(class_names), _checked(threshold, "score_threshold"))
    for name in threshold:
        if name not in class_names:
            raise UserError(f"score_threshold of class {name!r}: expected one of {', '.join(class_names)}")
    return np.array(
        [
            _checked(threshold.get(name, DEFAULT_THRESHOLD), f"score_threshold of class {name!r}:")
            for name in class_names
        ]
    )


def _checked(value: Any, what: str) -> float:
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not is_number or not 0.0 <= value <= 1.0:
        raise UserError(f"{what} {value!r}: expected 0 .. 1")
    return float(value)
