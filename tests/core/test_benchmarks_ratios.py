# SPDX-License-Identifier: Apache-2.0
"""Comparison of engine ratios with committed ones: losses, noise, device classes, bad files."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import ratios
from benchmarks.ratios import Ratio, compare, device_class, losses, main, read_committed, store
from ftkd_core.errors import UserError

SHARE = st.floats(0.0, 0.2)
VALUE = st.floats(0.1, 20.0)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Callable[[float, float], None]:
    """Return a function that sets the ratio that is "measured"."""

    def set_ratio(value: float, noise: float) -> None:
        monkeypatch.setattr(ratios, "measure", lambda *_: {"a / b": Ratio(value, noise)})

    return set_ratio


def test_a_median_and_its_noise_ignore_an_outlier() -> None:
    found = ratios.summarize_passes([2.0, 2.1, 1.9, 2.0, 9.0])
    assert found.value == 2.0 and found.noise == pytest.approx(0.025)


@given(VALUE, SHARE, SHARE)
def test_an_equal_or_better_ratio_is_no_loss(value: float, now: float, before: float) -> None:
    for better in (1.0, 1.5):
        assert losses({"a": Ratio(better * value, now)}, {"a": Ratio(value, before)}) == []


@given(VALUE, SHARE, SHARE)
def test_a_loss_beyond_noise_is_found(value: float, now: float, before: float) -> None:
    allowed = max(0.1, 3 * (now + before))
    committed = {"a": Ratio(value, before)}
    assert losses({"a": Ratio(value * (1 - allowed - 0.01), now)}, committed)
    assert not losses({"a": Ratio(value * (1 - allowed + 0.01), now)}, committed)


@pytest.mark.parametrize(
    ("value", "noise", "code", "text"),
    [
        (2.0, 0.01, 0, "no ratio is worse"),
        (1.5, 0.01, 1, "worse: a / b: 1.50, committed 2.00"),
        (1.9, 0.4, 2, "too much noise to compare a / b"),
    ],
)
def test_the_exit_code_tells_the_result(
    value: float, noise: float, code: int, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare({"a / b": Ratio(value, noise)}, {"a / b": Ratio(2.0, 0.01)}) == code
    printed = capsys.readouterr()
    assert text in printed.out + printed.err


def test_figures_are_stored_by_device_class_and_compared(
    tmp_path: Path,
    measured: Callable[[float, float], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "ratios.json"
    store(file, "another processor", {"a / b": Ratio(9.0, 0.0)})
    measured(2.0, 0.02)
    assert main(["--json", str(file)]) == 0
    assert [entry["device_class"] for entry in json.loads(file.read_text())] == [
        "another processor", device_class(),
    ]  # fmt: skip
    assert read_committed(file, device_class()) == {"a / b": Ratio(2.0, 0.02)}
    arguments = ["--compare", "--committed", str(file)]
    assert main(arguments) == 0
    measured(1.0, 0.02)
    assert main(arguments) == 1
    monkeypatch.setattr(ratios, "device_class", lambda: "a third processor")
    assert main(arguments) == 2
    assert "has no figures of a third processor (only" in capsys.readouterr().err


@pytest.mark.parametrize("text", [None, "", "{}", "[1]", '[{"device_class": "x"}]'])
def test_a_missing_or_damaged_file_is_refused(text: str | None, tmp_path: Path) -> None:
    file = tmp_path / "ratios.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError, match=r"python -m benchmarks\.ratios --json"):
        read_committed(file, "x")


def test_bad_options_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--passes", "0"]) == 2
    assert "expected at least 1" in capsys.readouterr().err
