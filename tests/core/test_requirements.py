# SPDX-License-Identifier: Apache-2.0
"""Requirements of continuous integration: their grammar, ranges and verdicts."""

from pathlib import Path
from typing import Any

import pytest

from ftkd_core.errors import UserError
from ftkd_core.evaluation.requirements import (
    check_requirements,
    parse_requirement,
    read_criteria,
    verdict_table,
)

METRICS: dict[str, Any] = {
    "mAP": 0.4,
    "mAVE": None,
    "coverage": {"share": 0.9, "unmatched_tokens": []},
    "latency_ms": {"p95": 80.0},
    "classes": {"car": {"AP": 0.6, "ATE": 0.5}},
}


def near_is_better(low_m: float, high_m: float) -> dict[str, Any]:
    return {"AP": 0.8 if high_m <= 30 else 0.3, "classes": {"car": {"AP": low_m / 100}}}


@pytest.mark.parametrize(
    ("text", "value", "passed"),
    [
        ("mAP>=0.35", 0.4, True),
        ("mAP >= 0.4", 0.4, True),
        ("mAP>0.4", 0.4, False),
        ("mAP>=50%", 0.4, False),
        ("mAVE<=1", None, False),
        ("coverage.share>=0.95", 0.9, False),
        ("latency_ms.p95<1e2", 80.0, True),
        ("car.AP==0.6", 0.6, True),
        ("car.ATE<=.4", 0.5, False),
        ("bus.AP>=0", None, False),
        ("mAP@30m>=0.7", 0.8, True),
        ("AP@30-50m>=0.7", 0.3, False),
        ("car.AP@40m+>=0.4", 0.4, True),
        ("truck.AP@40m+>=0.4", None, False),
    ],
)
def test_requirement_is_compared_with_its_metric(text: str, value: float | None, passed: bool) -> None:
    (verdict,) = check_requirements([parse_requirement(text)], METRICS, near_is_better)
    assert (verdict.value, verdict.passed) == (value, passed)
    (line,) = verdict_table([verdict])
    assert line.startswith("pass" if passed else "FAIL") and text in line
    assert verdict.as_dict()["passed"] is passed


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mAP", "expected one such as 'mAP>=0.35'"),
        ("mAP>=high", "expected one such as"),
        ("mAP=>0.3", "expected one such as"),
        ("mAP>=1.2.3", "'1.2.3' is not a number"),
        ("car.speed>=1", "expected car.METRIC with one of AP"),
        ("NDS@30m>=0.3", "'NDS' has no distance range"),
        ("mAP@near>=0.3", "range 'near'; expected '@30m'"),
        ("mAP@50-20m>=0.3", "range '50-20m'"),
    ],
)
def test_text_that_is_no_requirement_is_refused(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_requirement(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mAp>=0.3", "no metric 'mAp'; expected one of .*mAP"),
        ("coverage.part>=1", "no metric 'part'; expected one of share"),
        ("coverage>=1", "coverage is not a number"),
    ],
)
def test_misspelt_metric_is_an_error_and_not_a_failure(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_requirements([parse_requirement(text)], METRICS, near_is_better)


def test_criteria_file_is_a_list_or_a_key(tmp_path: Path) -> None:
    path = tmp_path / "criteria.yaml"
    for content in ('require: ["mAP>=0.3", "car.AP@30m>=0.4"]\n', "- mAP>=0.3\n- car.AP@30m>=0.4\n"):
        path.write_text(content)
        assert [requirement.text for requirement in read_criteria(path)] == ["mAP>=0.3", "car.AP@30m>=0.4"]
    for content in ("require: 3", "{}", "- 3", "[", ""):
        path.write_text(content)
        with pytest.raises(UserError, match="criteria file"):
            read_criteria(path)
    with pytest.raises(UserError, match="does not exist"):
        read_criteria(tmp_path / "none.yaml")
