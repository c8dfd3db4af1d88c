# SPDX-License-Identifier: Apache-2.0
"""Benchmark of the parts of a frame, on a small model."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import parts
from benchmarks import run as bench
from ftkd_core.runtime import devices
from ftkd_core.runtime.detector import Detector
from tests.core.helpers import small_model
from tests.core.rounds import make_round

CPU = torch.device("cpu")


def small(_name: str, _weights: Path | None = None) -> tuple[Any, str]:
    return small_model(), "small"


def test_json_holds_the_figures_of_every_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "load_preset_model", small)
    monkeypatch.setattr(parts, "_ROUNDS", 2)
    file = tmp_path / "figures.json"
    options = ["--device", "cpu", "--repeats", "2", "--warm-up", "0", "--frames", "24", "--json", str(file)]
    assert parts.main(options) == 0
    figures = json.loads(file.read_text())
    backbone, memory, images = (figures[name] for name in ("backbone", "memory", "images"))
    rest = backbone["step_ms"] - backbone["backbone_ms"]
    assert backbone["rest_over_backbone"] == pytest.approx(rest / backbone["backbone_ms"], rel=1e-3)
    assert memory["on_over_off"] == pytest.approx(memory["on_ms"] / memory["off_ms"], rel=1e-3)
    assert images["engine_ms"] > 0 and images["one_core_ms"] > 0
    stream = figures["stream"]
    assert (stream["frames"], stream["compiled_again"], stream["host_waits_in_start"]) == (24, 0, None)
    assert stream["late_over_early"] == pytest.approx(stream["late_ms"] / stream["early_ms"], rel=1e-3)


def test_endless_drive_has_increasing_stamps_and_no_jumps() -> None:
    rounds = [make_round(index) for index in range(4)]
    drive = list(itertools.islice(parts.endless(rounds), 14))
    stamps = [camera_round.reference_stamp_ns for camera_round in drive]
    assert np.diff(stamps).tolist() == [500_000_000] * 13
    numbers = {id(camera_round.views): number for number, camera_round in enumerate(rounds)}
    places = [numbers[id(camera_round.views)] for camera_round in drive]
    assert places == [0, 1, 2, 3, 2, 1, 0, 1, 2, 3, 2, 1, 0, 1], "no jump"


def test_long_stream_steps_the_requested_number_of_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[int, int] = {}
    start = Detector.start

    def counted(self: Detector, camera_round: Any) -> Any:
        seen[id(self)] = seen.get(id(self), 0) + 1
        return start(self, camera_round)

    monkeypatch.setattr(Detector, "start", counted)
    parts.long_stream(small_model(), [make_round(0), make_round(1)], CPU, 30, (1, 0))
    assert sorted(seen.values()) == [parts.EARLY + 1, 31], "each is timed once more"


def test_model_without_memory_has_the_same_number_of_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    real = parts.fast_detector

    def record_decoder(model: Any, device: torch.device) -> Detector:
        made.append(model.config.decoder)
        return real(model, device)

    monkeypatch.setattr(parts, "fast_detector", record_decoder)
    parts.memory_cost(small_model(), [make_round(0), make_round(1)], CPU, (1, 0))
    with_memory, without = made
    assert without.num_queries + 1 == with_memory.num_queries + with_memory.num_propagated
    assert without.num_image_queries == with_memory.num_image_queries
    assert without.memory_length == 1


def test_device_name_contains_the_processor_model(monkeypatch: pytest.MonkeyPatch) -> None:
    cpuinfo = "processor : 0\nmodel name : Some CPU @ 2 GHz\n\nprocessor : 1\nmodel name : Some CPU @ 2 GHz\n"
    monkeypatch.setattr(Path, "read_text", lambda self, **_: cpuinfo)
    assert devices.device_name(CPU).endswith(" cores, Some CPU @ 2 GHz")

    def missing(self: Path, **_: object) -> str:
        raise FileNotFoundError(self)

    monkeypatch.setattr(Path, "read_text", missing)
    assert devices.processor_name()


def test_compilations_are_counted() -> None:
    before = parts.compilations()
    torch.compile(lambda x: x + 1, backend="eager")(torch.zeros(2))
    assert parts.compilations() == before + 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--repeats", "0"], "--repeats 0: expected at least 1"),
        (["--warm-up", "-1"], "--warm-up -1: expected at least 0"),
        (["--frames", "19"], "--frames 19: expected at least 20"),
        (["--preset", "huge"], "unknown preset 'huge'"),
    ],
)
def test_invalid_option_prints_one_sentence_and_exits_with_2(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert parts.main([*options, "--device", "cpu"]) == 2
    assert message in capsys.readouterr().err


def test_quick_benchmark_prints_a_table_of_goals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in (parts, bench.detector):
        monkeypatch.setattr(module, "load_preset_model", small)
        monkeypatch.setattr(module, "_ROUNDS", 2)
    monkeypatch.setattr(bench, "bench_world", lambda repeats: {"render": 1.0})
    file = tmp_path / "figures.json"
    assert bench.main(["--device", "cpu", "--repeats", "1", "--frames", "20", "--json", str(file)]) == 0
    output = capsys.readouterr().out
    figures = json.loads(file.read_text())
    share = figures["parts"]["backbone"]["rest_over_backbone"]
    assert f"| rest of the step / backbone | {share:.3g} | 0.36 |" in output
    assert f"| plain twin / detector | {figures['detector']['ratio']:.3g} | at least 8 |" in output
    assert bench.main(["--repeats", "0"]) == 2
    assert "expected at least 1" in capsys.readouterr().err
