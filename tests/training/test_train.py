# SPDX-License-Identifier: Apache-2.0
"""The training loop: losses fall, a killed run goes on exactly, and bad input is one sentence."""

import dataclasses
from pathlib import Path

import pytest
import torch
from lightning_fabric import Fabric

from ftkd_core.data.clips import AugmentConfig, StreamDataset
from ftkd_core.errors import UserError
from ftkd_core.models.stream_petr import build_stream_petr
from ftkd_core.runtime.detector import Detector
from tests.core.helpers import NO_AUGMENTATION, make_clip, small_config
from training.lessons import StreamLesson
from training.loop import OptimConfig, Trainer
from training.train import TrainConfig, main, make_parser, resolve

OPTIM = OptimConfig(lr=1e-3, warmup_steps=2, ema=0.9)


def make_trainer(out: Path, steps: int, *extra: str, optim: OptimConfig = OPTIM) -> Trainer:
    fabric = Fabric(accelerator="cpu", devices=1)
    fabric.seed_everything(3, verbose=False)
    model = build_stream_petr(small_config("decoder.dropout=0.1", *extra))
    out.mkdir(exist_ok=True)
    return Trainer(fabric, StreamLesson(model, 2), optim, out, steps=steps, seed=3)


def make_data(augment: AugmentConfig = NO_AUGMENTATION) -> StreamDataset:
    clips = [make_clip(seed=seed) for seed in range(2)]
    return StreamDataset(clips.__getitem__, 2, num_streams=2, segment=3, augment=augment, seed=3)


def test_a_killed_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    data = make_data(AugmentConfig())
    whole = make_trainer(tmp_path / "whole", 6)
    whole.run(data, workers=0, save_every=3)
    killed = make_trainer(tmp_path / "killed", 6)
    killed.steps = 6
    for step in range(4):  # dies after step 4; its last checkpoint is of step 3
        killed.train_step(data[step])
        killed.step += 1
        if killed.step == 3:
            killed.save()
    again = make_trainer(tmp_path / "killed", 6)
    again.resume(tmp_path / "killed" / "state.pt")
    assert again.step == 3
    again.run(data, workers=0, save_every=3)
    for name, value in whole.raw.state_dict().items():
        assert torch.equal(value, again.raw.state_dict()[name]), name
    for name, value in whole.average.state_dict().items():
        assert torch.equal(value, again.average.state_dict()[name]), name


def test_the_loss_falls_on_two_clips(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, 60, optim=dataclasses.replace(OPTIM, lr=2e-3))
    trainer.model.train()
    data = make_data()
    totals = []
    for step in range(60):
        terms, norm = trainer.train_step(data[step])
        trainer.step += 1
        totals.append(sum(float(value) for value in terms.values()))
        assert torch.isfinite(norm)
    assert sum(totals[-6:]) < 0.7 * sum(totals[:6])


def test_a_checkpoint_becomes_a_detector(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, 2)
    trainer.run(make_data(), workers=0, save_every=2)
    detector = Detector.from_weights(tmp_path / "weights.safetensors", device="cpu")
    assert detector.preset == "tiny"
    assert list((tmp_path / "tensorboard").iterdir())


def test_a_loss_that_is_not_finite_stops_and_names_the_term(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, 2)
    trainer.save()
    with torch.no_grad():
        trainer.raw.auxiliary.output.bias.fill_(torch.nan)
    with pytest.raises((FloatingPointError, ValueError), match="not finite"):
        trainer.train_step(make_data()[0])
    assert (tmp_path / "state.pt").exists()


def test_another_configuration_or_batch_is_refused(tmp_path: Path) -> None:
    make_trainer(tmp_path, 2).save()
    other = make_trainer(tmp_path, 2, "decoder.num_layers=1")
    with pytest.raises(UserError, match="another configuration"):
        other.resume(tmp_path / "state.pt")


def test_the_command_line_resolves_every_setting() -> None:
    arguments = make_parser().parse_args(
        ["--out", "x", "--steps", "7", "--set", "optim.lr=0.002", "--set", "model.decoder.num_layers=2"]
    )
    config = resolve(arguments)
    assert isinstance(config, TrainConfig)
    assert (config.steps, config.optim.lr, config.model.decoder.num_layers) == (7, 0.002, 2)


def test_bad_input_is_one_sentence_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--out", str(tmp_path), "--preset", "huge"]) == 2
    assert "unknown preset 'huge'" in capsys.readouterr().err
    assert main(["--out", str(tmp_path), "--set", "optim.rate=1"]) == 2
    assert "unknown configuration key optim.rate" in capsys.readouterr().err
