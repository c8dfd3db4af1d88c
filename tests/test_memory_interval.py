# SPDX-License-Identifier: Apache-2.0
"""Table of the memory interval: rounds, phases and key frames of the benchmark."""

import pytest

from benchmarks.memory_interval import RATES_HZ, key_frames, phases, round_times, table
from ftkd_core.data.synthetic.world import make_scene
from ftkd_core.data.synthetic_clips import key_times


@pytest.mark.parametrize("rate", RATES_HZ)
def test_key_frames_are_at_rounds_in_every_phase(rate: float) -> None:
    scene = make_scene(900_000, 4.0)
    times = round_times(scene, rate)
    keys = key_times(scene)
    found = key_frames(scene, times, [f"token {index}" for index in range(len(keys))])
    first = len(phases(rate)) - 1
    assert found[first] == "token 0"
    wanted = [index for index in range(len(keys)) if (index * 0.5 * rate) % 1 == 0]
    assert sorted(found.values()) == sorted(f"token {index}" for index in wanted)
    assert min(found) == first and len(phases(rate)) == max(1, round(0.5 * rate))


def test_table_has_mean_and_spread_of_the_phases() -> None:
    rows = [
        {"rate_hz": 10.0, "memory_interval_s": 0.4, "phase": phase, "NDS": nds}
        for phase, nds in enumerate((0.40, 0.44))
    ]
    assert table(rows).splitlines() == ["| rate | 0.4 s |", "|---|---|", "| 10 Hz | 0.420 (0.040) |"]
