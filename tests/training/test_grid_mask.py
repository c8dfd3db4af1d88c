# SPDX-License-Identifier: Apache-2.0
"""Grid masks: their shape, their frequency, and that teachers see unmasked images."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ftkd_core.data.grid_mask import apply_grid_mask, grid_mask
from tests.training.helpers import Task, paired_data, streaming_task, window_data, window_task
from training.sliding_window import SlidingWindowTask


@settings(deadline=None)
@given(st.integers(3, 64), st.integers(1, 90), st.floats(0.05, 0.95), st.integers(0, 10**6))
def test_blank_squares_lie_between_bands_of_one_period(
    height: int, width: int, ratio: float, seed: int
) -> None:
    kept = grid_mask(height, width, torch.Generator().manual_seed(seed), ratio)
    assert kept.shape == (height, width) and kept.dtype == torch.bool
    rows, columns = kept.all(1), kept.all(0)
    if not kept.all():  # blank pixels are outside all kept rows and columns
        assert torch.equal(kept, rows[:, None] | columns)
    runs = [len(run) for run in "".join("x" if row else " " for row in rows).split("x") if run]
    assert not runs[1:-1] or len(set(runs[1:-1])) == 1  # bands are equally far apart


def test_masks_blank_a_quarter_on_average_and_differ() -> None:
    generator = torch.Generator().manual_seed(0)
    masks = torch.stack([grid_mask(64, 176, generator) for _ in range(400)])
    assert 1 - float(masks.float().mean()) == pytest.approx(0.25, abs=0.03)
    assert len({mask.numpy().tobytes() for mask in masks}) > 300
    with pytest.raises(ValueError, match="images of 2 rows; expected at least 3"):
        grid_mask(2, 8, generator)


def test_images_are_masked_with_the_given_probability_and_share_one_mask() -> None:
    images, generator = torch.ones(2, 6, 3, 32, 96), torch.Generator().manual_seed(1)
    shown = [apply_grid_mask(images, 0.7, generator) for _ in range(300)]
    blanked = [seen for seen in shown if seen is not images]
    assert len(blanked) / len(shown) == pytest.approx(0.7, abs=0.08)
    assert all(torch.equal(seen, seen[:1, :1, :1].expand_as(seen)) for seen in blanked)
    before = generator.get_state()
    assert apply_grid_mask(images, 0.0, generator) is images
    assert torch.equal(generator.get_state(), before)  # no random draw without a mask


def record_inputs(module: nn.Module) -> list[Tensor]:
    """Record the input images of a backbone from now on."""
    images: list[Tensor] = []
    module.register_forward_pre_hook(lambda _, inputs: images.append(inputs[0].detach().clone()))
    return images


@pytest.mark.parametrize("kind", ["stream", "window", "sliding"])
def test_students_see_masked_images_and_teachers_do_not(kind: str) -> None:
    task: Task = window_task() if kind == "window" else streaming_task()
    if kind == "sliding":
        task = SlidingWindowTask(task.detector, 2, task.distiller, grid_mask=1.0)  # type: ignore[arg-type]
    task.grid_mask = 1.0
    assert task.distiller is not None
    student, teacher = record_inputs(task.detector.backbone), record_inputs(task.distiller.teacher.backbone)
    generator = torch.Generator().manual_seed(0)
    if kind == "sliding":
        task([paired_data()[0][0], paired_data()[1]], task.start_state(), generator)
        earlier, now = student
        assert not _blank(earlier).any()
    else:
        data = window_data() if kind == "window" else paired_data()
        task(data[0], task.start_state(), generator)
        now = student[0]
    assert 0.02 < float(_blank(now).float().mean()) < 0.6
    assert not any(_blank(images).any() for images in teacher) and teacher


def _blank(images: Tensor) -> Tensor:
    """Return a mask (H, W) of the pixels that are 0 in all images (B, 3, H, W)."""
    return (images == 0).flatten(0, -3).all(0)
