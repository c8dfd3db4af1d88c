# SPDX-License-Identifier: Apache-2.0
"""Streaming detectors: causality, reset, streaming, equivariance, masks, training, and the memory."""

import pytest
import torch

from ftkd_core.data.augmentation import Augmentation
from ftkd_core.data.clips import make_sample
from ftkd_core.errors import UserError
from ftkd_core.geometry import yaw_transform
from ftkd_core.models.anchored_stream_petr import AnchoredStreamPETR
from ftkd_core.models.build import build_stream_petr
from ftkd_core.models.corrected_stream_petr import CorrectedStreamPETR
from ftkd_core.models.denoising import make_denoising
from ftkd_core.models.dense_head import DenseHead
from ftkd_core.models.focal_head import FocalHead
from ftkd_core.models.position import frequency_encoding
from ftkd_core.models.predictions import Predictions, decode
from ftkd_core.models.stream_petr import StreamPETR
from ftkd_core.presets import preset
from ftkd_core.runtime.preprocess import normalise
from ftkd_core.types import Frame
from tests.core.helpers import (
    RIGS,
    drive,
    make_clip,
    make_frame,
    rig_settings,
    small_config,
    small_model,
    stream,
)  # fmt: skip

PUBLISHED = ("decoder.as_published=true", "decoder.num_depths=32", "backbone.neck_channels=32")
COMPOSITIONS: dict[str, tuple[type[StreamPETR], tuple[str, ...], int]] = {
    "published": (StreamPETR, PUBLISHED, 0),
    "corrected": (CorrectedStreamPETR, (), 0),
    "anchored": (AnchoredStreamPETR, (), 8),
}
"""Class, settings and number of image queries of each composition."""
ALL = pytest.mark.parametrize("composition", list(COMPOSITIONS))


def model_of(composition: str, *extra: str) -> StreamPETR:
    kind, settings, image_queries = COMPOSITIONS[composition]
    model = small_model(*settings, *extra, image_queries=image_queries)
    assert type(model) is kind
    return model


def assert_same(a: Predictions, b: Predictions, tolerance: float = 1e-4) -> None:
    assert torch.allclose(a.logits, b.logits, atol=tolerance)
    assert torch.allclose(a.codes, b.codes, atol=tolerance * 60)


@ALL
def test_shapes(composition: str) -> None:
    model = model_of(composition)
    predictions = stream(model, drive(model.config, 1))[0]
    queries = 12 + model.config.decoder.num_image_queries + 6
    assert predictions.logits.shape == (2, 1, queries, 10)
    assert predictions.codes.shape == (2, 1, queries, 10)
    assert predictions.features.shape == (1, queries, 32)
    detections = decode(predictions, 20)
    assert detections.boxes.shape == (1, 20, 9)
    assert torch.all(detections.scores[:, :-1] >= detections.scores[:, 1:])


