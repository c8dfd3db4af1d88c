# SPDX-License-Identifier: Apache-2.0
"""`ftkd bench`: figures on the terminal and as JSON; one sentence per invalid option."""

import json
from pathlib import Path

import pytest

from ftkd_ros import cli
from ftkd_ros.commands import bench


def test_bench_prints_latency_and_peak_memory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "_ROUNDS", 1)
    monkeypatch.setattr(bench, "_WARM_UP", 0)
    file = tmp_path / "new" / "figures.json"
    assert (
        cli.main(["bench", "--device", "cpu", "--runtime", "fast", "--repeats", "2", "--json", str(file)])
        == 0
    )
    output = capsys.readouterr().out
    assert "tiny (tiny_synthetic.safetensors) on cpu, engine " in output
    assert "p50" in output and "peak memory" in output
    figures = json.loads(file.read_text(encoding="utf-8"))
    assert figures["latency_ms"]["count"] == 2 and figures["latency_ms"]["p50"] > 0
    assert figures["peak_memory_mb"] > 50


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--repeats", "0"], "--repeats 0: expected at least 1"),
        (["--preset", "huge"], "unknown preset 'huge'"),
        (["--runtime", "warp"], "runtime 'warp': expected one of auto, fast, plain"),
        (["--device", "warp"], "device 'warp'"),
    ],
)
def test_invalid_options_are_refused_in_one_sentence(
    arguments: list[str], text: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "_ROUNDS", 1)
    assert cli.main(["bench", *arguments]) == 2
    assert text in capsys.readouterr().err
