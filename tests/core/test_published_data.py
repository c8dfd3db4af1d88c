# SPDX-License-Identifier: Apache-2.0
"""Segments, augmentation and windows as in the public code."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ftkd_core.classes import CAMERA_CHANNELS
from ftkd_core.config import ImageConfig
from ftkd_core.data.augmentation import Augmentation, AugmentConfig, draw_augmentation
from ftkd_core.data.clips import StreamDataset, make_sample
from ftkd_core.data.nuscenes import camera_records, open_dataset, scene_names
from ftkd_core.data.nuscenes_clips import NuScenesClips
from ftkd_core.data.order import EpochOrder
from ftkd_core.data.photometric import distort
from ftkd_core.data.synthetic.export import write_dataset
from ftkd_core.data.windows import WindowDataset, draw_stride, make_window, window_order
from ftkd_core.errors import UserError
from tests.core.helpers import make_clip, small_model

PUBLISHED = AugmentConfig(as_published=True, colour=0.5, zoom=(0.864, 1.25), scale=0.05, camera_dropout=0.0)


@given(st.lists(st.integers(1, 60), min_size=1, max_size=8), st.integers(0, 99), st.integers(1, 4))
def test_halves_visit_every_frame_once_per_epoch(lengths: list[int], seed: int, streams: int) -> None:
    order = EpochOrder(lengths, 0, seed)
    frames = [
        (clip, frame)
        for number in range(order.segments_per_epoch)
        for clip, start in [order(number)]
        for frame in range(start, start + order.length(number))
    ]
    assert sorted(frames) == [(clip, frame) for clip, length in enumerate(lengths) for frame in range(length)]
    halves = [order.length(number) for number in range(order.segments_per_epoch)]
    assert sorted(halves) == sorted(
        half for length in lengths for half in ((length + 1) // 2, length // 2) if half
    )
    for stream in range(streams):  # steps walk through the segments of a stream without gaps
        places = [order.place(stream, streams, step) for step in range(30)]
        for (index, position), (next_index, next_position) in itertools.pairwise(places):
            ended = position + 1 == order.length(index * streams + stream)
            assert (next_index, next_position) == ((index + 1, 0) if ended else (index, position + 1))


def test_streams_of_halves_start_together_and_reset_at_each_half() -> None:
    clips = [make_clip(seed=seed, frames=frames) for seed, frames in enumerate((5, 4))]
    data = StreamDataset(
        clips.__getitem__, 2, num_streams=2, segment=0, augment=PUBLISHED, seed=1,
        order=EpochOrder([5, 4], 0, 1),
    )  # fmt: skip
    for stream in (0, 1):
        chosen = [data.select_frame(stream, step) for step in range(6)]
        assert chosen[0].is_first
        for before, after in itertools.pairwise(chosen):
            follows = after.clip is before.clip and after.frame == before.frame + 1
            assert follows != after.is_first
    again = data.select_frame(1, 4)
    assert (again.frame, again.augmentation) == (chosen[4].frame, chosen[4].augmentation)


def test_frames_of_a_published_stream_differ_in_augmentation_but_not_in_scale() -> None:
    clip = make_clip(frames=6)
    data = StreamDataset(
        [clip].__getitem__, 1, num_streams=1, segment=6, augment=PUBLISHED, seed=2, staggered=False
    )
    drawn = [data.select_frame(0, step).augmentation for step in range(6)]
    assert len({change.angle for change in drawn}) == len({change.zoom for change in drawn}) == 6
    assert {change.mirror for change in drawn} == {True, False}
    assert len({change.scale for change in drawn}) == 1
    assert not any(change.world_mirrored for change in drawn)
    ours = StreamDataset([clip].__getitem__, 1, num_streams=1, segment=6, augment=AugmentConfig(), seed=2)
    assert len({ours.select_frame(0, step).augmentation for step in range(6)}) == 1


def test_a_stream_whose_frames_are_rotated_differently_keeps_the_world() -> None:
    """Static objects stay at their place in the global frame, so the memory stays valid."""
    clip = make_clip(frames=2)
    places = []
    for angle in (0.3, -0.2):
        sample = make_sample(clip, 0, Augmentation(mirror=True, mirror_world=False, angle=angle), True)
        boxes, pose = sample.targets.boxes[0, :, :3].double(), sample.global_from_ego[0]
        places.append(boxes @ pose[:3, :3].T + pose[:3, 3])
    torch.testing.assert_close(places[0], places[1], atol=1e-4, rtol=0)


@pytest.mark.parametrize("zoom", [1.0, 1.2])
def test_mirrored_images_of_the_same_world_project_to_mirrored_pixels(zoom: float) -> None:
    """Boxes, poses and extrinsics are those of the unmirrored sample; 2-D boxes are mirrored."""
    clip = make_clip(objects=8)
    plain = make_sample(clip, 0, Augmentation(zoom=zoom), True)
    flipped = make_sample(clip, 0, Augmentation(mirror=True, mirror_world=False, zoom=zoom), True)
    width = plain.images.shape[3]
    assert torch.equal(plain.images.flip(3), flipped.images)
    assert torch.equal(plain.targets.boxes, flipped.targets.boxes)
    assert torch.equal(plain.rig.ego_from_camera, flipped.rig.ego_from_camera)
    seen = plain.targets.mask_2d
    assert torch.equal(seen, flipped.targets.mask_2d) and seen.any()
    centers, other = plain.targets.centers_2d[seen], flipped.targets.centers_2d[seen]
    torch.testing.assert_close(other[:, 0], width - centers[:, 0], atol=1e-2, rtol=0)
    torch.testing.assert_close(other[:, 1], centers[:, 1], atol=1e-2, rtol=0)


def test_position_embedding_of_mirrored_images_is_mirrored() -> None:
    """The rays of the tokens in a mirrored image are those of the plain image in reversed order, and the
    focal lengths that condition the tokens are positive."""
    model = small_model("decoder.as_published=true", "decoder.num_depths=32", "decoder.channels=16",
                        "auxiliary_kind=none", image_queries=0)  # fmt: skip
    clip = make_clip()
    plain = make_sample(clip, 0, Augmentation(), True)
    flipped = make_sample(clip, 0, Augmentation(mirror=True, mirror_world=False), True)
    geometry, mirrored = model.geometry(plain.rig), model.geometry(flipped.rig)
    rows, columns = model.config.image.height // 16, model.config.image.width // 16
    frustum = geometry.frustum.unflatten(1, (6, rows, columns)).flip(3).flatten(1, 3)
    torch.testing.assert_close(mirrored.frustum, frustum, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(mirrored.cone[..., :2], geometry.cone[..., :2])
    assert (mirrored.cone[..., :2] > 0).all()


@given(st.integers(0, 2**20), st.floats(0.05, 0.9))
def test_distorted_images_stay_images(seed: int, strength: float) -> None:
    image = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    changed = distort(image, strength, np.random.default_rng(seed))
    assert changed.shape == image.shape and changed.dtype == np.uint8
    again = distort(image, strength, np.random.default_rng(seed))
    assert np.array_equal(changed, again)


def test_each_photometric_change_has_probability_one_half() -> None:
    """A grey image has no hue or saturation; a black one shows brightness only, as contrast multiplies."""
    black, grey = np.zeros((2, 2, 3), np.uint8), np.full((2, 2, 3), 100, np.uint8)
    count = 400
    brighter = sum(distort(black, 0.5, np.random.default_rng([1, i])).any() for i in range(count))
    assert 0.19 < brighter / count < 0.31  # half of those with a change become darker, and stay black
    levels = np.array([distort(grey, 0.5, np.random.default_rng([2, i]))[0, 0, 0] for i in range(count)])
    assert 0.17 < np.mean(np.abs(levels.astype(int) - 100) <= 1) < 0.34  # neither brightness nor contrast
    assert levels.min() >= (100 - 32) * 0.5 - 1 and levels.max() <= (100 + 32) * 1.5 + 1
    red = np.zeros((2, 2, 3), np.uint8)
    red[..., 0] = 200
    other = [distort(red, 0.5, np.random.default_rng([3, i]))[0, 0] for i in range(count)]
    moved = np.mean([int(pixel.argmax()) != 0 for pixel in other])
    assert 0.25 < moved < 0.42  # a permutation moves red in two of three cases


def test_every_image_of_a_window_is_distorted_on_its_own() -> None:
    clip = make_clip(frames=3)
    change = Augmentation(distortion=0.5, seed=7)
    window = make_window(clip, 1, change, 1, 0)
    plain = make_window(clip, 1, Augmentation(), 1, 0)
    images, original = window.images[0].float(), plain.images[0].float()
    ratios = {
        round(float(images[t, n].mean() / original[t, n].mean()), 4) for t in range(2) for n in range(6)
    }
    assert len(ratios) > 6
    assert torch.equal(make_window(clip, 1, change, 1, 0).images, window.images)


def test_published_colours_need_no_gains() -> None:
    change = draw_augmentation(PUBLISHED, np.random.default_rng(0))
    assert (change.distortion, change.gain, change.offset) == (0.5, (1.0, 1.0, 1.0), 0.0)


@given(st.integers(0, 60), st.integers(1, 8), st.integers(0, 8), st.integers(0, 999))
def test_window_strides_are_those_of_the_public_loader(
    earlier: int, past: int, future: int, seed: int
) -> None:
    stride = draw_stride((4, 8), earlier, past, future, np.random.default_rng(seed))
    if future:
        assert 4 <= stride <= 8
    else:
        longest = max(1, min(8, earlier // past))
        assert min(4, longest) <= stride <= longest


def test_all_strides_occur() -> None:
    random = np.random.default_rng(0)
    assert {draw_stride((4, 8), 100, 7, 0, random) for _ in range(100)} == {4, 5, 6, 7, 8}
    assert window_order(20, 60, 3, 2, 5) == ([20, 15, 10, 5, 25, 30], [True] * 6)
    assert window_order(8, 60, 3, 0, 5) == ([8, 3, 0, 0], [True, True, False, False])


@pytest.fixture(scope="module")
def dataroot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A rendered data set with sweeps."""
    return write_dataset(
        tmp_path_factory.mktemp("sweeps") / "data", (900_002,), version="v1.0-synth", split="few", width=96,
        height=54, duration_s=2.0, progress=False,
    )  # fmt: skip


