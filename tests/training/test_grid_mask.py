# SPDX-License-Identifier: Apache-2.0
"""Grids of blank squares: what is kept, how often, and that a teacher sees the whole image."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ftkd_core.data.grid_mask import apply_grid_mask, grid_mask
from tests.training.test_tasks import pairs, stream_lesson, window_lesson, windows
from training.sliding_window import SlidingLesson
from training.tasks import StreamLesson, WindowLesson


@settings(deadline=None)
@given(st.integers(3, 64), st.integers(1, 90), st.floats(0.05, 0.95), st.integers(0, 10**6))
def test_squares_are_blank_between_bands_of_one_period(
    height: int, width: int, ratio: float, seed: int
) -> None:
    kept = grid_mask(height, width, torch.Generator().manual_seed(seed), ratio)
    assert kept.shape == (height, width) and kept.dtype == torch.bool
    rows, columns = kept.all(1), kept.all(0)
    if not kept.all():  # what is blank is where neither a row nor a column is kept
        assert torch.equal(kept, rows[:, None] | columns)
    runs = [len(run) for run in "".join("x" if row else " " for row in rows).split("x") if run]
    assert not runs[1:-1] or len(set(runs[1:-1])) == 1  # bands of rows are equally far apart


def test_about_a_quarter_is_blank_and_grids_differ() -> None:
    generator = torch.Generator().manual_seed(0)
    masks = torch.stack([grid_mask(64, 176, generator) for _ in range(400)])
    assert 1 - float(masks.float().mean()) == pytest.approx(0.25, abs=0.03)
    assert len({mask.numpy().tobytes() for mask in masks}) > 300
    with pytest.raises(ValueError, match="images of 2 rows; expected at least 3"):
        grid_mask(2, 8, generator)


def test_images_are_blanked_as_often_as_asked_and_all_alike() -> None:
    images, generator = torch.ones(2, 6, 3, 32, 96), torch.Generator().manual_seed(1)
    shown = [apply_grid_mask(images, 0.7, generator) for _ in range(300)]
    blanked = [seen for seen in shown if seen is not images]
    assert len(blanked) / len(shown) == pytest.approx(0.7, abs=0.08)
    assert all(torch.equal(seen, seen[:1, :1, :1].expand_as(seen)) for seen in blanked)
    before = generator.get_state()
    assert apply_grid_mask(images, 0.0, generator) is images
    assert torch.equal(generator.get_state(), before)  # runs without one are what they were


def seen_by(module: nn.Module) -> list[Tensor]:
    """The images that a backbone is shown from now on."""
    images: list[Tensor] = []
    module.register_forward_pre_hook(lambda _, inputs: images.append(inputs[0].detach().clone()))
    return images


@pytest.mark.parametrize("kind", ["stream", "window", "sliding"])
def test_students_see_blank_squares_and_their_teachers_do_not(kind: str) -> None:
    lesson: StreamLesson | WindowLesson = window_lesson() if kind == "window" else stream_lesson()
    if kind == "sliding":
        lesson = SlidingLesson(lesson.detector, 2, lesson.distiller, grid_mask=1.0)  # type: ignore[arg-type]
    lesson.grid_mask = 1.0
    assert lesson.distiller is not None
    student, teacher = seen_by(lesson.detector.backbone), seen_by(lesson.distiller.teacher.backbone)
    generator = torch.Generator().manual_seed(0)
    if kind == "sliding":
        lesson([pairs()[0][0], pairs()[1]], lesson.start_state(), generator)
        before, now = student
        assert not _blank(before).any()  # of frames that teach nothing
    else:
        data = windows() if kind == "window" else pairs()
        lesson(data[0], lesson.start_state(), generator)
        now = student[0]
    assert 0.02 < float(_blank(now).float().mean()) < 0.6
    assert not any(_blank(images).any() for images in teacher) and teacher


def _blank(images: Tensor) -> Tensor:
    """(H, W): where all images of a batch (B, 3, H, W) are 0."""
    return (images == 0).flatten(0, -3).all(0)
