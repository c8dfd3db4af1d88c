# SPDX-License-Identifier: Apache-2.0
"""Activation checkpointing, accumulation and frames without gradient change memory, not what is learned."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from ftkd_core.data.augmentation import Augmentation
from ftkd_core.data.clips import collate, make_sample
from ftkd_core.data.windows import collate_windows, make_window
from ftkd_core.models.build import build_stream_petr
from ftkd_core.models.recompute import set_recompute
from tests.core.helpers import make_clip, small_config
from tests.core.test_sparse_bev import small_sparse
from tests.training.helpers import (
    Task,
    paired_data,
    streaming_task,
    train_small,
    window_data,
    window_task,
)
from training.accumulation import split_batch
from training.config import OptimConfig
from training.sliding_window import SlidingWindowDataset, SlidingWindowTask
from training.tasks import StreamingTask, WindowTask
from training.trainer import Trainer


def step(
    task: nn.Module, batch: Any, state: tuple[Tensor, ...], dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """Return gradients and buffers of a task after one backward pass."""
    task.train()
    torch.manual_seed(4)
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        terms, _ = task(batch, state, torch.Generator().manual_seed(4))
    torch.stack(list(terms.values())).sum().backward()
    gradients = {name: p.grad for name, p in task.named_parameters() if p.grad is not None}
    return gradients | dict(task.named_buffers())


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("kind", ["stream", "anchored", "window", "distilled"])
def test_recomputed_activations_give_the_same_gradients_and_statistics(
    kind: str, dtype: torch.dtype | None
) -> None:
    """Batch norms are in training mode and dropout is active, so both must be handled."""

    def made(recompute: bool) -> dict[str, Tensor]:
        torch.manual_seed(1)
        task: Task
        if kind in ("stream", "anchored"):
            images = () if kind == "anchored" else ("decoder.num_image_queries=0",)
            model = build_stream_petr(small_config("decoder.dropout=0.1", *images))
            task, batch = StreamingTask(model, 2), paired_data()[1][0]
        elif kind == "window":
            task, batch = WindowTask(small_sparse(past=1)), window_data(future=0)[0]
        else:
            task, batch = window_task(), window_data()[0]
        set_recompute(task.detector, recompute)
        return step(task, batch, task.start_state(), dtype)

    plain, saved = made(False), made(True)
    assert plain.keys() == saved.keys()
    for name, value in plain.items():
        torch.testing.assert_close(saved[name], value, rtol=0, atol=0, msg=name)


def saved_bytes(task: WindowTask, batch: Any) -> int:
    """Return the bytes of the tensors that one forward pass stores for the backward pass."""
    seen: dict[int, int] = {}

    def pack(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
        return value

    task.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        terms, _ = task(batch, (), torch.Generator().manual_seed(0))
    del terms
    return sum(seen.values())


def test_recomputation_stores_less() -> None:
    batch, sizes = window_data(future=0)[0], []
    for recompute in (False, True):
        torch.manual_seed(0)
        task = WindowTask(small_sparse(past=1))
        set_recompute(task.detector, recompute)
        sizes.append(saved_bytes(task, batch))
    assert sizes[1] < 0.6 * sizes[0]


def test_only_the_first_frames_have_gradients() -> None:
    """The predictions are those without the setting; the gradient is that of detached other frames."""
    torch.manual_seed(0)
    model = small_sparse(past=1).eval()
    clip = make_clip(seed=0)
    batch = collate_windows([make_window(clip, 1, Augmentation(), 1, 0)])
    images = batch.images.float().movedim(-1, -3).requires_grad_()
    window = batch.window(images)
    whole, _ = model(window)
    first, pyramid = model(window, None, 1)
    torch.testing.assert_close(first.logits, whole.logits)
    assert pyramid[0].shape[1] == 2
    first.logits.square().sum().backward()
    assert images.grad is not None
    assert images.grad[:, 0].abs().sum() > 0
    assert images.grad[:, 1].abs().sum() == 0


def test_frames_without_gradient_keep_the_modes_of_the_backbone() -> None:
    model = small_sparse(past=1).train()
    model.backbone.bn1.eval()
    before = [module.training for module in model.modules()]
    model.extract_window(torch.zeros(1, 2, 6, 3, 32, 96), 1)
    assert [module.training for module in model.modules()] == before
    assert model.backbone.layer1[0].bn1.num_batches_tracked == 1  # frame 1 does not change statistics


def trainer_of(task: Task, out: Path, accumulate: int) -> Trainer:
    fabric = Fabric(accelerator="cpu", devices=1)
    out.mkdir()
    optim = OptimConfig(lr=1e-3, warmup_steps=1, ema=0)
    trainer = Trainer(fabric, task, optim, out, steps=2, seed=3, accumulate=accumulate)
    trainer.start_training()
    for module in task.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()  # statistics are of a part, not of the batch
    return trainer


def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path: Path) -> None:
    """Streams with equally many objects: two parts give the gradients and the memory of the batch of two."""
    clips = [make_clip(seed=seed, objects=4) for seed in range(2)]
    results = []
    for accumulate in (1, 2):
        torch.manual_seed(1)
        config = small_config("loss.denoising_groups=0", "auxiliary_kind=none", image_queries=0)
        model = build_stream_petr(config)
        trainer = trainer_of(StreamingTask(model, 2), tmp_path / str(accumulate), accumulate)
        terms, norm = trainer.train_step(collate([make_sample(c, 0, Augmentation(), True) for c in clips]))
        gradients = {name: p.grad for name, p in trainer.task.named_parameters() if p.grad is not None}
        results.append(({**terms, "norm": norm}, gradients, trainer.state))
    (terms, gradients, state), (parts_terms, parts_gradients, parts_state) = results
    for name, value in terms.items():
        torch.testing.assert_close(parts_terms[name], value, rtol=1e-4, atol=1e-5, msg=name)
    for name, gradient in gradients.items():
        assert gradient is not None
        scale = float(gradient.abs().max())
        torch.testing.assert_close(
            parts_gradients[name], gradient, rtol=1e-3, atol=1e-4 * scale + 1e-6, msg=name
        )
    for value, part in zip(state, parts_state, strict=True):
        torch.testing.assert_close(part, value, rtol=1e-4, atol=1e-4)


def test_every_kind_of_item_is_split_by_stream() -> None:
    paired = paired_data()[1]
    parts = split_batch(paired, 2)
    assert [len(stream.images) for stream, _ in parts] == [1, 1]
    assert torch.equal(torch.cat([windows.images for _, windows in parts]), paired[1].images)
    task = streaming_task()
    assert task.distiller is not None
    output = task.distiller.run_teacher(paired[1])
    halves = split_batch(output, 2)
    assert torch.equal(torch.cat([half.logits for half in halves], dim=1), output.logits)
    assert torch.equal(torch.cat([half.targets[16] for half in halves]), output.targets[16])
    with pytest.raises(ValueError, match="expected a divisor"):
        split_batch(output, 3)


def test_sliding_windows_are_accumulated(tmp_path: Path) -> None:
    data = paired_data().streams
    task = SlidingWindowTask(build_stream_petr(small_config()), 2)
    trainer = trainer_of(task, tmp_path / "out", 2)
    terms, norm = trainer.train_step(SlidingWindowDataset(data, 3)[0])
    assert torch.isfinite(norm)
    assert all(torch.isfinite(value) for value in terms.values())


def test_a_run_with_all_savers(tmp_path: Path) -> None:
    assert train_small(tmp_path / "run", 1, "streams=2", "accumulate=2", "recompute=true") == 0
    arguments = ("--preset", "sparse_bev_tiny")
    settings = ["recompute=true", "gradient_frames=1", "model.image.width=96", "model.num_past=1"]
    assert train_small(tmp_path / "sparse", 1, *settings, more=arguments) == 0


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("accumulate=3", "accumulate 3: expected a divisor of the 1 streams"),
        ("gradient_frames=1", "leave it out"),
    ],
)
def test_impossible_settings_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], setting: str, message: str
) -> None:
    assert train_small(tmp_path / "run", 1, setting) == 2
    assert message in capsys.readouterr().err