@RIGS
@ALL
def test_any_number_of_cameras_is_supported(composition: str, cameras: int, width: int, height: int) -> None:
    model = model_of(composition, *rig_settings(cameras, width, height))
    frames = drive(model.config, 3, cameras=cameras)
    results = stream(model, frames)
    channels = model.config.backbone.neck_channels
    assert results[-1].image_features.shape == (1, cameras, channels, height // 16, width // 16)
    assert all(
        torch.isfinite(result.logits).all() and torch.isfinite(result.codes).all() for result in results
    )
    for camera in range(cameras):
        images = frames[2].images.clone()
        images[:, camera] *= -1
        changed = stream(model, [*frames[:2], frames[2]._replace(images=images)])[-1]
        assert not torch.allclose(changed.logits, results[-1].logits, atol=1e-4), camera


def test_there_may_be_one_image_query_per_cell() -> None:
    model = small_model(image_queries=6 * 4 * 12)
    assert stream(model, drive(model.config, 1))[0].logits.shape[2] == 12 + 288 + 6


def test_predictions_depend_on_past_frames_only() -> None:
    model = small_model()
    frames = drive(model.config, 4)
    alone = stream(model, [frames[2]._replace(is_first=torch.tensor([True]))])[0]
    results = stream(model, frames)
    assert not torch.allclose(results[2].logits, alone.logits, atol=1e-3)
    changed = [*frames[:3], frames[3]._replace(images=frames[3].images * -1)]
    for index in range(3):
        assert torch.equal(stream(model, changed)[index].logits, results[index].logits)


def test_the_motion_aware_norm_is_initially_a_layer_norm() -> None:
    torch.manual_seed(0)
    model = build_stream_petr(small_config())
    features, motion = torch.randn(1, 5, 32), torch.randn(1, 5, 15)
    for norm in (model.motion_feature, model.motion_position):
        normed = torch.nn.functional.layer_norm(features, (32,))
        assert torch.equal(norm(features, frequency_encoding(motion)), normed)


@pytest.mark.parametrize(
    ("what", "places"), [("velocity", range(2)), ("age", range(2, 3)), ("pose", range(3, 15))]
)
@torch.no_grad()
def test_the_motion_aware_norm_depends_on_velocity_age_and_pose(what: str, places: range) -> None:
    model = small_model()
    points, content, motion = torch.randn(1, 5, 3), torch.randn(1, 5, 32), torch.randn(1, 5, 15)
    features = torch.randn(1, 5, 32)
    position = model.encode_points(points)
    content_before = model.add_motion(position, content, motion)[1]
    position_before = model.motion_position(features, frequency_encoding(motion))
    for place in places:
        changed = motion.clone()
        changed[..., place] += 0.2
        content_after = model.add_motion(position, content, changed)[1]
        position_after = model.motion_position(features, frequency_encoding(changed))
        for before, after in ((content_before, content_after), (position_before, position_after)):
            assert ((after - before).abs().amax(-1) > 1e-4).all(), (what, place)


def test_a_reset_equals_a_fresh_start() -> None:
    model = small_model()
    frames = drive(model.config, 3)
    memory = model.start_memory(1)
    with torch.no_grad():
        for frame in drive(model.config, 3, seed=50):
            _, memory = model(frame, memory)
        fresh = stream(model, frames)
        for frame, expected in zip(frames, fresh, strict=True):
            predictions, memory = model(frame, memory)
            assert_same(predictions, expected, 1e-6)


@ALL
def test_predictions_do_not_depend_on_the_global_frame(composition: str) -> None:
    model = model_of(composition)
    frames = drive(model.config, 4)
    shift = torch.from_numpy(yaw_transform(2.1, (1500.0, -800.0, 3.0)))
    moved = [frame._replace(global_from_ego=shift @ frame.global_from_ego) for frame in frames]
    for a, b in zip(stream(model, frames), stream(model, moved), strict=True):
        assert_same(a, b)


@ALL
def test_predictions_do_not_depend_on_the_start_time(composition: str) -> None:
    model = model_of(composition)
    frames = drive(model.config, 3)
    later = [frame._replace(time=frame.time + 1e6) for frame in frames]
    for a, b in zip(stream(model, frames), stream(model, later), strict=True):
        assert_same(a, b)


@pytest.mark.parametrize("composition", ["corrected", "anchored"])
def test_camera_order_does_not_matter(composition: str) -> None:
    model = model_of(composition)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    frames = drive(model.config, 3)
    shuffled = []
    for frame in frames:
        rig = type(frame.rig)(*(value[:, order] for value in frame.rig))
        shuffled.append(frame._replace(images=frame.images[:, order], rig=rig))
    for a, b in zip(stream(model, frames), stream(model, shuffled), strict=True):
        # Image queries change their order only if two peaks are equally strong.
        assert_same(a, b)


@ALL
def test_a_masked_camera_carries_no_weight(composition: str) -> None:
    model = model_of(composition)
    frame = make_frame(model.config, 1)
    mask = torch.tensor([[True, True, False, True, True, True]])
    frame = frame._replace(rig=frame.rig._replace(mask=mask))
    other = frame.images.clone()
    other[:, 2] = 7.0
    a, b = stream(model, [frame])[0], stream(model, [frame._replace(images=other)])[0]
    assert_same(a, b, 1e-5)
    whole = stream(model, [frame._replace(rig=frame.rig._replace(mask=torch.ones_like(mask)))])[0]
    assert not torch.allclose(a.logits, whole.logits, atol=1e-3)


@ALL
def test_predictions_do_not_depend_on_batching(composition: str) -> None:
    model = model_of(composition)
    first, second = drive(model.config, 3), drive(model.config, 3, seed=20)
    both = [
        Frame(
            torch.cat([a.images, b.images]),
            type(a.rig)(*(torch.cat(pair) for pair in zip(a.rig, b.rig, strict=True))),
            torch.cat([a.global_from_ego, b.global_from_ego]),
            torch.cat([a.time, b.time]),
            torch.cat([a.is_first, b.is_first]),
        )
        for a, b in zip(first, second, strict=True)
    ]
    memory = model.start_memory(2)
    with torch.no_grad():
        for frame, alone in zip(both, stream(model, second), strict=True):
            predictions, memory = model(frame, memory)
            assert torch.allclose(predictions.logits[:, 1:], alone.logits, atol=1e-4)


@ALL
def test_denoising_queries_do_not_affect_other_queries(composition: str) -> None:
    model = model_of(composition)
    batch = make_sample(make_clip(), 0, Augmentation(), True)
    frame = batch.frame(normalise(batch.images))
    noise = make_denoising(batch.targets, model.config.loss, model.range_m, torch.Generator().manual_seed(0))
    assert noise is not None
    with torch.no_grad():
        plain, _ = model(frame, model.start_memory(1))
        noised, _ = model(frame, model.start_memory(1), noise)
    assert noised.denoising_logits.shape[2] == noise.points_ego.shape[1] == 2 * batch.targets.labels.shape[1]
    assert_same(plain, noised, 1e-5)


def test_denoising_groups_do_not_attend_to_each_other() -> None:
    model = small_model(image_queries=0)
    batch = make_sample(make_clip(), 0, Augmentation(), True)
    frame = batch.frame(normalise(batch.images))
    noise = make_denoising(batch.targets, model.config.loss, model.range_m, torch.Generator().manual_seed(0))
    assert noise is not None
    half = noise.points_ego.shape[1] // 2
    moved = noise.points_ego.clone()
    moved[:, half:] += 3.0
    with torch.no_grad():
        a, _ = model(frame, model.start_memory(1), noise)
        b, _ = model(frame, model.start_memory(1), noise._replace(points_ego=moved))
    assert torch.allclose(a.denoising_logits[:, :, :half], b.denoising_logits[:, :, :half], atol=1e-5)
    assert not torch.allclose(a.denoising_logits[:, :, half:], b.denoising_logits[:, :, half:], atol=1e-3)


def test_every_parameter_gets_a_gradient() -> None:
    model = small_model().train()
    batch = make_sample(make_clip(), 0, Augmentation(), True)
    frame = batch.frame(normalise(batch.images))
    _, memory = model(frame, model.start_memory(1))
    later = frame._replace(is_first=torch.tensor([False]), time=frame.time + 0.5)
    predictions, _ = model(later, memory)
    auxiliary = sum(value.square().sum() for value in predictions.auxiliary)
    (predictions.logits.square().sum() + predictions.codes.square().sum() + auxiliary).backward()
    without_gradient = [
        name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0
    ]
    assert without_gradient == []


def test_the_r50_preset_has_the_published_sizes() -> None:
    with torch.device("meta"):
        model = build_stream_petr(preset("r50_704x256_428q"))
    backbone = sum(p.numel() for p in model.backbone.parameters())
    assert backbone == 23_508_032  # torchvision's resnet50 without classifier
    names = set(model.backbone.state_dict())
    assert {"conv1.weight", "layer1.0.downsample.0.weight", "layer4.2.bn3.running_var"} <= names
    assert model.config.decoder.num_queries + model.config.decoder.num_propagated == 428


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("tiny", AnchoredStreamPETR), ("r18_352x128", AnchoredStreamPETR),
        ("r50_704x256_428q", CorrectedStreamPETR), ("r50_704x256_900q", CorrectedStreamPETR),
    ],
)  # fmt: skip
def test_presets_select_their_composition(name: str, kind: type[StreamPETR]) -> None:
    with torch.device("meta"):
        assert type(build_stream_petr(preset(name))) is kind


