# SPDX-License-Identifier: Apache-2.0
"""Training clips: augmentation is consistent geometry, and a step depends only on seed and step."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ftkd_core.classes import CAMERA_CHANNELS
from ftkd_core.data.augmentation import Augmentation, AugmentConfig, draw_augmentation
from ftkd_core.data.clip_selection import select_cameras
from ftkd_core.data.clips import Clip, StreamBatch, StreamDataset, make_sample
from ftkd_core.data.targets import project_boxes
from ftkd_core.errors import UserError
from ftkd_core.geometry import is_rigid
from tests.core.helpers import NO_AUGMENTATION, make_clip

CLIPS = [make_clip(frames=8, objects=5, seed=seed) for seed in range(3)]


def dataset(
    seed: int = 0,
    streams: int = 3,
    augment: AugmentConfig = NO_AUGMENTATION,
    first: int = 0,
    all_streams: int | None = None,
) -> StreamDataset:
    return StreamDataset(
        CLIPS.__getitem__, 3, num_streams=streams, segment=4, augment=augment, seed=seed,
        first_stream=first, all_streams=all_streams,
    )  # fmt: skip


@settings(deadline=None, max_examples=30)
@given(st.booleans(), st.floats(-0.4, 0.4))
def test_rotated_and_mirrored_world_has_the_same_projections(mirror: bool, angle: float) -> None:
    clip = CLIPS[0]
    plain = make_sample(clip, 1, Augmentation(), True)
    turned = make_sample(clip, 1, Augmentation(mirror, angle), True)
    a, b = plain.targets.centers_2d.clone(), turned.targets.centers_2d
    if mirror:
        a[..., 0] = 96 - a[..., 0]
    ahead = plain.targets.depths > 0.5
    assert torch.allclose(a[ahead], b[ahead], atol=1e-2)
    assert torch.allclose(plain.targets.depths, turned.targets.depths, atol=1e-4)
    assert torch.equal(plain.targets.mask_2d, turned.targets.mask_2d)
    assert is_rigid(turned.global_from_ego[0].numpy())
    assert all(is_rigid(pose.numpy(), 1e-4) for pose in turned.rig.ego_from_camera[0])


@pytest.mark.parametrize("mirror", [False, True])
def test_ego_motion_and_velocity_rotate_together(mirror: bool) -> None:
    """Distances of ego motion and speeds of objects do not change under rotation and mirroring."""
    clip = CLIPS[0]
    change = Augmentation(mirror, 0.3)
    samples = [make_sample(clip, index, change, index == 0) for index in (0, 1)]
    moved = samples[1].global_from_ego[0] @ torch.linalg.inv(samples[0].global_from_ego[0])
    plain = torch.from_numpy(clip.global_from_ego[1] @ np.linalg.inv(clip.global_from_ego[0]))
    assert torch.allclose(moved[:3, 3].norm(), plain[:3, 3].norm(), atol=1e-9)
    speeds = samples[0].targets.boxes[0, :, 7:].norm(dim=1)
    known = make_sample(clip, 0, Augmentation(), True).targets.boxes[0, :, 7:].norm(dim=1)
    assert torch.allclose(speeds, known, atol=1e-5)


@settings(deadline=None, max_examples=20)
@given(st.booleans(), st.floats(-0.4, 0.4), st.floats(0.8, 1.25))
def test_scaled_world_has_the_same_projections(mirror: bool, angle: float, scale: float) -> None:
    """A world scaled with its cameras looks the same, and motion scales with it."""
    change = Augmentation(mirror, angle)
    plain = [make_sample(CLIPS[0], index, change, True) for index in (1, 2)]
    scaled = [make_sample(CLIPS[0], index, change._replace(scale=scale), True) for index in (1, 2)]
    assert torch.equal(scaled[0].images, plain[0].images)
    a, b = plain[0].targets, scaled[0].targets
    assert torch.allclose(b.boxes_2d, a.boxes_2d, atol=1e-2) and torch.equal(b.mask_2d, a.mask_2d)
    ahead = a.depths > 0.5
    assert torch.allclose(b.depths[ahead], a.depths[ahead] * scale, rtol=1e-4)
    assert torch.allclose(b.boxes[..., :6], a.boxes[..., :6] * scale, rtol=1e-5)
    assert torch.equal(b.boxes[..., 6], a.boxes[..., 6])
    assert torch.allclose(b.boxes[..., 7:], a.boxes[..., 7:] * scale, rtol=1e-5)
    assert is_rigid(scaled[0].global_from_ego[0].numpy())

    def moved(samples: list[StreamBatch]) -> torch.Tensor:
        motion = torch.linalg.inv(samples[0].global_from_ego[0]) @ samples[1].global_from_ego[0]
        return motion[:3, 3]

    assert torch.allclose(moved(scaled), moved(plain) * scale, atol=1e-9)


def test_mirror_flips_the_images() -> None:
    plain = make_sample(CLIPS[0], 0, Augmentation(), True).images
    mirrored = make_sample(CLIPS[0], 0, Augmentation(mirror=True), True).images
    assert torch.equal(mirrored, plain.flip(3))


def test_step_depends_only_on_seed_and_step() -> None:
    augment = AugmentConfig()
    forward = [dataset(1, augment=augment)[step] for step in range(6)]
    again = dataset(1, augment=augment)[5]
    assert torch.equal(forward[5].images, again.images)
    assert torch.equal(forward[5].targets.boxes, again.targets.boxes)
    assert not torch.equal(dataset(2, augment=augment)[5].global_from_ego, again.global_from_ego)


def test_streams_are_continuous_within_a_segment_and_reset_between() -> None:
    data = dataset(streams=1)
    served = [data[step] for step in range(12)]
    assert [bool(batch.is_first[0]) for batch in served] == [index % 4 == 0 for index in range(12)]
    for before, after in itertools.pairwise(served):
        if not after.is_first[0]:
            assert float(after.time[0] - before.time[0]) == pytest.approx(0.5)


def test_ranks_together_serve_the_batch_of_one_process() -> None:
    for step in (2, 5):
        whole = dataset(streams=4)[step]
        ranks = [dataset(streams=2, first=first, all_streams=4)[step] for first in (0, 2)]
        assert torch.equal(whole.global_from_ego, torch.cat([rank.global_from_ego for rank in ranks]))
        assert torch.equal(whole.is_first, torch.cat([rank.is_first for rank in ranks]))
        assert not torch.equal(ranks[0].global_from_ego, ranks[1].global_from_ego)


def test_padded_objects_are_masked() -> None:
    clips = [make_clip(objects=2, seed=1), make_clip(objects=7, seed=2)]
    data = StreamDataset(clips.__getitem__, 2, num_streams=6, segment=3, augment=NO_AUGMENTATION, seed=0)
    targets = data[0].targets
    assert targets.mask.sum(1).unique().tolist() == [2, 7]
    assert torch.all(targets.boxes[~targets.mask] == 1.0)
    assert not targets.mask_2d[:, :, 2:][targets.mask.sum(1) == 2].any()


def test_dropped_camera_is_black_and_masked_and_has_no_2d_targets() -> None:
    sample = make_sample(CLIPS[1], 0, Augmentation(), True, dropped_camera=2)
    assert sample.rig.mask[0].tolist() == [True, True, False, True, True, True]
    assert sample.images[0, 2].max() == 0
    assert not sample.targets.mask_2d[0, 2].any()


class Source:
    """Clips with all cameras."""

    name = "some clips"

    def __call__(self, index: int) -> Clip:
        return make_clip(frames=8, objects=30, seed=index)


@pytest.mark.parametrize("zoom", [1.0, 1.2])
def test_cameras_are_selected_by_name(zoom: float) -> None:
    channels = ("CAM_BACK", "CAM_FRONT")
    chosen = select_cameras(Source(), channels)
    assert chosen.name == "some clips by CAM_BACK, CAM_FRONT"  # caches of derived data use this name
    change, places = Augmentation(zoom=zoom, left=0.3), [3, 0]
    whole, found = (make_sample(clips(1), 2, change, True) for clips in (Source(), chosen))
    assert torch.equal(found.images, whole.images[:, places])
    for found_values, values in zip(found.rig, whole.rig, strict=True):
        assert torch.equal(found_values, values[:, places])
    assert chosen(1).images.shape == (8, 2, 32, 96, 3)
    seen = whole.targets.boxes[:, _in_view(whole.targets.boxes_2d, whole.targets.depths)[0, places].any(0)]
    assert 0 < seen.shape[1] < whole.targets.boxes.shape[1]
    assert torch.equal(found.targets.boxes, seen)  # no camera sees the others


def _in_view(boxes_2d: torch.Tensor, depths: torch.Tensor) -> torch.Tensor:
    size = boxes_2d[..., 2:] - boxes_2d[..., :2]
    return (depths > 0.5) & (size.prod(-1) > 1.0)


def test_selecting_all_cameras_returns_the_source_and_unknown_cameras_raise() -> None:
    source = Source()
    assert select_cameras(source, CAMERA_CHANNELS) is source
    with pytest.raises(UserError, match="model.channels has 'CAM_TOP'; some clips has CAM_FRONT, "):
        select_cameras(source, ("CAM_FRONT", "CAM_TOP"))


def test_box_next_to_the_camera_stays_on_its_side() -> None:
    k = np.array([[[80.0, 0, 48], [0, 80.0, 16], [0, 0, 1]]])
    optical = np.array([[[0, 0, 1, 0], [-1, 0, 0, 0], [0, -1, 0, 0], [0, 0, 0, 1.0]]])
    box = np.array(
        [[0.5, 4.0, 0, 4, 2, 1.5, 0, 0, 0]]
    )  # to the left of the camera, half ahead of it and half behind
    boxes_2d, _, depths = project_boxes(box, k, optical, (32, 96))
    assert depths[0, 0] == pytest.approx(0.5)
    assert boxes_2d[0, 0, 0] == 0.0
    assert boxes_2d[0, 0, 2] < 48.0


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"scale": 0.6}, "scale is 0.6; expected a value less than or equal to 0.5"),
        ({"grid_mask": 70.0}, "grid_mask is 70.0; expected a value less than or equal to 1"),
    ],
)
def test_augmentation_out_of_range_raises(setting: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        AugmentConfig(**setting)


def test_number_of_random_draws_does_not_depend_on_the_config() -> None:
    a = draw_augmentation(NO_AUGMENTATION, random := np.random.default_rng(0))
    b = draw_augmentation(AugmentConfig(), other := np.random.default_rng(0))
    assert a == Augmentation()
    assert b != a
    assert random.random() == other.random()
