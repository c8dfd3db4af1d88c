# SPDX-License-Identifier: Apache-2.0
"""SparseBEV: windows, the feature ring, equivariance, denoising, and image queries."""

import pytest
import torch

from ftkd_core.config import SparseBEVConfig, override
from ftkd_core.data.augmentation import Augmentation
from ftkd_core.data.clips import make_sample
from ftkd_core.errors import UserError
from ftkd_core.geometry import yaw_transform
from ftkd_core.losses.detection import DetectionCriterion
from ftkd_core.models.denoising import make_denoising
from ftkd_core.models.dense_head import propose
from ftkd_core.models.feature_ring import FeatureRing, WindowFeatures
from ftkd_core.models.predictions import Predictions, decode
from ftkd_core.models.sparse_bev import SparseBEV
from ftkd_core.presets import SPARSE_BEV_PRESETS, sparse_bev_preset
from ftkd_core.runtime.preprocess import normalise
from ftkd_core.types import CameraRig, FrameWindow
from tests.core.helpers import (
    RIGS,
    drive,
    make_clip,
    rig_settings,
    small_config,
    small_sparse,
    window_of,
)

SETTINGS = pytest.mark.parametrize("image_queries", [0, 24])


def assert_same(a: Predictions, b: Predictions, tolerance: float = 1e-4) -> None:
    assert torch.allclose(a.logits, b.logits, atol=tolerance)
    assert torch.allclose(a.codes, b.codes, atol=tolerance * 60)


@torch.no_grad()
def test_shapes_and_boxes_in_range() -> None:
    model = small_sparse(past=2, future=1)
    frames = drive(small_config(), 4)
    predictions, pyramid = model(window_of(frames, 2, [1, 0, 3]))
    assert predictions.logits.shape == (2, 1, 16, 10)
    assert predictions.codes.shape == (2, 1, 16, 10)
    assert predictions.image_features.shape == (1, 6, 32, 2, 6)
    assert [tuple(level.shape[-2:]) for level in pyramid] == [(4, 12), (2, 6), (1, 3)]
    low, high = torch.tensor(model.config.decoder.point_range_m).view(2, 3)
    centers = predictions.codes[..., :3]
    assert ((centers >= low) & (centers <= high)).all()
    assert decode(predictions, 5).boxes.shape == (1, 5, 9)


@SETTINGS
@torch.no_grad()
def test_every_frame_of_the_window_matters(image_queries: int) -> None:
    model = small_sparse(past=2, future=1, image_queries=image_queries)
    frames = drive(small_config(), 4)
    window = window_of(frames, 2, [1, 0, 3])
    before, _ = model(window)
    for frame in range(4):
        images = window.images.clone()
        images[:, frame] *= -1
        after, _ = model(window._replace(images=images))
        assert not torch.allclose(before.logits, after.logits, atol=1e-4), frame


@torch.no_grad()
def test_velocity_is_the_displacement_since_the_first_past_frame() -> None:
    model = small_sparse(past=1)
    frames = drive(small_config(), 2)
    window = window_of(frames, 1, [0])
    boxes = torch.rand(1, 16, 10)
    change = torch.randn(1, 16, 10)
    layer = model.decoder_layer
    half_second = layer.refine(boxes, change, window.time)[..., 8:]
    assert torch.allclose(half_second, change[..., 8:] / 0.5)
    repeated = layer.refine(boxes, change, torch.zeros(1, 2))[..., 8:]
    assert torch.equal(repeated, change[..., 8:])


@RIGS
@SETTINGS
@torch.no_grad()
def test_the_ring_equals_extraction_of_the_whole_window(
    image_queries: int, cameras: int, width: int, height: int
) -> None:
    settings = rig_settings(cameras, width, height)
    model = small_sparse(*settings, past=2, image_queries=image_queries)
    frames = drive(small_config(*settings), 5, cameras=cameras)
    ring: FeatureRing | None = None
    shapes = None
    for index, frame in enumerate(frames):
        online, ring = model.step(frame, ring)
        order = [max(index - 1, 0), max(index - 2, 0)]
        offline, _ = model(window_of(frames, index, order))
        # Rounding errors of the maps (2e-6) move image queries; those close to a camera differ by 2e-4.
        assert_same(online, offline, 5e-4 if image_queries else 1e-5)
        now = [value.shape for value in (*ring.pyramid, *ring[1:])]
        assert shapes in (None, now)
        shapes = now


@SETTINGS
@torch.no_grad()
def test_a_reset_of_the_ring_equals_a_fresh_start(image_queries: int) -> None:
    model = small_sparse(past=2, image_queries=image_queries)
    ring = None
    for frame in drive(small_config(), 3, seed=40):
        _, ring = model.step(frame, ring)
    fresh = None
    for frame in drive(small_config(), 3):
        online, ring = model.step(frame, ring)
        expected, fresh = model.step(frame, fresh)
        assert_same(online, expected, 1e-6)


