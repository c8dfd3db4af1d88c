# SPDX-License-Identifier: Apache-2.0
"""A foreign results file is checked box by box; errors name sample, box and value."""

import json
from pathlib import Path
from typing import Any

import pytest

from ftkd_core.errors import UserError
from ftkd_core.evaluation.results_check import check_coverage, check_results, load_results

BOX: dict[str, Any] = {
    "sample_token": "s",
    "translation": [1.0, 2.0, 3.0],
    "size": [2.0, 4.0, 1.5],
    "rotation": [1.0, 0.0, 0.0, 0.0],
    "velocity": [0.0, float("nan")],
    "detection_name": "car",
    "detection_score": 0.5,
    "attribute_name": "vehicle.moving",
}


def test_boxes_that_the_devkit_accepts_are_accepted() -> None:
    check_results({"s": [BOX, {**BOX, "attribute_name": "", "detection_score": 1}], "empty": []})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"translation": [1.0, 2.0]}, r"translation \[1.0, 2.0\]; expected 3 numbers"),
        ({"translation": [1.0, float("inf"), 0.0]}, "expected 3 finite numbers"),
        ({"translation": ["1", 2.0, 3.0]}, "expected 3 finite numbers"),
        ({"size": [2.0, 0.0, 1.0]}, "expected width, length and height above 0"),
        ({"rotation": [0.0, 0.0, 0.0, 0.0]}, "expected a quaternion w, x, y, z"),
        ({"velocity": None}, "velocity None; expected 2 numbers"),
        ({"detection_name": "tram"}, "detection_name 'tram'; expected one of car"),
        ({"detection_score": float("nan")}, "detection_score nan"),
        ({"detection_score": True}, "detection_score True"),
        ({"attribute_name": "parked"}, "attribute_name 'parked'"),
        ({"sample_token": "other"}, "sample_token 'other'; expected that of its entry"),
    ],
)
def test_bad_value_is_named_with_its_box(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"sample s, box 1: .*{message}"):
        check_results({"s": [BOX, {**BOX, **change}]})


def test_missing_fields_and_wrong_shapes_are_named() -> None:
    without = {name: value for name, value in BOX.items() if name != "attribute_name"}
    with pytest.raises(UserError, match="box 0: has no attribute_name"):
        check_results({"s": [without]})
    with pytest.raises(UserError, match="box 0: 3; expected a dictionary"):
        check_results({"s": [3]})
    with pytest.raises(UserError, match="sample s: None; expected a list"):
        check_results({"s": None})
    with pytest.raises(UserError, match="501 boxes for sample s; expected at most 500"):
        check_results({"s": [BOX] * 501})


def test_every_key_frame_needs_an_entry() -> None:
    assert check_coverage({"a": [], "b": [], "more": []}, ["a", "b"]) == {"a": [], "b": []}
    with pytest.raises(UserError, match="no entry for 1 of 2 key frames, first b"):
        check_coverage({"a": []}, ["a", "b"])


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"results": []}'])
def test_file_without_results_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "results.json"
    path.write_text(content)
    with pytest.raises(UserError, match="nuScenes results file"):
        load_results(path)
    path.write_text(json.dumps({"meta": {}, "results": {"a": []}}))
    assert load_results(path) == {"a": []}
