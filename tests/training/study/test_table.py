# SPDX-License-Identifier: Apache-2.0
"""Paired differences between rows: pairing by seed, intervals, sign test."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from tests.training.study.helpers import entry
from training.study.json_files import write_json
from training.study.table import comparisons, difference_table, main, paired_difference, values_by_seed

SCORES = st.dictionaries(st.integers(0, 9), st.floats(0.0, 1.0), min_size=2, max_size=6)


@given(SCORES, SCORES)
def test_difference_equals_the_paired_t_interval_of_scipy(
    first: dict[int, float], second: dict[int, float]
) -> None:
    seeds = sorted(first.keys() & second.keys())
    found = paired_difference(first, second)
    if not seeds:
        assert found is None
        return
    assert found is not None and found.seeds == len(seeds)
    change = np.array([first[seed] - second[seed] for seed in seeds])
    assert found.mean == pytest.approx(change.mean(), abs=1e-12)
    if len(seeds) > 1 and change.std() > 1e-6:
        low, high = stats.ttest_1samp(change, 0).confidence_interval(0.95)
        assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))
        swapped = paired_difference(second, first)
        assert swapped is not None and swapped.mean == pytest.approx(-found.mean, abs=1e-12)
        assert swapped.sign_p == pytest.approx(found.sign_p)


def test_five_seeds_of_one_sign_have_the_smallest_p() -> None:
    found = paired_difference({n: 0.3 + 0.001 * n for n in range(5)}, dict.fromkeys(range(5), 0.2))
    assert found is not None and found.sign_p == pytest.approx(2 / 2**5)
    assert 0 < found.low < found.mean < found.high


def test_primary_comparison_comes_first_and_teachers_have_none() -> None:
    names = ("teacher", "teacher_blind", "none", "ftkd", "ftkd_blind")
    entries = [entry(name, 0, 0.1) for name in names]
    assert comparisons(entries) == [("ftkd", "ftkd_blind"), ("ftkd", "none"), ("ftkd_blind", "none")]
    assert comparisons(entries[:3]) == []
    assert difference_table(entries[:3]) == ""


def test_seeds_without_a_partner_or_a_measure_are_left_out() -> None:
    entries = [entry("none", 0, 0.1), entry("none", 1, 0.2), entry("ftkd", 1, 0.25), entry("ftkd", 2, 0.9)]
    entries[2]["ave_moving"] = None
    assert values_by_seed(entries, "ftkd", "ave_moving") == {}
    lines = difference_table(entries).splitlines()[2:]
    assert lines[0] == "| ftkd - none | mAP | 1 | +0.0500 | - | - |"
    assert all("ave_moving" not in line for line in lines)


def test_command_prints_means_and_differences(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "matrix.json"
    write_json(path, [entry(name, seed, 0.1 * seed) for name in ("none", "ftkd") for seed in range(2)])
    assert main([str(path)]) == 0
    printed = capsys.readouterr().out
    assert "| none | 2 | 100 |" in printed and "| ftkd - none | NDS | 2 |" in printed
    assert main([str(tmp_path / "missing.json")]) == 2
    assert capsys.readouterr().err.startswith("table: ")
