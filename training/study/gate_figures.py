# SPDX-License-Identifier: Apache-2.0
"""Figures of the gate (gate.py) from matched detections."""

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ftkd_core.errors import UserError

MOVING_M_S: Final = 0.5
_MATCH_DISTANCE_M: Final = 2.0
_MIN_SCORE: Final = 0.1
_RIDGE: Final = 1e-2  # weight per object, for standardised features
_MIN_CHANGE_M_S: Final = 0.5
_MIN_R2: Final = 0.3
_MAX_LINKER_RATIO: Final = 0.85
_MIN_WRONG_FUTURE_RATIO: Final = 1.05

Array = NDArray[np.float64]


class Matched(NamedTuple):
    """True positives: velocities (M, 2) in m/s of the ground truth, the prediction, the decoder's initial
    boxes and the linker (nan if it was not run), the last query features (M, C), and the direction of the
    line of sight (M, 2)."""

    true: Array
    predicted: Array
    start: Array
    linked: Array
    features: Array
    sight: Array

    @property
    def moving(self) -> NDArray[np.bool_]:
        """Mask (M,) of the moving objects."""
        fast: NDArray[np.bool_] = np.linalg.norm(self.true, axis=1) > MOVING_M_S
        return fast

    @property
    def true_in_view(self) -> Array:
        """True velocities (M, 2) along and across the line of sight."""
        along, across = self.sight, np.stack([-self.sight[:, 1], self.sight[:, 0]], axis=1)
        return np.stack([(self.true * along).sum(1), (self.true * across).sum(1)], axis=1)


def join(parts: Sequence[Matched]) -> Matched:
    """Concatenate the objects of several parts."""
    return Matched(*(np.concatenate(values) for values in zip(*parts, strict=True)))


def match_greedily(
    centers: Array,
    scores: Array,
    labels: NDArray[np.int64],
    true_centers: Array,
    true_labels: NDArray[np.int64],
) -> list[tuple[int, int]]:
    """Return pairs (detection, object): in order of score, each detection takes the nearest free object of
    its class within 2 m. Centers (M, 2)."""
    pairs, taken = [], np.zeros(len(true_labels), dtype=bool)
    for row in np.argsort(-scores, kind="stable"):
        if scores[row] < _MIN_SCORE:
            break
        distance = np.linalg.norm(true_centers - centers[row], axis=1)
        distance[taken | (true_labels != labels[row])] = np.inf
        if len(distance) and distance.min() < _MATCH_DISTANCE_M:
            nearest = int(distance.argmin())
            taken[nearest] = True
            pairs.append((int(row), nearest))
    return pairs


def ridge_r2(features: Array, targets: Array, held_out: Array, held_out_targets: Array) -> float:
    """Return R2 on held-out objects of a ridge regression from features (M, C) to targets (M, D)."""
    mean, scale = features.mean(0), features.std(0) + 1e-6
    fitted, tested = (features - mean) / scale, (held_out - mean) / scale
    center = targets.mean(0)
    covariance = fitted.T @ fitted + _RIDGE * len(fitted) * np.eye(fitted.shape[1])
    weights = np.linalg.solve(covariance, fitted.T @ (targets - center))
    error = np.square(tested @ weights + center - held_out_targets).sum()
    return float(1 - error / np.square(held_out_targets - held_out_targets.mean(0)).sum())


def figures(found: Matched, wrong: Matched | None, fitted_on: Matched) -> dict[str, Any]:
    """Return the gate's figures.

    found and wrong: true positives with the correct and with a wrong future (None: a model without future);
    fitted_on: those that the probe is fitted on. Raise UserError if there are too few objects.
    """
    moving = found.moving
    if moving.sum() < 2 or len(fitted_on.true) < 2:
        raise UserError(
            f"{int(moving.sum())} moving objects were detected, {len(fitted_on.true)} for the probe; "
            "expected at least 2 of each: train longer or give more --scenes"
        )
    values: dict[str, Any] = {
        "velocity_change_moving_m_s": mean_distance(found.predicted[moving], found.start[moving]),
        "ave_moving": mean_distance(found.predicted[moving], found.true[moving]),
        "ave_moving_linker": mean_distance(found.linked[moving], found.true[moving]),
        "probe_r2_velocity_ego": ridge_r2(fitted_on.features, fitted_on.true, found.features, found.true),
        "probe_r2_velocity_view": ridge_r2(
            fitted_on.features, fitted_on.true_in_view, found.features, found.true_in_view
        ),
        "wrong_future_ave": None,
    }
    frames = ("probe_r2_velocity_ego", "probe_r2_velocity_view")
    values["probe_r2_velocity"] = max(values[name] for name in frames)
    if wrong is not None and wrong.moving.any():
        values["wrong_future_ave"] = mean_distance(wrong.predicted[wrong.moving], wrong.true[wrong.moving])
    values["passed"] = passes(values)
    speed = float(np.linalg.norm(found.true[moving], axis=1).mean())
    return values | {"objects": len(moving), "moving": int(moving.sum()), "mean_speed_moving_m_s": speed}


def passes(values: dict[str, Any]) -> bool:
    """Return whether figures pass the gate."""
    wrong = values["wrong_future_ave"]
    return bool(
        values["velocity_change_moving_m_s"] >= _MIN_CHANGE_M_S
        and values["ave_moving"] <= _MAX_LINKER_RATIO * values["ave_moving_linker"]
        and values["probe_r2_velocity"] >= _MIN_R2
        and wrong is not None
        and wrong >= _MIN_WRONG_FUTURE_RATIO * values["ave_moving"]
    )


def mean_distance(first: Array, second: Array) -> float:
    """Return the mean distance between rows (M, D)."""
    return float(np.linalg.norm(first - second, axis=1).mean())