def clips_of(dataroot: Path, cache: Path, *, sweeps: bool) -> NuScenesClips:
    image = ImageConfig(width=96, height=32)
    found = NuScenesClips(dataroot, "v1.0-synth", "few", image, CAMERA_CHANNELS, cache, sweeps=sweeps)
    found.prepare()
    return found


def test_index_of_sweeps_has_all_rounds_and_marks_the_key_frames(dataroot: Path, tmp_path: Path) -> None:
    keys, rounds = (clips_of(dataroot, tmp_path, sweeps=value)(0) for value in (False, True))
    assert rounds.keys is not None and rounds.num_keys == keys.num_keys == len(keys.times)
    assert len(rounds.times) > 4 * len(keys.times)
    assert (np.diff(rounds.times) > 0).all()
    for number, place in enumerate(rounds.keys):
        np.testing.assert_array_equal(rounds.objects[place].boxes, keys.objects[number].boxes)
        np.testing.assert_allclose(rounds.global_from_ego[place], keys.global_from_ego[number])
        assert rounds.times[place] == keys.times[number]
    others = np.setdiff1d(np.arange(len(rounds.times)), rounds.keys)
    assert all(len(rounds.objects[place].boxes) == 0 for place in others)
    dataset = open_dataset(dataroot, "v1.0-synth")
    record = camera_records(dataset, scene_names(dataset)[0], CAMERA_CHANNELS[0])[1]
    place = int(others[0])
    assert rounds.images[place].shape == (6, 32, 96, 3)
    expected = record.global_from_ego @ record.ego_from_camera
    np.testing.assert_allclose(
        rounds.global_from_ego[place] @ rounds.ego_from_camera[place, 0], expected, atol=1e-6
    )


