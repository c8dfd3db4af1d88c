# SPDX-License-Identifier: Apache-2.0
"""Start of a run: the warning about a random backbone, and process groups."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_fabric.strategies import DDPStrategy

from training import distill, train
from training.devices import make_fabric

WARNING = "warning: recipe stream_petr_r50 without --init: the backbone starts at random"


@pytest.mark.parametrize("command", ["train", "distill"])
def test_recipe_without_a_pretrained_backbone_prints_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    monkeypatch.setattr(train, "run_training", lambda *_: tmp_path)
    monkeypatch.setattr(distill, "load_teacher", lambda _: None)
    monkeypatch.setattr(distill, "weights_hash", lambda _: "")
    main, more = (train.main, []) if command == "train" else (distill.main, ["--teacher", "x"])
    recipe, real = ["--recipe", "stream_petr_r50"], ["--set", "data.root=/data/nuscenes"]

    def warns(*arguments: str) -> bool:
        assert main(["--out", str(tmp_path), "--accelerator", "cpu", *more, *arguments]) == 0
        return WARNING in capsys.readouterr().err

    assert warns(*recipe, *real)
    assert not warns(*recipe)
    assert not warns(*real)
    assert not warns(*recipe, *real, "--init", "backbone.safetensors")
    (tmp_path / "state.pt").touch()  # a run to resume
    assert not warns(*recipe, *real)


def test_processes_wait_long_enough_for_the_first_to_fill_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's default timeout is 30 minutes, or 10 on GPUs."""
    started: dict[str, Any] = {}

    def start(backend: str, **settings: Any) -> None:
        started.update(settings, backend=backend)
        raise InterruptedError

    for name, value in {
        "LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "GROUP_RANK": "0",
        "TORCHELASTIC_RUN_ID": "x", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.distributed, "init_process_group", start)
    fabric = make_fabric("cpu")
    with pytest.raises(InterruptedError):
        fabric.launch()
    assert started["world_size"] == 2 and started["timeout"] >= timedelta(hours=12)


def test_single_process_has_no_process_group() -> None:
    fabric = make_fabric("cpu")
    assert not isinstance(fabric.strategy, DDPStrategy)
