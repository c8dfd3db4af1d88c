# SPDX-License-Identifier: Apache-2.0
"""The training loop: losses fall, a killed run goes on exactly, and bad input is one sentence."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from lightning_fabric import Fabric
from torch.utils.data import Dataset

from ftkd_core.data.augmentation import AugmentConfig
from ftkd_core.data.clips import StreamBatch, StreamDataset
from ftkd_core.errors import UserError
from ftkd_core.models.build import build_stream_petr
from ftkd_core.runtime.detector import Detector
from tests.core.helpers import NO_AUGMENTATION, make_clip, small_config
from tests.core.test_focal_head import FOCAL
from tests.training.test_sliding_window import small_run
from training.tasks import StreamLesson
from training.train import TrainConfig, main, make_parser, resolve
from training.trainer import OptimConfig, Trainer

POINTS_AND_FOCAL_HEAD = ("decoder.num_image_queries=0", *FOCAL)
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


def spoil(name: str) -> Callable[[Trainer], None]:
    def fill(trainer: Trainer) -> None:
        with torch.no_grad():
            trainer.raw.get_parameter(name).fill_(torch.nan)

    return fill


def spoil_gradients(trainer: Trainer) -> None:
    for name in ("regressor.4.bias", "classifier.6.bias"):
        trainer.raw.get_parameter(name).register_hook(lambda gradient: gradient * torch.inf)


@pytest.mark.parametrize(
    ("spoils", "said", "settings"),
    [
        (spoil("auxiliary.output.bias"), "layer0/class: the cost is not finite", ()),
        (spoil("auxiliary.center2d.bias"), "2-D head: the cost is not finite", POINTS_AND_FOCAL_HEAD),
        (spoil("layers.1.ffn.0.bias"), "layer1/class: the cost is not finite", ()),
        (spoil("regressor.4.bias"), "layer0/box: the cost is not finite", ()),
        (spoil_gradients, "the gradient of detector.classifier.6.bias and 1 more is not finite", ()),
    ],
)
def test_what_is_not_finite_stops_the_run_by_name_and_keeps_the_checkpoint(
    tmp_path: Path, spoils: Callable[[Trainer], None], said: str, settings: tuple[str, ...]
) -> None:
    def trainer() -> Trainer:
        return make_trainer(tmp_path, 3, *settings)

    first = trainer()
    first.run(make_data(), workers=0, save_every=1)
    first.step = 2
    first.save()
    kept = contents(tmp_path)
    spoils(first)
    with pytest.raises(FloatingPointError, match=rf"^step 2: {said}.*; the last checkpoint is kept$"):
        first.run(make_data(), workers=0, save_every=1)
    assert contents(tmp_path) == kept
    again = trainer()
    again.resume(tmp_path / "state.pt")
    again.run(make_data(), workers=0, save_every=1)
    assert again.step == 3


def contents(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in ("state.pt", "weights.safetensors")]


def test_a_term_that_is_not_finite_is_named(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, 2)
    trainer.lesson.criterion.code_weights[3] = torch.nan  # past all that is matched
    with pytest.raises(FloatingPointError, match="^step 0: loss term layer0/box, layer1/box, .* not finite"):
        trainer.train_step(make_data()[0])


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path, ema: float) -> None:
    trainer = make_trainer(tmp_path, 3, optim=dataclasses.replace(OPTIM, ema=ema))
    trainer.save()
    kept = contents(tmp_path)
    for model in filter(None, (trainer.raw, trainer.average)):
        with torch.no_grad():
            model.get_parameter("classifier.6.bias")[0] = torch.nan
    trainer.step = 2
    with pytest.raises(FloatingPointError, match="step 2: tensor classifier.6.bias holds nan or inf"):
        trainer.save()
    assert contents(tmp_path) == kept


@pytest.mark.parametrize("save_every", [1, 100])
def test_a_run_that_diverges_ends_with_a_sentence_and_goes_on_from_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], save_every: int
) -> None:
    assert small_run(tmp_path / "run", 1) == 0
    kept = contents(tmp_path / "run")
    assert small_run(tmp_path / "run", 9, "optim.lr=1e30", f"save_every={save_every}") == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("training: step ") and last.endswith("; the last checkpoint is kept")
    assert ("half precision" in last) == (save_every == 1)
    assert contents(tmp_path / "run") == kept
    assert small_run(tmp_path / "run", 2) == 0
    assert "resumed at step 1 of 2" in capsys.readouterr().out


def test_an_average_that_was_not_kept_starts_from_what_was_learnt(tmp_path: Path) -> None:
    first = make_trainer(tmp_path, 4, optim=dataclasses.replace(OPTIM, ema=0.0))
    first.train_step(make_data()[0])
    first.step = 1
    first.save()
    again = make_trainer(tmp_path, 4)
    again.resume(tmp_path / "state.pt")
    assert again.average is not None
    for name, value in again.average.state_dict().items():
        assert torch.equal(value, first.raw.state_dict()[name]), name


def test_checkpoints_of_other_processes_are_refused_and_older_ones_of_one_are_read(tmp_path: Path) -> None:
    first = make_trainer(tmp_path, 4)
    first.train_step(make_data()[0])
    first.save()
    kept = torch.load(tmp_path / "state.pt", weights_only=True)
    torch.save({**kept, "states": kept["states"] * 2}, tmp_path / "two.pt")
    with pytest.raises(UserError, match="two.pt' is of 2 processes, this run has 1; start as many"):
        make_trainer(tmp_path, 4).resume(tmp_path / "two.pt")
    kept["state"] = kept.pop("states")[0]
    torch.save(kept, tmp_path / "older.pt")
    again = make_trainer(tmp_path, 4)
    again.resume(tmp_path / "older.pt")
    for mine, yours in zip(again.state, first.state, strict=True):
        assert torch.equal(mine, yours)


class OneThread(Dataset[StreamBatch]):
    """Data that are only there where OpenCV has one thread."""

    def __init__(self, data: StreamDataset) -> None:
        self.data = data

    def __getitem__(self, step: int) -> StreamBatch:
        assert cv2.getNumThreads() == 1
        return self.data[step]


@pytest.fixture
def opencv_threads() -> Iterator[None]:
    """Four threads of OpenCV in this process, which have been at work."""
    before = cv2.getNumThreads()
    cv2.setNumThreads(4)
    cv2.GaussianBlur(np.zeros((500, 500, 3), np.uint8), (9, 9), 0)
    yield
    cv2.setNumThreads(before)


@pytest.mark.usefixtures("opencv_threads")
@pytest.mark.timeout(60)
def test_a_worker_of_the_loader_takes_one_core(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, 1)
    trainer.run(OneThread(make_data()), workers=1, save_every=1)
    assert trainer.step == 1


def test_another_configuration_or_batch_is_refused(tmp_path: Path) -> None:
    make_trainer(tmp_path, 2).save()
    other = make_trainer(tmp_path, 2, "decoder.num_layers=1")
    with pytest.raises(UserError, match=r"another configuration \(model.decoder.num_layers 2, here 1\)"):
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
