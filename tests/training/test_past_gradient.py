# SPDX-License-Identifier: Apache-2.0
"""`gradient_frames`: the same loss, a gradient through the current frame only; bfloat16 on a CPU."""

from pathlib import Path

import pytest
import torch
from torch import nn

from ftkd_core.models.feature_ring import WindowFeatures
from ftkd_core.models.sparse_bev import SparseBEV
from ftkd_core.types import FrameWindow
from tests.core.helpers import drive, small_config, small_sparse, window_of
from tests.training.helpers import window_data
from training.devices import cpu_has_bfloat16
from training.feature_cache import network_input
from training.tasks import WindowTask


def model_with_fixed_norms() -> SparseBEV:
    """A teacher in training mode whose batch norms keep their statistics."""
    model = small_sparse(past=1, future=1).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return model


def window() -> FrameWindow:
    return window_of(drive(small_config(), 3), 1, [0, 2])


def gradient(model: SparseBEV) -> torch.Tensor:
    weight = model.backbone.conv1.weight
    assert weight.grad is not None
    return weight.grad.clone()


def test_the_gradient_is_that_of_detached_past_maps() -> None:
    model, frames = model_with_fixed_norms(), window()
    predictions, pyramid = model(frames, gradient_frames=1)
    predictions.codes.square().sum().backward()
    found = gradient(model)
    model.zero_grad()
    maps = model.extract(frames.images)
    detached = tuple(torch.cat([level[:, :1], level[:, 1:].detach()], dim=1) for level in maps)
    expected = model.decode_window(WindowFeatures(detached, frames.rig, frames.time))
    expected.codes.square().sum().backward()
    assert torch.allclose(predictions.codes, expected.codes, atol=1e-4)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(pyramid, maps, strict=False))
    assert torch.allclose(found, gradient(model), rtol=1e-3, atol=1e-3 * float(found.abs().max()))
    model.zero_grad()
    model(frames)[0].codes.square().sum().backward()
    assert not torch.allclose(found, gradient(model), rtol=1e-2)


def test_other_frames_change_no_batch_statistics() -> None:
    model = small_sparse(past=1, future=1).train()
    before = int(model.backbone.bn1.num_batches_tracked)  # type: ignore[arg-type]
    model(window(), gradient_frames=1)
    assert int(model.backbone.bn1.num_batches_tracked) == before + 1  # type: ignore[arg-type]
    assert model.backbone.training and model.backbone.bn1.training and model.neck.training


def test_the_task_passes_the_setting_on() -> None:
    batch = window_data()[0]
    losses = []
    for stop in (False, True):
        torch.manual_seed(0)
        task = WindowTask(model_with_fixed_norms(), gradient_frames=int(stop))
        terms, _ = task(batch, (), torch.Generator().manual_seed(0))
        total = torch.stack(list(terms.values())).sum()
        total.backward()
        losses.append((float(total.detach()), gradient(task.detector)))
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-4)
    assert not torch.allclose(losses[0][1], losses[1][1], rtol=1e-2)
    assert network_input(batch.images).shape[1] == 3


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("processor\t: 0\nflags\t\t: fpu sse avx512f avx512_bf16 amx_tile\n", True),
        ("Features\t: fp asimd bf16 i8mm\n", True),
        ("flags\t\t: fpu sse avx2\n", False),
        ("model name\t: bf16 special\n", False),
        ("", False),
    ],
)
def test_bfloat16_is_read_from_the_flags_of_the_processor(text: str, expected: bool, tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text(text)
    assert cpu_has_bfloat16(file) is expected
    assert not cpu_has_bfloat16(tmp_path / "none")
