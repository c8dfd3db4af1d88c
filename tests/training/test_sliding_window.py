# SPDX-License-Identifier: Apache-2.0
"""Sliding-window training: frames of a window, losses of the last frame, runs and resuming."""

from pathlib import Path

import pytest
import torch

from ftkd_core.data.augmentation import AugmentConfig
from ftkd_core.data.clips import StreamBatch, StreamDataset
from ftkd_core.data.windows import PairedDataset
from ftkd_core.distillation.methods import method_config
from ftkd_core.models.build import build_stream_petr
from ftkd_core.models.memory import Memory
from ftkd_core.runtime.preprocess import normalise
from ftkd_core.weights import read_weights
from tests.core.helpers import make_clip, small_config
from tests.training.helpers import small_teacher, train_small
from training.distiller import make_distiller
from training.sliding_window import SlidingWindowDataset, SlidingWindowTask
from training.tasks import StreamingTask

PLAIN = AugmentConfig(flip=0.0, rotation=0.0, colour=0.0, camera_dropout=0.0)


def streams(length: int) -> StreamDataset:
    clips = [make_clip(seed=seed) for seed in range(2)]
    return StreamDataset(
        clips.__getitem__, 2, num_streams=2, segment=length, augment=PLAIN, seed=3, staggered=False
    )


def test_item_is_a_window_of_consecutive_frames() -> None:
    windows = SlidingWindowDataset(streams(3), 3)
    for step in range(3):
        window: list[StreamBatch] = windows[step]
        assert [frame.is_first.tolist() for frame in window] == [[True, True], [False, False], [False, False]]
        gaps = window[1].time - window[0].time, window[2].time - window[1].time
        assert torch.allclose(torch.stack(gaps), torch.full((2, 2), 0.5, dtype=torch.float64))


def test_loss_of_the_last_frame_equals_that_of_streaming() -> None:
    torch.manual_seed(0)
    model = build_stream_petr(small_config("loss.denoising_groups=0"))
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 0.0  # keep the statistics
    window = SlidingWindowDataset(streams(3), 3)[0]
    sliding = SlidingWindowTask(model, 2)
    model.train()
    terms, state = sliding(window, sliding.start_state(), torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(state, sliding.start_state(), strict=True))
    model.eval()
    memory = model.start_memory(2)
    with torch.no_grad():
        for frame in window[:2]:
            images = normalise(frame.images)
            _, memory = model(frame.frame(images), Memory(*memory))
    plain = StreamingTask(model, 2)
    model.train()
    expected, _ = plain(window[2], tuple(memory), torch.Generator().manual_seed(0))
    assert terms.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.allclose(terms[name], value, rtol=1e-4), name


def test_frames_without_a_loss_change_no_batch_statistics() -> None:
    torch.manual_seed(0)
    model = build_stream_petr(small_config())
    task = SlidingWindowTask(model, 2)
    model.train()
    model.backbone.eval()
    before = model.auxiliary.classes[1].num_batches_tracked.clone()  # type: ignore[union-attr, index]
    window = SlidingWindowDataset(streams(4), 4)[0]
    terms, _ = task(window, task.start_state(), torch.Generator().manual_seed(0))
    torch.stack(list(terms.values())).sum().backward()
    tracked = model.auxiliary.classes[1].num_batches_tracked  # type: ignore[union-attr, index]
    assert int(tracked - before) == 1
    assert model.training and model.auxiliary.training and not model.backbone.training  # type: ignore[union-attr]
    assert model.regressor[0].weight.grad is not None


def test_the_last_frame_is_distilled() -> None:
    torch.manual_seed(0)
    model = build_stream_petr(small_config())
    distiller = make_distiller(small_teacher(), model, method_config("stxd"))
    task = SlidingWindowTask(model, 2, distiller)
    window = SlidingWindowDataset(PairedDataset(streams(3), 1, 1), 3)[0]
    assert [isinstance(item, StreamBatch) for item in window] == [True, True, False]
    terms, _ = task(window, task.start_state(), torch.Generator().manual_seed(0))
    assert float(terms["stxd/16"].detach()) > 0  # the previous frame's maps are in the state


def test_run_loads_parts_of_a_file_and_keeps_a_frozen_backbone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def state(run: str) -> dict[str, torch.Tensor]:
        return read_weights(tmp_path / run / "weights.safetensors")[0]

    file = str(tmp_path / "first" / "weights.safetensors")
    assert train_small(tmp_path / "first", 1, "seed=1") == 0
    parts = ("--init", file, "--init-parts", "backbone,neck")
    assert train_small(tmp_path / "second", 2, "optim.backbone_ratio=0", "seed=2", more=parts) == 0
    assert train_small(tmp_path / "third", 2, "optim.backbone_ratio=1", "seed=2", more=parts) == 0
    first, frozen, trained = (state(run) for run in ("first", "second", "third"))
    backbone = [name for name in first if name.startswith("backbone.")]
    assert all(frozen[name].equal(first[name]) for name in backbone)  # batch statistics too
    assert not any(
        trained[name].equal(first[name]) for name in ("backbone.conv1.weight", "backbone.bn1.running_mean")
    )
    assert not frozen["neck.lateral.0.weight"].equal(first["neck.lateral.0.weight"])
    other_seed = frozen["classifier.0.weight"] - first["classifier.0.weight"]
    assert other_seed.abs().max() > 0.01
    whole = ("--init", file, "--init-parts", "")  # as the experiment passes it for no parts
    assert train_small(tmp_path / "fourth", 1, more=whole) == 0
    assert train_small(tmp_path / "fifth", 1, more=("--init-parts", "neck")) == 2
    assert "init_parts 'neck' without a file; give one with --init" in capsys.readouterr().err


def test_window_run_is_trained_and_resumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(steps: int, *more: str) -> int:
        return train_small(tmp_path / "run", steps, "data.window=3", *more)

    assert run(1) == 0
    assert run(2) == 0
    assert "resumed at step 1 of 2" in capsys.readouterr().out
    assert run(3, "optim.backbone_ratio=0") == 2
    assert "trained other parameters" in capsys.readouterr().err