@SETTINGS
@torch.no_grad()
def test_predictions_do_not_depend_on_the_global_frame(image_queries: int) -> None:
    model = small_sparse(past=2, image_queries=image_queries)
    shift = torch.from_numpy(yaw_transform(2.1, (1500.0, -800.0, 3.0)))
    ring = moved_ring = None
    for frame in drive(small_config(), 3):
        moved = frame._replace(global_from_ego=shift @ frame.global_from_ego, time=frame.time + 1e6)
        a, ring = model.step(frame, ring)
        b, moved_ring = model.step(moved, moved_ring)
        assert_same(a, b, 1e-3)


@SETTINGS
@torch.no_grad()
def test_camera_order_does_not_matter(image_queries: int) -> None:
    """This holds for cameras that do not overlap, because a point that two cameras see is read from the
    first."""
    model = small_sparse(past=2, image_queries=image_queries)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    ring = shuffled_ring = None
    for frame in drive(small_config(), 3):
        frame.rig.intrinsics[..., 0, 0] = 90.0  # 56 degrees of 60 per camera
        rig = CameraRig(*(value[:, order] for value in frame.rig))
        shuffled = frame._replace(images=frame.images[:, order], rig=rig)
        expected, ring = model.step(frame, ring)
        found, shuffled_ring = model.step(shuffled, shuffled_ring)
        assert_same(found, expected)


@SETTINGS
@torch.no_grad()
def test_a_masked_camera_has_no_effect(image_queries: int) -> None:
    model = small_sparse(past=1, image_queries=image_queries)
    window = window_of(drive(small_config(), 2), 1, [0])
    window.rig.mask[:, 0, 2] = False
    images = window.images.clone()
    images[:, 0, 2] = 7.0
    a, b = model(window)[0], model(window._replace(images=images))[0]
    assert_same(a, b, 1e-6)
    window.rig.mask[:, 0, 2] = True
    assert not torch.allclose(model(window)[0].logits, a.logits, atol=1e-4)


@SETTINGS
@torch.no_grad()
def test_predictions_do_not_depend_on_batching(image_queries: int) -> None:
    model = small_sparse(past=1, image_queries=image_queries)
    first = window_of(drive(small_config(), 2), 1, [0])
    second = window_of(drive(small_config(), 2, seed=9), 1, [0])
    both = FrameWindow(
        torch.cat([first.images, second.images]),
        CameraRig(*(torch.cat(pair) for pair in zip(first.rig, second.rig, strict=True))),
        torch.cat([first.time, second.time]),
    )
    batched = model(both)[0]
    assert torch.allclose(batched.logits[:, 1:], model(second)[0].logits, atol=1e-3)


@SETTINGS
def test_denoising_does_not_affect_other_queries_and_every_parameter_gets_a_gradient(
    image_queries: int,
) -> None:
    model = small_sparse(past=1, image_queries=image_queries)
    clip = make_clip()
    samples = [make_sample(clip, index, Augmentation(), True) for index in (1, 0)]
    frames = [s.frame(normalise(s.images)) for s in reversed(samples)]
    window, targets = window_of(frames, 1, [0]), samples[0].targets
    reach = torch.tensor([51.0, 51.0, 5.0])
    noise = make_denoising(targets, model.config.loss, reach, torch.Generator().manual_seed(0))
    assert noise is not None
    with torch.no_grad():
        plain, noised = model(window)[0], model(window, noise)[0]
    assert_same(plain, noised, 1e-5)
    assert noised.denoising_logits is not None
    assert noised.denoising_logits.shape[2] == noise.points_ego.shape[1]
    model.train()
    criterion = DetectionCriterion(model.config)
    predictions, _ = model(window, noise)
    assert (predictions.auxiliary is not None) == bool(image_queries)
    terms = criterion(predictions, targets, samples[0].rig, noise)
    torch.stack(list(terms.values())).sum().backward()
    without_gradient = [
        name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0
    ]
    assert without_gradient == []


@torch.no_grad()
def test_image_queries_start_at_the_boxes_of_the_dense_head() -> None:
    model = small_sparse(past=0, image_queries=24)  # nothing to link to
    layer = model.decoder_layer
    layer.regressor[-1].weight.zero_()
    layer.classifier[-1].weight.zero_()
    window = window_of(drive(small_config(), 1), 0, [])
    predictions, pyramid = model(window)
    assert predictions.logits.shape[2] == 16 + 24
    now = CameraRig(*(value[:, 0] for value in window.rig))
    assert model.auxiliary is not None
    fine = pyramid[0][:, 0]
    proposed = propose(model.auxiliary(fine, now), fine, now, 8, 24).anchors
    low, high = torch.tensor(model.config.decoder.point_range_m).view(2, 3)
    proposed.codes[..., :3] = torch.minimum(torch.maximum(proposed.codes[..., :3], low), high)
    assert torch.allclose(predictions.codes[-1, :, 16:], proposed.codes, atol=1e-3)
    assert torch.allclose(predictions.logits[-1, :, 16:], proposed.logits, atol=1e-4)