@pytest.mark.parametrize("kind", ["none", "dense", "focal"])
def test_auxiliary_kind_selects_the_training_head(kind: str) -> None:
    model = model_of("published", f"auxiliary_kind={kind}")
    heads = {"none": type(None), "dense": DenseHead, "focal": FocalHead}
    assert type(model.auxiliary) is heads[kind]


def test_small_config_overrides_the_preset() -> None:
    assert small_config().decoder.memory_length == 18


@ALL
def test_geometry_is_exact_under_autocast(composition: str) -> None:
    """Far from the global origin, boxes and memory keep their positions."""
    model = model_of(composition)
    shift = torch.from_numpy(yaw_transform(0.7, (1500.0, -1200.0, 0.0)))
    frames = [f._replace(global_from_ego=shift @ f.global_from_ego) for f in drive(model.config, 3)]
    exact = stream(model, frames)
    with torch.autocast("cpu", torch.bfloat16):
        rough = stream(model, frames)
    first = (exact[0].codes[-1, ..., :3] - rough[0].codes[-1, ..., :3]).norm(dim=-1)
    assert float(first.median()) < 0.1
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        predictions, memory = model(frames[0], model.start_memory(1))
    assert memory.centers_global.dtype == torch.float64
    there = shift @ torch.eye(4, dtype=torch.float64)
    expected = predictions.codes[-1][0, :, :3].double() @ there[:3, :3].mT + there[:3, 3]
    nearest = torch.cdist(memory.centers_global[0, :6], expected).amin(1)
    assert float(nearest.max()) < 1e-3


def test_the_published_model_has_no_image_queries() -> None:
    with pytest.raises(UserError, match="as_published with 8 image queries"):
        small_config("decoder.as_published=true", "decoder.num_depths=32")
