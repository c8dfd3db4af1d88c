# SPDX-License-Identifier: Apache-2.0
"""What the commands see to before the first step: where a recipe's backbone comes from, and how long
processes wait for the first."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_fabric.strategies import DDPStrategy

from training import distill, train

WARNING = "warning: recipe stream_petr_r50 without --init: the backbone starts at random"


@pytest.mark.parametrize("command", ["train", "distill"])
def test_a_recipe_without_a_backbone_is_remarked_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    monkeypatch.setattr(train, "run", lambda *_: tmp_path)
    monkeypatch.setattr(distill, "load_teacher", lambda _: None)
    monkeypatch.setattr(distill, "weights_hash", lambda _: "")
    main, more = (train.main, []) if command == "train" else (distill.main, ["--teacher", "x"])
    recipe, real = ["--recipe", "stream_petr_r50"], ["--set", "data.root=/data/nuscenes"]

    def said(*arguments: str) -> bool:
        assert main(["--out", str(tmp_path), "--accelerator", "cpu", *more, *arguments]) == 0
        return WARNING in capsys.readouterr().err

    assert said(*recipe, *real)
    assert not said(*recipe)
    assert not said(*real)
    assert not said(*recipe, *real, "--init", "backbone.safetensors")
    (tmp_path / "state.pt").touch()  # a run to go on with
    assert not said(*recipe, *real)


def test_processes_wait_while_the_first_fills_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch would give up after half an hour, or ten minutes on GPUs."""
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
    fabric = train.make_fabric(train.make_parser().parse_args(["--out", "x", "--accelerator", "cpu"]))
    with pytest.raises(InterruptedError):
        fabric.launch()
    assert started["world_size"] == 2 and started["timeout"] >= timedelta(hours=12)


def test_one_process_is_not_wrapped() -> None:
    fabric = train.make_fabric(train.make_parser().parse_args(["--out", "x", "--accelerator", "cpu"]))
    assert not isinstance(fabric.strategy, DDPStrategy)
