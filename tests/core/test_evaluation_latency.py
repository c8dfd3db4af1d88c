# SPDX-License-Identifier: Apache-2.0
"""The interleaved timing protocol."""

import time

from ftkd_core.evaluation.latency import time_alternating


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
