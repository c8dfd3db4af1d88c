# SPDX-License-Identifier: Apache-2.0
"""The self-check of the fast engine, and what `auto` does if an engine cannot be used."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ftkd_core.errors import UserError
from ftkd_core.runtime import engine_choice
from ftkd_core.runtime.engine_choice import Choice, EngineOptions, select_engine
from ftkd_core.runtime.engines import Engine, PlainEngine, Rows
from ftkd_core.runtime.fast import FastEngine
from ftkd_core.runtime.self_check import Verdict, check_engine, remembered
from ftkd_core.types import CameraRound
from tests.core.helpers import small_model

CPU = torch.device("cpu")


def plain() -> PlainEngine:
    return PlainEngine(small_model(), CPU, 50)


class Failing:
    """An engine whose first round raises, as a compiler does."""

    def start(self, camera_round: CameraRound, *, time_s: float, is_first: bool) -> Callable[[], Rows]:
        raise RuntimeError("no kernel image is available")


def missing() -> Engine:
    raise AssertionError("backend compiler failed")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_fast_engine_passes(dtype: torch.dtype) -> None:
    verdict = check_engine(lambda: FastEngine(small_model(), CPU, 50, dtype=dtype), plain(), small_model())
    assert verdict.passed and "100.0% of boxes" in verdict.reason


def test_an_engine_with_other_weights_does_not_pass() -> None:
    other = small_model(seed=1)
    verdict = check_engine(lambda: FastEngine(other, CPU, 50), plain(), small_model())
    assert not verdict.passed


@pytest.mark.parametrize(("make", "name"), [(Failing, "RuntimeError"), (missing, "AssertionError")])
def test_an_engine_that_raises_does_not_pass(make: Callable[[], Engine], name: str) -> None:
    assert check_engine(make, plain(), small_model()) == Verdict(
        False, f"the fast engine failed its self-check: {name}"
    )


def test_a_verdict_is_remembered_per_key(tmp_path: Path) -> None:
    path, asked = tmp_path / "cache" / "self_checks.json", []

    def check() -> Verdict:
        asked.append(1)
        return Verdict(True, "fine")

    for key in ("a", "b", "a"):
        assert remembered(path, key, check) == Verdict(True, "fine")
    assert len(asked) == 2


@pytest.mark.parametrize("text", ["", "{", "[]", '{"a": 3}', '{"a": [true]}'])
def test_a_damaged_file_is_checked_again_and_replaced(text: str, tmp_path: Path) -> None:
    path = tmp_path / "self_checks.json"
    path.write_text(text)
    assert remembered(path, "a", lambda: Verdict(False, "slow")) == Verdict(False, "slow")
    assert remembered(path, "a", lambda: pytest.fail("asked again")) == Verdict(False, "slow")


def test_old_verdicts_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "self_checks.json"
    for index in range(40):
        remembered(path, str(index), lambda: Verdict(True, "fine"))
    stored = json.loads(path.read_text())
    assert list(stored) == [str(index) for index in range(8, 40)]


def test_auto_on_a_cpu_falls_back_to_the_fast_engine(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_disk(*_: object) -> Path:
        raise OSError("[Errno 30] Read-only file system")

    monkeypatch.setattr(engine_choice, "cached_export", no_disk)
    monkeypatch.setattr(
        engine_choice, "choose_runtime", lambda name, *_, **__: Choice("onnx" if name == "auto" else name, "")
    )
    engine, choice = select_engine("auto", small_model(), CPU, EngineOptions(50))
    assert isinstance(engine, FastEngine) and choice.name == "fast"
    assert "Read-only file system" in choice.reason and "using the fast engine" in caplog.text
    with pytest.raises(OSError, match="Read-only"):
        select_engine("onnx", small_model(), CPU, EngineOptions(50))


def test_a_requested_engine_on_the_wrong_device_is_refused() -> None:
    with pytest.raises(UserError, match="runs on a CPU only"):
        engine_choice.make_engine(
            "openvino", small_model(), torch.device("cuda"), EngineOptions(50, exported=Path("a.onnx"))
        )
