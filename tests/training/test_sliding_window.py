# SPDX-License-Identifier: Apache-2.0
"""Sliding windows: which frames they show, that only the graded ones teach, and that a run of them learns."""

from pathlib import Path

import pytest
import torch

from ftkd_core.data.augmentation import AugmentConfig
from ftkd_core.data.clips import StreamBatch, StreamDataset
from ftkd_core.data.windows import PairedDataset
from ftkd_core.distillation.methods import method_config
from ftkd_core.errors import UserError
from ftkd_core.models.build import build_stream_petr
from ftkd_core.models.memory import Memory
from ftkd_core.runtime.preprocess import normalise
from ftkd_core.weights import read_weights
from tests.core.helpers import make_clip, small_config
from tests.core.test_sparse_bev import small_sparse
from training import train
from training.config import DataConfig, TrainConfig
from training.sliding_window import SlidingDataset, SlidingLesson
from training.tasks import StreamLesson, make_distiller

PLAIN = AugmentConfig(flip=0.0, rotation=0.0, colour=0.0, camera_dropout=0.0)


def streams(length: int) -> StreamDataset:
    clips = [make_clip(seed=seed) for seed in range(2)]
    return StreamDataset(
        clips.__getitem__, 2, num_streams=2, segment=length, augment=PLAIN, seed=3, staggered=False
    )


def test_a_step_is_a_window_of_consecutive_frames_from_their_first() -> None:
    windows = SlidingDataset(streams(3), 3)
    for step in range(3):
        window: list[StreamBatch] = windows[step]
        assert [frame.is_first.tolist() for frame in window] == [[True, True], [False, False], [False, False]]
        gaps = window[1].time - window[0].time, window[2].time - window[1].time
        assert torch.allclose(torch.stack(gaps), torch.full((2, 2), 0.5, dtype=torch.float64))


def test_the_last_frame_is_graded_as_streaming_grades_it() -> None:
    torch.manual_seed(0)
    model = build_stream_petr(small_config("loss.denoising_groups=0"))
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 0.0  # statistics stay as they are
    window = SlidingDataset(streams(3), 3)[0]
    sliding = SlidingLesson(model, 2)
    model.train()
    terms, state = sliding(window, sliding.start_state(), torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(state, sliding.start_state(), strict=True))
    model.eval()
    memory = model.start_memory(2)
    with torch.no_grad():
        for frame in window[:2]:
            images = normalise(frame.images, model.config.image)
            _, memory = model(frame.frame(images), Memory(*memory))
    plain = StreamLesson(model, 2)
    model.train()
    expected, _ = plain(window[2], tuple(memory), torch.Generator().manual_seed(0))
    assert terms.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.allclose(terms[name], value, rtol=1e-4), name


def test_frames_before_the_graded_get_no_gradient_and_leave_the_statistics_alone() -> None:
    torch.manual_seed(0)
    model = build_stream_petr(small_config())
    lesson = SlidingLesson(model, 2, graded=2)
    model.train()
    model.backbone.eval()
    before = model.auxiliary.classes[1].num_batches_tracked.clone()  # type: ignore[union-attr, index]
    window = SlidingDataset(streams(4), 4)[0]
    terms, _ = lesson(window, lesson.start_state(), torch.Generator().manual_seed(0))
    torch.stack(list(terms.values())).sum().backward()
    tracked = model.auxiliary.classes[1].num_batches_tracked  # type: ignore[union-attr, index]
    assert int(tracked - before) == 2
    assert model.training and model.auxiliary.training and not model.backbone.training  # type: ignore[union-attr]
    assert model.regressor[0].weight.grad is not None


def test_a_teacher_teaches_windows_too() -> None:
    torch.manual_seed(0)
    model = build_stream_petr(small_config())
    distiller = make_distiller(small_sparse(past=1, future=1), model, method_config("stxd"))
    lesson = SlidingLesson(model, 2, distiller)
    window = SlidingDataset(PairedDataset(streams(3), 1, 1), 3)[0]
    assert [isinstance(item, StreamBatch) for item in window] == [True, True, False]
    terms, _ = lesson(window, lesson.start_state(), torch.Generator().manual_seed(0))
    assert float(terms["stxd/16"].detach()) > 0  # the frame before is known


def small_run(out: Path, steps: int, *settings: str, more: tuple[str, ...] = ()) -> int:
    """`python -m training.train` on one short scene, with a small `tiny`."""
    every = [
        "data.scenes=1", "data.duration_s=3.0", f"data.cache={out.parent / 'clips'}", "data.workers=0",
        "save_every=1", "model.image.width=96", "model.image.height=32", "model.backbone.base_channels=8",
        "model.decoder.num_image_queries=24", *settings,
    ]  # fmt: skip
    assigned = [part for setting in every for part in ("--set", setting)]
    return train.main(
        ["--out", str(out), "--steps", str(steps), "--streams", "1", "--accelerator", "cpu", *more, *assigned]
    )


def test_a_run_starts_from_parts_and_leaves_a_frozen_backbone_as_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def state(run: str) -> dict[str, torch.Tensor]:
        return read_weights(tmp_path / run / "weights.safetensors")[0]

    file = str(tmp_path / "first" / "weights.safetensors")
    assert small_run(tmp_path / "first", 1, "seed=1") == 0
    parts = ("--init", file, "--init-parts", "backbone,neck")
    assert small_run(tmp_path / "second", 2, "optim.backbone_ratio=0", "seed=2", more=parts) == 0
    assert small_run(tmp_path / "third", 2, "optim.backbone_ratio=1", "seed=2", more=parts) == 0
    first, frozen, learnt = (state(run) for run in ("first", "second", "third"))
    backbone = [name for name in first if name.startswith("backbone.")]
    assert all(frozen[name].equal(first[name]) for name in backbone)  # batch statistics too
    assert not any(
        learnt[name].equal(first[name]) for name in ("backbone.conv1.weight", "backbone.bn1.running_mean")
    )
    assert not frozen["neck.lateral.0.weight"].equal(first["neck.lateral.0.weight"])
    assert (frozen["classifier.0.weight"] - first["classifier.0.weight"]).abs().max() > 0.01  # another seed's
    whole = ("--init", file, "--init-parts", "")  # as the experiment says it where no parts are named
    assert small_run(tmp_path / "fourth", 1, more=whole) == 0
    assert small_run(tmp_path / "fifth", 1, more=("--init-parts", "neck")) == 2
    assert "init_parts 'neck' without a file; give one with --init" in capsys.readouterr().err


def test_a_run_of_windows_is_trained_and_resumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(steps: int, *more: str) -> int:
        return small_run(tmp_path / "run", steps, "data.window=3", *more)

    assert run(1) == 0
    assert run(2) == 0
    assert "resumed at step 1 of 2" in capsys.readouterr().out
    assert run(3, "data.graded=4") == 2
    assert "data.graded 4: expected 1 .. data.window 3" in capsys.readouterr().err
    assert run(3, "optim.backbone_ratio=0") == 2
    assert "trained other parameters (optim.backbone_ratio 0 or not)" in capsys.readouterr().err
    with pytest.raises(UserError, match="graded is 0; expected a value greater than 0"):
        train.stream_lesson(
            TrainConfig(model=small_config(), data=DataConfig(window=2, graded=0)),
            build_stream_petr(small_config()), None,
        )  # fmt: skip
