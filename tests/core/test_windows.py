# SPDX-License-Identifier: Apache-2.0
"""Windows of past and future: they end with the scene, and all frames share one augmentation."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ftkd_core.data.augmentation import Augmentation, AugmentConfig
from ftkd_core.data.clips import StreamDataset, make_sample
from ftkd_core.data.windows import PairedDataset, WindowDataset, make_window, window_order
from ftkd_core.geometry import invert_rigid
from tests.core.helpers import NO_AUGMENTATION, make_clip


@given(st.integers(1, 12), st.integers(0, 11), st.integers(0, 8), st.integers(0, 8))
def test_window_never_leaves_its_scene(length: int, index: int, past: int, future: int) -> None:
    index = min(index, length - 1)
    order, real = window_order(index, length, past, future)
    assert len(order) == len(real) == 1 + past + future
    assert order[0] == index and real[0]
    assert all(0 <= frame < length for frame in order)
    assert sum(real[1 : 1 + past]) == min(past, index)
    assert sum(real[1 + past :]) == min(future, length - 1 - index)
    assert len(set(np.array(order)[real])) == sum(real)  # real frames are distinct


def test_index_outside_the_scene_raises() -> None:
    with pytest.raises(ValueError, match="frame 6 of a scene of 6"):
        window_order(6, 6, 1, 1)


@pytest.mark.parametrize("change", [Augmentation(), Augmentation(True, 0.3, (0.9, 1.1, 1.0), 5.0)])
def test_window_frames_keep_their_poses_and_have_signed_times(change: Augmentation) -> None:
    clip = make_clip(frames=6)
    window = make_window(clip, 2, change, 2, 2)
    assert window.time[0].tolist() == [0.0, -0.5, -1.0, 0.5, 1.0]
    assert window.real.all()
    now = make_sample(clip, 2, change, True)
    for place, frame in enumerate([2, 1, 0, 3, 4]):
        alone = make_sample(clip, frame, change, True)
        assert torch.equal(window.images[0, place], alone.images[0])
        there = alone.global_from_ego[0] @ alone.rig.ego_from_camera[0].double()
        expected = invert_rigid(now.global_from_ego[0]) @ there
        assert torch.allclose(window.rig.ego_from_camera[0, place].double(), expected, atol=1e-4)
    assert torch.equal(window.targets.boxes, now.targets.boxes)


def test_the_end_of_the_scene_is_repeated() -> None:
    clip = make_clip(frames=4)
    window = make_window(clip, 3, Augmentation(), 1, 2)
    assert window.real[0].tolist() == [True, True, False, False]
    assert window.time[0].tolist() == [0.0, -0.5, 0.0, 0.0]
    assert torch.equal(window.images[0, 2], window.images[0, 0])


def test_step_of_windows_depends_only_on_seed_rank_and_step() -> None:
    clips = [make_clip(seed=seed, objects=3 + seed) for seed in range(3)]

    def data(seed: int, rank: int) -> WindowDataset:
        return WindowDataset(
            clips.__getitem__, 3, batch=2, num_past=1, num_future=1,
            augment=AugmentConfig(), seed=seed, rank=rank,
        )  # fmt: skip

    first, same = data(1, 0)[5], data(1, 0)[5]
    assert torch.equal(first.images, same.images) and torch.equal(first.targets.boxes, same.targets.boxes)
    assert not torch.equal(first.images, data(1, 1)[5].images)
    assert not torch.equal(first.images, data(1, 0)[6].images)
    assert first.images.shape == (2, 3, 6, 32, 96, 3)


def test_student_and_teacher_see_the_same_world() -> None:
    clips = [make_clip(seed=seed) for seed in range(2)]
    streams = StreamDataset(
        clips.__getitem__, 2, num_streams=2, segment=3, seed=4,
        augment=AugmentConfig(colour=0.5, camera_dropout=0.9),
    )  # fmt: skip
    pairs = PairedDataset(streams, 1, 2)
    for step in range(4):
        student, window = pairs[step]
        assert torch.equal(student.images, streams[step].images)
        assert torch.allclose(student.rig.ego_from_camera, window.rig.ego_from_camera[:, 0], atol=1e-5)
        assert window.rig.mask.all()  # the teacher has all cameras
        for sample in range(2):
            student_boxes = student.targets.boxes[sample, student.targets.mask[sample]]
            teacher_boxes = window.targets.boxes[sample, window.targets.mask[sample]]
            assert (
                torch.cdist(student_boxes, teacher_boxes).amin(1) < 1e-5
            ).all()  # the student may have fewer objects
    plain = StreamDataset(clips.__getitem__, 2, num_streams=2, segment=3, seed=4, augment=NO_AUGMENTATION)
    student, window = PairedDataset(plain, 1, 2)[1]
    assert torch.equal(student.images, window.images[:, 0])
