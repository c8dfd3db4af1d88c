# SPDX-License-Identifier: Apache-2.0
"""Command line of `benchmarks.train_step`."""

from typing import Any

import pytest

from benchmarks import train_step


@pytest.mark.parametrize("given", [[], ["--cache-features"]])
def test_options_reach_the_measurement(given: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    requested: dict[str, Any] = {}

    def run(*presets: Any, **options: Any) -> dict[str, Any]:
        requested.update(options, presets=presets[:3])
        return {}

    monkeypatch.setattr(train_step, "run", run)
    assert train_step.main(["--repeats", "7", "--streams", "3", *given]) == 0
    assert requested == {
        "presets": ("tiny", "sparse_bev_tiny_offline", "ftkd"),
        "streams": 3,
        "repeats": 7,
        "keep": bool(given),
    }