def test_windows_of_sweeps_surround_key_frames(dataroot: Path, tmp_path: Path) -> None:
    clips = clips_of(dataroot, tmp_path, sweeps=True)
    order = EpochOrder([clips(0).num_keys], 1, 0)
    data = WindowDataset(
        clips, 1, batch=1, num_past=2, num_future=2, augment=AugmentConfig(), seed=0, order=order,
        sweeps=(4, 8),
    )  # fmt: skip
    gaps = set()
    for step in range(24):
        batch = data[step]
        assert batch.targets.mask.any()
        real, time = batch.real[0], batch.time[0]
        if real[1]:
            gaps.add(round(-float(time[1]) * 12))
        if real[1] and real[3]:
            assert float(time[3]) == pytest.approx(-float(time[1]), abs=0.06)
    assert gaps <= {4, 5, 6, 7, 8} and len(gaps) > 1


def test_data_without_sweeps_is_refused_by_name(tmp_path: Path) -> None:
    root = write_dataset(
        tmp_path / "data", (900_002,), version="v1.0-synth", split="few", width=96, height=54,
        duration_s=1.0, sweeps=False, progress=False,
    )  # fmt: skip
    with pytest.raises(UserError, match=r"no images between its \d+ key frames; copy the folder sweeps"):
        clips_of(root, tmp_path / "index", sweeps=True)


def test_folders_may_be_links_to_another_disk(dataroot: Path, tmp_path: Path) -> None:
    linked = tmp_path / "linked"
    linked.mkdir()
    for name in ("samples", "sweeps", "maps", "v1.0-synth"):
        (linked / name).symlink_to(dataroot / name, target_is_directory=True)
    clip = clips_of(linked, tmp_path / "index", sweeps=True)(0)
    assert np.array_equal(clip.images[0], clips_of(dataroot, tmp_path / "other", sweeps=True)(0).images[0])
