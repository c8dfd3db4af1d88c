# SPDX-License-Identifier: Apache-2.0
"""Runs that continue a weights file with its own configuration, and runs with a subset of cameras."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ftkd_core.classes import CAMERA_CHANNELS, CLASS_NAMES
from ftkd_core.config import BackboneConfig, DetectorConfig, SparseBEVConfig, override
from ftkd_core.models.build import build_stream_petr
from ftkd_core.models.resnet import ResNet
from ftkd_core.models.sparse_bev import SparseBEV
from ftkd_core.models.stream_petr import StreamPETR
from ftkd_core.weights import read_config, read_weights, save_weights, start_from
from ftkd_core.weights.importing.conventions import model_from_ego
from ftkd_core.weights.importing.stream_petr import POINT_RANGE_M
from tests.core.helpers import FOCAL, small_config, small_sparse
from tests.training.helpers import (
    NoiseClips,
    Task,
    cpu_fabric,
    make_trainer,
    stream_data,
    window_data,
)
from training import datasets, train
from training.tasks import StreamingTask, WindowTask
from training.trainer import Trainer

CAMERAS = "channels=[CAM_FRONT, CAM_BACK]"


@pytest.fixture(autouse=True)
def noise_clips(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace rendered clips by noise."""
    monkeypatch.setattr(datasets, "SyntheticClips", lambda *_: NoiseClips())


def run(out: Path, *more: str) -> int:
    """Train two steps at learning rate 0, so that the weights do not change."""
    settings = ["data.scenes=1", "data.workers=0", "optim.lr=0", "optim.ema=0", "steps=2", "streams=1"]
    return train.main(
        ["--out", str(out), "--accelerator", "cpu", *(f"--set={text}" for text in settings), *more]
    )


def imported_config() -> DetectorConfig:
    """Return a small model with all settings that imported models have and presets lack."""
    config = small_config(
        *FOCAL, "decoder.as_published=true", "decoder.num_depths=32",
        f"decoder.point_range_m={list(POINT_RANGE_M)}", CAMERAS,
        image_queries=0,
    )  # fmt: skip
    order = (*CLASS_NAMES[1:], CLASS_NAMES[0])
    return replace(config, preset="imported", model_from_ego=model_from_ego(), class_names=order)


def test_imported_model_keeps_its_configuration_in_training(tmp_path: Path) -> None:
    config = imported_config()
    torch.manual_seed(7)
    state = build_stream_petr(config).state_dict()
    save_weights(tmp_path / "imported.safetensors", state, config, half=False)
    assert run(tmp_path / "run", "--preset", "init", "--init", str(tmp_path / "imported.safetensors")) == 0
    found, saved_config, notes = read_weights(tmp_path / "run" / "weights.safetensors")
    assert saved_config == config
    assert notes["steps"] == 2
    for name in ("classifier.6.weight", "layers.0.cross_attention.key.weight", "pseudo_points"):
        assert found[name].equal(state[name].half().float()), name


def test_overrides_apply_to_the_configuration_of_the_init_file(tmp_path: Path) -> None:
    model = small_sparse("decoder.point_range_m=[-40.0, -40.0, -5.0, 51.2, 51.2, 3.0]")
    save_weights(tmp_path / "file.safetensors", model.state_dict(), model.config)
    config = train.resolve_config(
        train.TrainOptions(
            out=Path("x"), preset="init", init=tmp_path / "file.safetensors", overrides=[f"model.{CAMERAS}"]
        )
    )
    assert isinstance(config.model, SparseBEVConfig)
    assert config.model == replace(model.config, channels=("CAM_FRONT", "CAM_BACK"))


def test_init_files_without_a_model_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = BackboneConfig(depth=18, base_channels=8)
    save_weights(tmp_path / "backbone.safetensors", ResNet(18, 8).state_dict(), config)

    def refused(*more: str) -> str:
        assert run(tmp_path / "run", "--preset", "init", *more) == 2
        return capsys.readouterr().err

    assert "--preset init without a file; give one with --init" in refused()
    assert "is only a backbone" in refused("--init", str(tmp_path / "backbone.safetensors"))
    assert "not found" in refused("--init", str(tmp_path / "none.safetensors"))


def test_run_uses_the_cameras_of_its_model(tmp_path: Path) -> None:
    model = ["image.width=96", "image.height=32", CAMERAS, "decoder.num_image_queries=24",
             "backbone.base_channels=8", "decoder.num_layers=1"]  # fmt: skip
    overrides = [f"model.{text}" for text in model]
    config = train.resolve_config(train.TrainOptions(out=Path("x"), overrides=["data.scenes=1", *overrides]))
    clips, count = datasets.open_clips(config, cpu_fabric())
    assert count == 1
    assert clips(0).images.shape[1] == len(clips(0).intrinsics) == 2
    assert clips.name == "noise by CAM_FRONT, CAM_BACK"
    assert run(tmp_path / "run", *(f"--set={text}" for text in overrides)) == 0
    found = read_config(tmp_path / "run" / "weights.safetensors")
    assert isinstance(found, DetectorConfig) and found.channels == ("CAM_FRONT", "CAM_BACK")


@pytest.mark.timeout(120)
@pytest.mark.parametrize("sparse", [False, True])
def test_fine_tuning_continues_at_the_loss_of_the_imported_weights(tmp_path: Path, sparse: bool) -> None:
    """A published model that was trained keeps its loss in the first steps of another run."""
    torch.manual_seed(0)
    model: StreamPETR | SparseBEV
    if sparse:
        model, data = small_sparse("decoder.as_published=true", past=1), window_data(future=0)
        task: Task = WindowTask(model)
    else:
        config = override(
            imported_config(), ["channels=[" + ", ".join(CAMERA_CHANNELS) + "]", "loss.denoising_groups=2"]
        )
        model, data = build_stream_petr(config), stream_data()
        task = StreamingTask(model, 2)

    def total(trainer: Trainer) -> float:
        terms, _ = trainer.train_step(data[trainer.step % 4])
        trainer.step += 1
        return float(sum(terms.values()))

    trainer = make_trainer(tmp_path / "first", task, 32)
    losses = [total(trainer) for _ in range(32)]
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])
    save_weights(tmp_path / "model.safetensors", model.state_dict(), model.config)
    torch.manual_seed(9)
    again = type(model)(model.config)
    start_from(tmp_path / "model.safetensors", again, model.config, [])
    tuned = StreamingTask(again, 2) if isinstance(again, StreamPETR) else WindowTask(again)
    trainer = make_trainer(tmp_path / "second", tuned, 32)
    assert sum(total(trainer) for _ in range(4)) < 1.2 * sum(losses[-4:])
