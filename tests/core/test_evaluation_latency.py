# SPDX-License-Identifier: Apache-2.0
"""Latency summaries and the interleaved timing protocol."""

import time

import numpy as np
import pytest

from ftkd_core.evaluation.latency import summarize_ms, time_alternating


def test_summary_is_that_of_numpy() -> None:
    samples = np.random.default_rng(0).gamma(2.0, 5.0, 500)
    summary = summarize_ms(samples.tolist())
    assert summary.p50 == pytest.approx(np.median(samples))
    assert summary.p95 == pytest.approx(np.percentile(samples, 95))
    assert summary.count == 500
    assert summarize_ms([]).as_dict() == {"p50": None, "p95": None, "mean": None, "max": None, "count": 0}


def test_a_sample_that_is_no_number_is_refused() -> None:
    with pytest.raises(ValueError, match="expected finite"):
        summarize_ms([1.0, float("nan")])


def test_steps_are_interleaved_and_warm_up_is_not_counted() -> None:
    calls: list[str] = []

    def slow() -> None:
        calls.append("slow")
        time.sleep(0.004)

    summaries = time_alternating([slow, lambda: calls.append("fast")], runs=5, warm_up=2)
    assert calls == ["slow", "fast"] * 7
    assert [summary.count for summary in summaries] == [5, 5]
    assert summaries[0].p50 is not None and summaries[1].p50 is not None
    assert summaries[0].p50 > 3.5 > summaries[1].p50
