# SPDX-License-Identifier: Apache-2.0
"""The detector's benchmark: what its JSON holds, in which order it measures, and its exit codes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import detector as benchmark
from ftkd_core.evaluation.detector_benchmark import count_parameters
from ftkd_core.models.build import build_stream_petr
from ftkd_core.presets import preset

CONTRACT = {
    "device", "preset", "latency_ms", "ratio", "peak_memory_mb", "max_center_diff_m", "params", "gflops"
}  # fmt: skip


@pytest.mark.timeout(600)  # 10 s of processor time, which a busy machine stretches
def test_the_json_holds_what_the_contract_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def noted(name: str) -> Callable[..., Any]:
        whole: Callable[..., Any] = getattr(benchmark, name)

        def call(*given: Any, **named: Any) -> Any:
            order.append(name)
            return whole(*given, **named)

        return call

    for name in ("peak_memory_mb", "compare_detectors", "count_gflops"):
        monkeypatch.setattr(benchmark, name, noted(name))
    monkeypatch.setattr(benchmark, "_ROUNDS", 2)
    file = tmp_path / "new" / "figures.json"
    options = ["--preset", "tiny", "--device", "cpu", "--repeats", "1", "--warm-up", "0", "--json", str(file)]
    assert benchmark.main(options) == 0
    figures = json.loads(file.read_text())
    assert figures.keys() >= CONTRACT
    latency = figures["latency_ms"]
    assert latency.keys() == {"detector", "plain_twin"} and min(latency.values()) > 0
    assert figures["ratio"] == pytest.approx(latency["plain_twin"] / latency["detector"], rel=1e-3)
    assert figures["preset"] == "tiny" and figures["device"].startswith("cpu")
    assert figures["max_center_diff_m"] < 0.02 and figures["agreement"]["is_close"]
    assert figures["params"] == figures["params_at_inference"] > 4e6  # queries start at its 2-D head
    assert 5 < figures["gflops"] < 20
    assert (figures["tf32"], figures["network_dtype"]) == (False, "torch.float32")
    assert figures["runs"] | {"timed": 1, "warm_up": 0, "meets_protocol": False} == figures["runs"]
    assert order == ["peak_memory_mb", "compare_detectors", "count_gflops"], "neither may count in the peak"


def test_a_head_that_only_training_needs_is_no_cost_of_inference() -> None:
    with torch.device("meta"):
        model = build_stream_petr(preset("r50_704x256_428q"))
    head = sum(parameter.numel() for parameter in model.auxiliary.parameters())
    assert head > 0
    assert count_parameters(model) - count_parameters(model, at_inference=True) == head


@pytest.mark.parametrize(("is_close", "code"), [(True, 0), (False, 1)])
def test_a_disagreement_is_written_and_ends_with_one(
    is_close: bool,
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(benchmark, "run", lambda *_, **__: {"agreement": {"is_close": is_close}})
    file = tmp_path / "figures.json"
    assert benchmark.main(["--json", str(file)]) == code
    assert json.loads(file.read_text())["agreement"]["is_close"] is is_close
    assert ("disagree" in capsys.readouterr().err) is not is_close


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--repeats", "0"], "--repeats 0: expected at least 1"),
        (["--warm-up", "-1"], "--warm-up -1: expected at least 0"),
        (["--preset", "huge"], "unknown preset 'huge'"),
        (["--device", "warp"], "device 'warp'"),
    ],
)
def test_bad_options_are_one_sentence(
    arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert benchmark.main(arguments) == 2
    assert text in capsys.readouterr().err


def test_the_help_says_when_it_ends_with_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        benchmark.main(["--help"])
    assert "Exit code 1" in capsys.readouterr().out
