# SPDX-License-Identifier: Apache-2.0
"""Boxes that lie on a stronger one are left out of displays."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ftkd_core.duplicates import without_duplicates
from ftkd_core.types import ObjectList


def objects(rows: list[list[float]], scores: list[float], labels: list[int] | None = None) -> ObjectList:
    return ObjectList(
        boxes=np.array(rows, dtype=np.float64).reshape(-1, 9),
        scores=np.array(scores),
        labels=np.array(labels or [0] * len(scores), dtype=np.int64),
        stamp_ns=1,
    )


def box(x: float, y: float, yaw: float = 0.0, z: float = 1.0) -> list[float]:
    return [x, y, z, 4.0, 2.0, 1.5, yaw, 0.0, 0.0]


def test_the_strongest_of_boxes_on_each_other_stays() -> None:
    found = without_duplicates(objects([box(0, 0), box(0.5, 0.2), box(10, 0)], [0.4, 0.9, 0.3], [0, 1, 0]))
    assert found.scores.tolist() == [0.9, 0.3]


def test_neighbours_and_boxes_above_each_other_stay() -> None:
    beside = [box(0, 0), box(0, 2.2), box(4.2, 0), box(0, 0, z=5.0)]
    assert len(without_duplicates(objects(beside, [0.9, 0.8, 0.7, 0.6])).boxes) == 4


def test_a_box_on_a_suppressed_one_stays() -> None:
    chain = [box(0, 0), box(1.8, 0), box(3.6, 0)]
    assert without_duplicates(objects(chain, [0.9, 0.8, 0.7])).scores.tolist() == [0.9, 0.7]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 999), count=st.integers(0, 40), turn=st.floats(0, 6.3))
def test_result_does_not_depend_on_order_or_heading_of_the_vehicle(
    seed: int, count: int, turn: float
) -> None:
    random = np.random.default_rng(seed)
    rows = [box(*random.uniform(-10, 10, 2), random.uniform(-3, 3)) for _ in range(count)]
    scores = random.permutation(np.linspace(0.1, 0.9, count)).tolist()
    found = without_duplicates(objects(rows, scores))
    order = random.permutation(count)
    shuffled = without_duplicates(objects([rows[i] for i in order], [scores[i] for i in order]))
    assert sorted(found.scores) == sorted(shuffled.scores)
    cos, sin = np.cos(turn), np.sin(turn)
    turned = [[cos * r[0] - sin * r[1], sin * r[0] + cos * r[1], *r[2:6], r[6] + turn, 0, 0] for r in rows]
    assert sorted(without_duplicates(objects(turned, scores)).scores) == sorted(found.scores)
    assert without_duplicates(found).scores.tolist() == found.scores.tolist()
