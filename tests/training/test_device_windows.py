# SPDX-License-Identifier: Apache-2.0
"""Windows built on the device equal those of the loader; hidden futures repeat the current frame."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ftkd_core.config import ImageConfig
from ftkd_core.data.augmentation import Augmentation, AugmentConfig
from ftkd_core.data.synthetic_clips import render_clip
from ftkd_core.data.windows import WindowBatch, WindowDataset, hide_future, make_window
from ftkd_core.errors import UserError
from tests.core.helpers import NO_AUGMENTATION, make_clip
from training.device_windows import DeviceWindows, prepare_scene, read_scenes

IMAGE = ImageConfig(width=64, height=32)
CHANGES = [Augmentation(), Augmentation(True, 0.3, (0.9, 1.1, 1.0), 5.0), Augmentation(False, -0.2)]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_scene(3, IMAGE, tmp_path_factory.mktemp("scenes"), 2.5, "traffic")


def device_windows(folder: Path, **settings: object) -> DeviceWindows:
    arguments = {"batch": 2, "num_past": 2, "num_future": 2, "augment": NO_AUGMENTATION, "seed": 0} | settings
    return DeviceWindows(read_scenes([folder], torch.device("cpu")), **arguments)  # type: ignore[arg-type]


def real_objects(batch: WindowBatch) -> list[np.ndarray]:
    """Values of the real objects of a batch of one, sorted by position."""
    targets = batch.targets
    keep = targets.mask[0]
    order = targets.boxes[0, keep, 0].argsort()
    rows = [value[0][keep][order] for value in targets[:3]]
    seen = targets.mask_2d[0][:, keep][:, order]
    flat = [torch.where(seen[..., None], value[0][:, keep][:, order], 0) for value in targets[3:5]]
    depths = torch.where(seen, targets.depths[0][:, keep][:, order], 0)
    return [value.numpy() for value in (*rows, *flat, depths, seen)]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("index", [0, 2, 4])
def test_a_device_window_equals_that_of_the_loader(prepared: Path, change: Augmentation, index: int) -> None:
    data = device_windows(prepared)
    found = data.build([(data.scenes[0], index, change, False)])
    expected = make_window(render_clip(3, IMAGE, 2.5, world="traffic"), index, change, 2, 2)
    assert torch.equal(found.images, expected.images)
    assert torch.equal(found.real, expected.real)
    torch.testing.assert_close(found.time, expected.time)
    for value, other in zip(found.rig, expected.rig, strict=True):
        torch.testing.assert_close(value, other, atol=1e-4, rtol=1e-5)
    for value, other in zip(real_objects(found), real_objects(expected), strict=True):
        np.testing.assert_allclose(value, other, atol=2e-3, rtol=1e-4)


def test_a_batch_is_a_function_of_seed_and_step(prepared: Path) -> None:
    settings = {"augment": AugmentConfig(camera_dropout=0.0), "hide_future": 0.5}
    first, again = (device_windows(prepared, **settings)[7] for _ in range(2))
    assert torch.equal(first.images, again.images) and torch.equal(first.targets.boxes, again.targets.boxes)
    assert not torch.equal(first.time, device_windows(prepared, seed=1, **settings)[7].time)


def test_hidden_futures_of_loader_and_device_have_one_form(prepared: Path) -> None:
    data = device_windows(prepared, hide_future=1.0)
    found = data.build([(data.scenes[0], 1, Augmentation(), True)])
    clip = render_clip(3, IMAGE, 2.5, world="traffic")
    expected = hide_future(make_window(clip, 1, Augmentation(), 2, 2), 2)
    assert found.time[0].tolist() == expected.time[0].tolist() == [0.0, -0.5, -0.5, 0.0, 0.0]
    assert found.real[0].tolist() == expected.real[0].tolist() == [True, True, False, False, False]
    assert torch.equal(found.images, expected.images)
    assert torch.equal(found.images[:, 3], found.images[:, 0])
    torch.testing.assert_close(found.rig, expected.rig, atol=1e-4, rtol=1e-5)


def test_the_share_of_hidden_futures_is_drawn_from_the_step() -> None:
    clip = make_clip(frames=9)
    shared = {"batch": 4, "num_past": 1, "num_future": 2, "augment": NO_AUGMENTATION, "seed": 3}
    clips = [replace(clip, times=clip.times + 0.0)]
    hiding, plain = (
        WindowDataset(clips.__getitem__, 1, hide_future=share, **shared)  # type: ignore[arg-type]
        for share in (0.5, 0.0)
    )
    hidden = []
    for step in range(20):
        some, all_ = hiding[step], plain[step]
        assert torch.equal(some.images[:, :2], all_.images[:, :2])  # the same windows
        blind = (some.time[:, 2:] == 0).all(1)
        hidden.append(blind)
        assert not some.real[blind][:, 2:].any()
        assert torch.equal(some.images[~blind], all_.images[~blind])
    assert 0.35 < torch.cat(hidden).float().mean() < 0.75
    assert torch.equal(hiding[3].time, hiding[3].time)


def test_augmentations_without_a_device_version_are_errors(prepared: Path) -> None:
    with pytest.raises(UserError, match="device windows: expected augment"):
        device_windows(prepared, augment=AugmentConfig())
