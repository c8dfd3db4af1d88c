# SPDX-License-Identifier: Apache-2.0
"""Training of a decoder on stored maps: the image part stays, a stopped run resumes, bad input is refused."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from ftkd_core.config import override
from ftkd_core.models.sparse_bev import build_sparse_bev
from ftkd_core.presets import sparse_bev_preset
from ftkd_core.weights import read_window_weights, save_weights
from training import decoder_only
from training.decoder_only import MapWindows
from training.tasks import FROZEN, MapBatch

PRESET = "sparse_bev_tiny_offline"
SMALL = (
    "image.width=96", "image.height=32", "backbone.base_channels=8", "decoder.channels=32",
    "decoder.num_heads=2", "decoder.num_layers=2", "decoder.ffn_channels=32", "decoder.num_queries=16",
    "decoder.num_image_queries=8", "num_past=1", "num_future=1",
)  # fmt: skip
LEARNED = "decoder.learned_linking=true"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with weights of a model without learned linking; scenes and maps are added to it."""
    path = tmp_path_factory.mktemp("decoder")
    torch.manual_seed(0)
    config = override(sparse_bev_preset(PRESET), SMALL)
    save_weights(path / "init.safetensors", build_sparse_bev(config).state_dict(), config)
    return path


def train(folder: Path, out: Path, *extra: str) -> int:
    settings = [part for value in (*SMALL, LEARNED) for part in ("--set", f"model.{value}")]
    return decoder_only.main(
        [
            "--preset", PRESET, "--init", str(folder / "init.safetensors"), "--out", str(out), "--clips",
            str(folder), "--scenes", "1", "--duration", "2", "--steps", "4", "--batch", "1",
            "--save-every", "2", *settings, *extra,
        ]
    )  # fmt: skip


def weights(path: Path) -> dict[str, Tensor]:
    state, config, _ = read_window_weights(path / "weights.safetensors")
    assert config.decoder.learned_linking  # type: ignore[union-attr]
    return state


def test_the_image_part_stays_and_the_decoder_learns(folder: Path, tmp_path: Path) -> None:
    assert train(folder, tmp_path) == 0
    before, _, _ = read_window_weights(folder / "init.safetensors")
    after = weights(tmp_path)
    for name, value in after.items():
        if name.startswith(FROZEN):
            assert torch.equal(value, before[name]), name
    changed = {
        name.split(".")[0] for name in after if name in before and not torch.equal(after[name], before[name])
    }
    assert {"decoder_layer", "proposal_content", "anchor_content"} <= changed
    assert any(name.startswith("linking.") for name in after)


def test_a_stopped_run_resumes_with_the_same_result(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train(folder, tmp_path / "whole") == 0
    original = MapWindows.__getitem__

    def stop_at_step_3(self: MapWindows, step: int) -> MapBatch:
        if step == 3:
            raise KeyboardInterrupt
        return original(self, step)

    monkeypatch.setattr(MapWindows, "__getitem__", stop_at_step_3)
    with pytest.raises(KeyboardInterrupt):
        train(folder, tmp_path / "parts")
    monkeypatch.undo()
    assert train(folder, tmp_path / "parts") == 0
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (
            ("--set", "model.backbone.base_channels=16"),
            "of sparse_bev_tiny_offline is missing or has another shape",
        ),
        (("--steps", "0"), "expected at least 1"),
        (("--set", "num_past=3"), "--set num_past=3: expected a setting of the model"),
        (
            ("--set", "model.decoder.learned_linking=false", "--set", "model.decoder.num_image_queries=0"),
            "expected a preset with a dense 2-D head",
        ),
    ],
)
def test_bad_input_is_one_sentence(
    folder: Path, tmp_path: Path, extra: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(folder, tmp_path, *extra) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
