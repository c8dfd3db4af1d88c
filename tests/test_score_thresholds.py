# SPDX-License-Identifier: Apache-2.0
"""F1-best thresholds per class, and the file next to the weights."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.score_thresholds import best_thresholds
from ftkd_core.classes import CLASS_NAMES
from ftkd_core.errors import UserError
from ftkd_core.types import ObjectList
from ftkd_core.weights import SHIPPED, read_thresholds


def at(positions: list[float], scores: list[float]) -> ObjectList:
    boxes = np.zeros((len(positions), 9))
    boxes[:, 0] = positions
    return ObjectList(
        boxes=boxes, scores=np.array(scores), labels=np.zeros(len(positions), dtype=np.int64), stamp_ns=0
    )


def test_threshold_separates_right_from_wrong_detections() -> None:
    """At 0.6: three of three right and all objects found; lower adds a wrong one and a duplicate."""
    frames = [
        (at([0.5, 20.1, 0.2], [0.9, 0.6, 0.5]), at([0, 20], [1, 1])),
        (at([40.0, 90.0], [0.7, 0.3]), at([41.0], [1])),
    ]
    found = best_thresholds(frames)
    assert found.keys() == {"car"}
    assert 0.5 < found["car"]["threshold"] <= 0.6
    assert (found["car"]["f1"], found["car"]["precision"], found["car"]["recall"]) == (1.0, 1.0, 1.0)


def test_class_that_is_never_found_publishes_nothing() -> None:
    assert best_thresholds([(at([50.0], [0.9]), at([0.0], [1]))])["car"]["threshold"] == 1.0


def test_shipped_weights_have_a_threshold_per_class() -> None:
    thresholds = read_thresholds(SHIPPED)
    assert set(thresholds) == set(CLASS_NAMES)
    assert all(0.05 <= value < 1 for value in thresholds.values())


@pytest.mark.parametrize("content", ["{", '{"a": 1}', '{"class_score_thresholds": {"car": 2}}', "[]"])
def test_damaged_thresholds_are_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "w.thresholds.json").write_text(content)
    with pytest.raises(UserError, match=r"w\.thresholds\.json'"):
        read_thresholds(tmp_path / "w.safetensors")
    assert read_thresholds(tmp_path / "other.safetensors") == {}
    assert json.dumps(read_thresholds(SHIPPED))
