# SPDX-License-Identifier: Apache-2.0
"""The training loop: losses fall, a killed run resumes exactly, and errors are reported in one sentence."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from ftkd_core.data.augmentation import AugmentConfig
from ftkd_core.data.clips import StreamBatch, StreamDataset
from ftkd_core.errors import UserError
from ftkd_core.runtime.detector import Detector
from tests.core.helpers import FOCAL
from tests.training.helpers import STREAM_OPTIM, stream_data, stream_trainer, train_small
from training.config import TrainConfig
from training.train import TrainOptions, main, resolve_config
from training.trainer import Trainer

POINTS_AND_FOCAL_HEAD = (
    "decoder.num_image_queries=0", *FOCAL,
)  # fmt: skip


def test_killed_run_resumes_bit_for_bit(tmp_path: Path) -> None:
    data = stream_data(AugmentConfig())
    whole = stream_trainer(tmp_path / "whole", 6)
    whole.run(data, workers=0, save_every=3)
    killed = stream_trainer(tmp_path / "killed", 6)
    for step in range(4):  # interrupted after step 4; the last checkpoint was written at step 3
        killed.train_step(data[step])
        killed.step += 1
        if killed.step == 3:
            killed.save()
    resumed = stream_trainer(tmp_path / "killed", 6)
    resumed.resume(tmp_path / "killed" / "state.pt")
    assert resumed.step == 3
    resumed.run(data, workers=0, save_every=3)
    for name, value in whole.raw.state_dict().items():
        assert torch.equal(value, resumed.raw.state_dict()[name]), name
    assert whole.average is not None and resumed.average is not None
    for name, value in whole.average.state_dict().items():
        assert torch.equal(value, resumed.average.state_dict()[name]), name


def test_loss_falls_on_two_clips(tmp_path: Path) -> None:
    trainer = stream_trainer(tmp_path, 60, optim=dataclasses.replace(STREAM_OPTIM, lr=2e-3))
    trainer.model.train()
    data = stream_data()
    totals = []
    for step in range(60):
        terms, norm = trainer.train_step(data[step])
        trainer.step += 1
        totals.append(sum(float(value) for value in terms.values()))
        assert torch.isfinite(norm)
    assert sum(totals[-6:]) < 0.7 * sum(totals[:6])


def test_saved_weights_load_into_a_detector(tmp_path: Path) -> None:
    trainer = stream_trainer(tmp_path, 2)
    trainer.run(stream_data(), workers=0, save_every=2)
    detector = Detector.from_weights(tmp_path / "weights.safetensors", device="cpu", runtime="plain")
    assert detector.preset == "tiny"
    assert list((tmp_path / "tensorboard").iterdir())


def fill_with_nan(name: str) -> Callable[[Trainer], None]:
    def fill(trainer: Trainer) -> None:
        with torch.no_grad():
            trainer.raw.get_parameter(name).fill_(torch.nan)

    return fill


def scale_gradients_to_inf(trainer: Trainer) -> None:
    for name in ("regressor.4.bias", "classifier.6.bias"):
        trainer.raw.get_parameter(name).register_hook(lambda gradient: gradient * torch.inf)


@pytest.mark.parametrize(
    ("damage", "message", "settings"),
    [
        (fill_with_nan("auxiliary.output.bias"), "layer0/class: the cost is not finite", ()),
        (fill_with_nan("auxiliary.center2d.bias"), "2-D head: the cost is not finite", POINTS_AND_FOCAL_HEAD),
        (fill_with_nan("layers.1.ffn.0.bias"), "layer1/class: the cost is not finite", ()),
        (fill_with_nan("regressor.4.bias"), "layer0/box: the cost is not finite", ()),
        (scale_gradients_to_inf, "the gradient of detector.classifier.6.bias and 1 more is not finite", ()),
    ],
)
def test_non_finite_values_stop_the_run_and_keep_the_checkpoint(
    tmp_path: Path, damage: Callable[[Trainer], None], message: str, settings: tuple[str, ...]
) -> None:
    def trainer() -> Trainer:
        return stream_trainer(tmp_path, 3, *settings)

    first = trainer()
    first.run(stream_data(), workers=0, save_every=1)
    first.step = 2
    first.save()
    saved = contents(tmp_path)
    damage(first)
    with pytest.raises(FloatingPointError, match=rf"^step 2: {message}.*; the last checkpoint is kept$"):
        first.run(stream_data(), workers=0, save_every=1)
    assert contents(tmp_path) == saved
    resumed = trainer()
    resumed.resume(tmp_path / "state.pt")
    resumed.run(stream_data(), workers=0, save_every=1)
    assert resumed.step == 3


def contents(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in ("state.pt", "weights.safetensors")]


def test_non_finite_loss_term_is_named(tmp_path: Path) -> None:
    trainer = stream_trainer(tmp_path, 2)
    trainer.task.criterion.code_weights[3] = torch.nan  # does not affect the matching
    with pytest.raises(FloatingPointError, match="^step 0: loss term layer0/box, layer1/box, .* not finite"):
        trainer.train_step(stream_data()[0])


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_non_finite_weights_are_not_saved(tmp_path: Path, ema: float) -> None:
    trainer = stream_trainer(tmp_path, 3, optim=dataclasses.replace(STREAM_OPTIM, ema=ema))
    trainer.save()
    saved = contents(tmp_path)
    for model in filter(None, (trainer.raw, trainer.average)):
        with torch.no_grad():
            model.get_parameter("classifier.6.bias")[0] = torch.nan
    trainer.step = 2
    with pytest.raises(FloatingPointError, match="step 2: tensor classifier.6.bias holds nan or inf"):
        trainer.save()
    assert contents(tmp_path) == saved


@pytest.mark.parametrize("save_every", [1, 100])
def test_diverging_run_ends_with_one_sentence_and_resumes_from_the_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], save_every: int
) -> None:
    assert train_small(tmp_path / "run", 1) == 0
    saved = contents(tmp_path / "run")
    assert train_small(tmp_path / "run", 9, "optim.lr=1e30", f"save_every={save_every}") == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("training: step ") and last.endswith("; the last checkpoint is kept")
    assert ("half precision" in last) == (save_every == 1)
    assert contents(tmp_path / "run") == saved
    assert train_small(tmp_path / "run", 2) == 0
    assert "resumed at step 1 of 2" in capsys.readouterr().out


def test_missing_average_starts_from_the_trained_weights(tmp_path: Path) -> None:
    first = stream_trainer(tmp_path, 4, optim=dataclasses.replace(STREAM_OPTIM, ema=0.0))
    first.train_step(stream_data()[0])
    first.step = 1
    first.save()
    resumed = stream_trainer(tmp_path, 4)
    resumed.resume(tmp_path / "state.pt")
    assert resumed.average is not None
    for name, value in resumed.average.state_dict().items():
        assert torch.equal(value, first.raw.state_dict()[name]), name


def test_checkpoints_of_other_runs_are_refused(tmp_path: Path) -> None:
    first = stream_trainer(tmp_path, 4)
    first.train_step(stream_data()[0])
    first.save()
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    torch.save({**saved, "states": saved["states"] * 2}, tmp_path / "two.pt")
    with pytest.raises(UserError, match="two.pt' was written by 2 processes, this run has 1; start as many"):
        stream_trainer(tmp_path, 4).resume(tmp_path / "two.pt")
    torch.save({"model": saved["task"]}, tmp_path / "other.pt")
    with pytest.raises(UserError, match="other.pt' is not a checkpoint of this version"):
        stream_trainer(tmp_path, 4).resume(tmp_path / "other.pt")
    content = (tmp_path / "state.pt").read_bytes()
    for name, damaged in {"cut.pt": content[: len(content) // 2], "empty.pt": b"", "text.pt": b"{}"}.items():
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(UserError, match=rf"{name}' cannot be read .*; delete it to start again"):
            stream_trainer(tmp_path, 4).resume(tmp_path / name)


class OneThread(Dataset[StreamBatch]):
    """A data set that fails unless OpenCV uses one thread."""

    def __init__(self, data: StreamDataset) -> None:
        self.data = data

    def __getitem__(self, step: int) -> StreamBatch:
        assert cv2.getNumThreads() == 1
        return self.data[step]


@pytest.fixture
def opencv_threads() -> Iterator[None]:
    """Start four OpenCV threads in this process."""
    before = cv2.getNumThreads()
    cv2.setNumThreads(4)
    cv2.GaussianBlur(np.zeros((500, 500, 3), np.uint8), (9, 9), 0)
    yield
    cv2.setNumThreads(before)


@pytest.mark.usefixtures("opencv_threads")
@pytest.mark.timeout(60)
def test_loader_workers_use_one_core(tmp_path: Path) -> None:
    trainer = stream_trainer(tmp_path, 1)
    trainer.run(OneThread(stream_data()), workers=1, save_every=1)
    assert trainer.step == 1


def test_resuming_with_another_configuration_is_refused(tmp_path: Path) -> None:
    stream_trainer(tmp_path, 2).save()
    other = stream_trainer(tmp_path, 2, "decoder.num_layers=1")
    with pytest.raises(UserError, match=r"another configuration \(model.decoder.num_layers 2, here 1\)"):
        other.resume(tmp_path / "state.pt")


def test_options_and_overrides_set_the_configuration() -> None:
    overrides = ["optim.lr=0.002", "model.decoder.num_layers=2"]
    config = resolve_config(TrainOptions(out=Path("x"), steps=7, overrides=overrides))
    assert isinstance(config, TrainConfig)
    assert (config.steps, config.optim.lr, config.model.decoder.num_layers) == (7, 0.002, 2)


def test_bad_input_is_reported_in_one_sentence_with_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--out", str(tmp_path), "--preset", "huge"]) == 2
    assert "unknown preset 'huge'" in capsys.readouterr().err
    assert main(["--out", str(tmp_path), "--set", "optim.rate=1"]) == 2
    assert "unknown configuration key optim.rate" in capsys.readouterr().err
