# SPDX-License-Identifier: Apache-2.0
"""Runs that start from a file and are what it is, and runs of some of the cameras."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_fabric import Fabric

from ftkd_core.classes import CLASS_NAMES
from ftkd_core.config import BackboneConfig, DetectorConfig, SparseBEVConfig
from ftkd_core.data.clips import Clip
from ftkd_core.models.build import build_stream_petr
from ftkd_core.models.resnet import ResNet
from ftkd_core.weights import read_config, read_weights, save_weights
from ftkd_core.weights.importing.conventions import model_from_ego
from ftkd_core.weights.importing.stream_petr import POINT_RANGE_M
from tests.core.helpers import make_clip, small_config
from tests.core.test_focal_head import FOCAL
from tests.core.test_sparse_bev import small_sparse
from training import datasets, train

CAMERAS = "channels=[CAM_FRONT, CAM_BACK]"


class NoWorld:
    """Clips of noise in the place of rendered ones."""

    name = "noise"

    def __init__(self, *_settings: Any) -> None:
        pass

    def __call__(self, index: int) -> Clip:
        return make_clip(seed=index)

    def render_all(self, count: int) -> None:
        assert count == 1


@pytest.fixture(autouse=True)
def no_world(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "SyntheticClips", NoWorld)


def run(out: Path, *more: str) -> int:
    """Two steps that leave the weights as they were."""
    settings = ["data.scenes=1", "data.workers=0", "optim.lr=0", "optim.ema=0", "steps=2", "streams=1"]
    return train.main(
        ["--out", str(out), "--accelerator", "cpu", *(f"--set={text}" for text in settings), *more]
    )


def imported_config() -> DetectorConfig:
    """A small model with everything that imported ones have and presets have not."""
    config = small_config(
        *FOCAL, "decoder.as_published=true", "decoder.num_depths=32",
        f"decoder.point_range_m={list(POINT_RANGE_M)}", CAMERAS,
        image_queries=0,
    )  # fmt: skip
    order = (*CLASS_NAMES[1:], CLASS_NAMES[0])
    return replace(config, preset="imported", model_from_ego=model_from_ego(), class_names=order)


def test_an_imported_model_is_trained_on_as_what_it_is(tmp_path: Path) -> None:
    config = imported_config()
    torch.manual_seed(7)
    state = build_stream_petr(config).state_dict()
    save_weights(tmp_path / "imported.safetensors", state, config, half=False)
    assert run(tmp_path / "run", "--preset", "init", "--init", str(tmp_path / "imported.safetensors")) == 0
    found, kept, notes = read_weights(tmp_path / "run" / "weights.safetensors")
    assert kept == config
    assert notes["steps"] == 2
    for name in ("classifier.6.weight", "layers.0.cross_attention.key.weight", "pseudo_points"):
        assert found[name].equal(state[name].half().float()), name


def test_a_window_model_goes_on_as_what_it_is_and_settings_come_after(tmp_path: Path) -> None:
    model = small_sparse("decoder.point_range_m=[-40.0, -40.0, -5.0, 51.2, 51.2, 3.0]")
    save_weights(tmp_path / "file.safetensors", model.state_dict(), model.config)
    init = ["--preset", "init", "--init", str(tmp_path / "file.safetensors")]
    config = train.resolve(train.make_parser().parse_args(["--out", "x", *init, "--set", f"model.{CAMERAS}"]))
    assert isinstance(config.model, SparseBEVConfig)
    assert config.model == replace(model.config, channels=("CAM_FRONT", "CAM_BACK"))


def test_what_is_no_models_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = BackboneConfig(depth=18, base_channels=8)
    save_weights(tmp_path / "backbone.safetensors", ResNet(18, 8).state_dict(), config)

    def refused(*more: str) -> str:
        assert run(tmp_path / "run", "--preset", "init", *more) == 2
        return capsys.readouterr().err

    assert "--preset init without a file; give one with --init" in refused()
    assert "holds a backbone alone" in refused("--init", str(tmp_path / "backbone.safetensors"))
    assert "not found" in refused("--init", str(tmp_path / "none.safetensors"))


def test_a_run_shows_the_cameras_of_its_model(tmp_path: Path) -> None:
    small = [f"--set=model.{text}" for text in ("image.width=96", "image.height=32", CAMERAS)]
    few = ["decoder.num_image_queries=24", "backbone.base_channels=8", "decoder.num_layers=1"]
    arguments = [*small, *(f"--set=model.{text}" for text in few)]
    config = train.resolve(train.make_parser().parse_args(["--out", "x", "--set=data.scenes=1", *arguments]))
    clips, count = datasets.open_clips(config, Fabric(accelerator="cpu", devices=1))
    assert count == 1
    assert clips(0).images.shape[1] == len(clips(0).intrinsics) == 2
    assert clips.name == "noise by CAM_FRONT, CAM_BACK"
    assert run(tmp_path / "run", *arguments) == 0
    found = read_config(tmp_path / "run" / "weights.safetensors")
    assert isinstance(found, DetectorConfig) and found.channels == ("CAM_FRONT", "CAM_BACK")
