# SPDX-License-Identifier: Apache-2.0
"""Flicker and jitter between frames, without ground truth."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftkd_core.evaluation.stability import PosedFrame, StabilityCounts, count_stability
from ftkd_core.geometry import invert_rigid, transform_points, yaw_transform
from ftkd_core.types import ObjectList

STEP_NS = 100_000_000


def frames(count: int, *, turn: float = 0.0, jitter: float = 0.0, seed: int = 0) -> list[PosedFrame]:
    """Return frames of a turning ego with three moving cars, seen with noise."""
    rng = np.random.default_rng(seed)
    starts, velocities = (
        np.array([[10.0, 2, 0], [30, -5, 0], [-20, 8, 0]]),
        np.array([[5.0, 0], [0, 0], [-8, 1]]),
    )
    found = []
    for number in range(count):
        seconds = number * STEP_NS * 1e-9
        pose = yaw_transform(turn * seconds, (8 * seconds, 0, 0))
        centers = starts.copy()
        centers[:, :2] += velocities * seconds
        boxes = np.zeros((3, 9))
        boxes[:, :3] = transform_points(invert_rigid(pose), centers)
        boxes[:, :2] += rng.normal(0, jitter, (3, 2)) if jitter else 0
        boxes[:, 3:6] = 4.0, 2.0, 1.5
        boxes[:, 6] = -turn * seconds
        boxes[:, 7:9] = velocities @ pose[:2, :2]
        objects = ObjectList(
            boxes=boxes,
            scores=np.full(3, 0.9),
            labels=np.zeros(3, dtype=np.int64),
            stamp_ns=number * STEP_NS + 1,
        )
        found.append(PosedFrame(objects, pose))
    return found


def without(frame: PosedFrame, index: int) -> PosedFrame:
    return frame._replace(objects=frame.objects.select(np.arange(3) != index))


@given(turn=st.floats(-0.5, 0.5))
def test_steady_detections_of_moving_objects_have_no_flicker_and_no_jitter(turn: float) -> None:
    summary = count_stability(frames(6, turn=turn)).summary()
    assert (summary["flicker"], summary["detections"]) == (0.0, 18)
    assert summary["jitter_p95_m"] < 1e-9
    assert summary["heading_jitter_rad"] < 1e-9


def test_one_missing_detection_is_a_dropout_and_one_extra_is_a_flash() -> None:
    steady = frames(7)
    gone = [*steady[:3], without(steady[3], 1), *steady[4:]]
    counts = count_stability(gone)
    assert (counts.dropouts, counts.flashes) == (1, 0)
    assert counts.summary()["flicker"] == pytest.approx(1 / 14)
    shown = [without(frame, 1) if number != 3 else frame for number, frame in enumerate(steady)]
    counts = count_stability(shown)
    assert (counts.dropouts, counts.flashes) == (0, 1)


def test_jitter_is_that_of_the_noise() -> None:
    summary = count_stability(frames(200, jitter=0.1)).summary()
    # The difference of two positions with noise of 0.1 m has a median length of 0.1 m x sqrt(2) x 1.177.
    assert summary["jitter_m"] == pytest.approx(0.1 * np.sqrt(2) * 1.177, rel=0.1)


def test_frames_far_apart_and_weak_detections_are_not_compared() -> None:
    first, second = frames(2)
    late = second._replace(
        objects=ObjectList(
            boxes=second.objects.boxes,
            scores=second.objects.scores,
            labels=second.objects.labels,
            stamp_ns=10**11,
        )
    )
    assert count_stability([first, late]).position_m == []
    assert count_stability([first, second], min_score=0.95).summary()["flicker"] is None
    assert count_stability([]).summary()["jitter_m"] is None


def test_counts_of_recordings_are_added() -> None:
    parts = [count_stability(frames(4, jitter=0.1, seed=seed)) for seed in range(2)]
    both = parts[0] + parts[1]
    assert both.detections == 24 and len(both.position_m) == 18
    assert StabilityCounts() + parts[0] == parts[0]