@torch.no_grad()
def test_linked_image_queries_start_with_a_velocity() -> None:
    model = small_sparse(past=1, future=1, image_queries=24)
    window = window_of(drive(small_config(), 3), 1, [0, 2])
    features = WindowFeatures(model.extract(window.images), window.rig, window.time)
    _, linked = model.propose(features)
    assert model.auxiliary is not None and linked is not None
    fine, now = features.pyramid[0][:, 0], CameraRig(*(value[:, 0] for value in window.rig))
    alone = propose(model.auxiliary(fine, now), fine, now, model.auxiliary.stride, 24)
    assert alone.anchors.codes[..., 8:].abs().max() == 0
    assert linked.anchors.codes[..., 8:].abs().max() > 0
    assert linked.anchors.logits.equal(alone.anchors.logits)
    assert not model.auxiliary.training


@torch.no_grad()
def test_refinement_with_image_queries_is_rotation_equivariant() -> None:
    model = small_sparse(past=1, image_queries=24)
    window = window_of(drive(small_config(), 2), 1, [0])
    rotation = torch.from_numpy(yaw_transform(0.7)).float()
    rig = window.rig._replace(ego_from_camera=rotation @ window.rig.ego_from_camera)
    plain, rotated = model(window)[0], model(window._replace(rig=rig))[0]
    assert plain.auxiliary is not None and rotated.auxiliary is not None
    assert torch.allclose(plain.auxiliary.heat, rotated.auxiliary.heat, atol=1e-5)
    layer = model.decoder_layer
    boxes = torch.cat([torch.rand(1, 8, 3) * 0.2 + 0.4, torch.randn(1, 8, 7)], dim=-1)
    change = 0.1 * torch.randn(1, 8, 10)
    moved = layer.metric(layer.refine(boxes, change, window.time))
    metric = layer.metric(boxes)
    plane = rotation[:2, :2].mT

    def rotate_all(codes: torch.Tensor) -> torch.Tensor:
        heading = codes[..., 6:8].flip(-1) @ plane
        return torch.cat(
            [codes[..., :2] @ plane, codes[..., 2:6], heading.flip(-1), codes[..., 8:] @ plane], dim=-1
        )

    other = rotate_all(metric)
    other = torch.cat([layer.normalised(other[..., :3]), other[..., 3:]], dim=-1)
    assert torch.allclose(
        layer.metric(layer.refine(other, change, window.time)), rotate_all(moved), atol=1e-3
    )


def test_about_half_of_the_denoising_labels_are_random() -> None:
    targets = make_sample(make_clip(objects=40), 0, Augmentation(), True).targets
    noise = make_denoising(
        targets, small_config("loss.denoising_groups=5").loss, torch.tensor([61.0, 61.0, 10.0]),
        torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert noise is not None
    same = (noise.labels == targets.labels.repeat(1, 5)).float().mean()
    assert 0.4 < float(same) < 0.7  # half are kept, and a tenth of the random ones are equal
    assert noise.codes.shape == (*noise.labels.shape, 10)


def test_presets_follow_the_published_shapes() -> None:
    with torch.device("meta"):
        student = SparseBEV(sparse_bev_preset("sparse_bev_r50_704x256"))
        teacher = SparseBEV(sparse_bev_preset("sparse_bev_r101_704x256_offline"))
    assert student.decoder_layer.mixing.in_points == 4 * 8
    assert teacher.decoder_layer.mixing.in_points == 4 * 15
    assert sum(p.numel() for p in student.backbone.parameters()) == 23_508_032
    assert tuple(student.query_boxes.shape) == (900, 10)


def test_incompatible_settings_are_refused() -> None:
    with pytest.raises(UserError, match="unknown SparseBEV preset 'sparse'"):
        sparse_bev_preset("sparse")
    with pytest.raises(UserError, match="square number"):
        override(sparse_bev_preset("sparse_bev_tiny"), ["decoder.num_queries=190"])
    with pytest.raises(UserError, match="auxiliary_stride 8: expected one of the 2 pyramid levels"):
        override(sparse_bev_preset("sparse_bev_tiny"), ["decoder.levels=2"])
    with pytest.raises(UserError, match="published models have none"):
        override(sparse_bev_preset("sparse_bev_tiny"), ["decoder.as_published=true"])
    with pytest.raises(UserError, match="num_past 0: expected at least 1 with future frames"):
        SparseBEVConfig(preset="x", num_past=0, num_future=1)
    assert {SPARSE_BEV_PRESETS[name]().preset for name in SPARSE_BEV_PRESETS} == set(SPARSE_BEV_PRESETS)
