# SPDX-License-Identifier: Apache-2.0
"""Summaries of repeated measurements."""

import numpy as np
import pytest

from ftkd_core.percentiles import summarize


def test_summary_agrees_with_numpy() -> None:
    samples = np.random.default_rng(0).gamma(2.0, 5.0, 500)
    summary = summarize(samples.tolist())
    assert summary.p50 == pytest.approx(np.median(samples))
    assert summary.p95 == pytest.approx(np.percentile(samples, 95))
    assert summary.p99 == pytest.approx(np.percentile(samples, 99))
    assert summary.mean == pytest.approx(samples.mean()) and summary.max == samples.max()
    assert summary.count == 500


def test_summary_of_no_samples_is_none() -> None:
    fields = ("p50", "p95", "p99", "mean", "max", "min")
    assert summarize([]).as_dict() == dict.fromkeys(fields) | {"count": 0}


def test_non_finite_sample_raises() -> None:
    with pytest.raises(ValueError, match="expected finite"):
        summarize([1.0, float("nan")])
