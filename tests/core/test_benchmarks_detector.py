# SPDX-License-Identifier: Apache-2.0
"""Benchmark of the detector: content of its JSON, order of its measurements, and exit codes."""

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


@pytest.mark.timeout(600)  # needs 10 s of processor time, more on a busy machine
def test_json_holds_all_required_figures_and_peak_memory_is_measured_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []

    def record_call(name: str) -> Callable[..., Any]:
        original: Callable[..., Any] = getattr(benchmark, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            order.append(name)
            return original(*args, **kwargs)

        return call

    for name in ("peak_memory_mb", "compare_detectors", "count_gflops"):
        monkeypatch.setattr(benchmark, name, record_call(name))
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
    assert figures["params"] == figures["params_at_inference"] > 4e6  # the 2-D head proposes queries
    assert 5 < figures["gflops"] < 20
    assert (figures["tf32"], figures["network_dtype"]) == (False, "torch.float32")
    assert figures["runs"] | {"timed": 1, "warm_up": 0, "meets_protocol": False} == figures["runs"]
    assert order == ["peak_memory_mb", "compare_detectors", "count_gflops"], (
        "later steps must not add to the peak"
    )


def test_inference_parameters_exclude_a_training_only_head() -> None:
    with torch.device("meta"):
        model = build_stream_petr(preset("r50_704x256_428q"))
    head = sum(parameter.numel() for parameter in model.auxiliary.parameters())
    assert head > 0
    assert count_parameters(model) - count_parameters(model, at_inference=True) == head


@pytest.mark.parametrize(("is_close", "code"), [(True, 0), (False, 1)])
def test_exit_code_is_1_after_a_disagreement_and_figures_are_written(
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
def test_invalid_option_prints_one_sentence_and_exits_with_2(
    arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert benchmark.main(arguments) == 2
    assert text in capsys.readouterr().err


def test_help_documents_exit_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        benchmark.main(["--help"])
    assert "Exit code 1" in capsys.readouterr().out
