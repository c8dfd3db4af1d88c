# SPDX-License-Identifier: Apache-2.0
"""Feature cache: training and inference on cached features equal those on images."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ftkd_core.data.augmentation import Augmentation, AugmentConfig
from ftkd_core.data.clips import StreamDataset, make_sample
from ftkd_core.data.windows import WindowDataset
from ftkd_core.errors import UserError
from ftkd_core.models.build import build_stream_petr
from ftkd_core.models.resnet import ResNet
from ftkd_core.models.sparse_bev import SparseBEV
from ftkd_core.models.stream_petr import StreamPETR
from tests.core.helpers import make_clip, small_config, small_model, small_sparse
from tests.training.helpers import cpu_fabric, small_teacher
from training import train
from training.config import DataConfig, OptimConfig, TrainConfig
from training.feature_cache import (
    FeatureCache,
    cache_features,
    pack_maps,
    refuse_image_augmentation,
    unpack_maps,
)
from training.study.experiments import main as experiments
from training.study.predicting import detect_clip
from training.tasks import StreamingTask, WindowTask
from training.teacher_inference import infer_clip

CPU = torch.device("cpu")
ROTATED = AugmentConfig(flip=0.0, rotation=0.3, colour=0.0, camera_dropout=0.5)


class TwoClips:
    """A clip source of two small clips."""

    name = "two clips"

    def __init__(self) -> None:
        self.clips = [make_clip(seed=seed) for seed in range(2)]

    def __call__(self, index: int) -> object:
        return self.clips[index]


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 3))
def test_packing_is_invertible(batch: int, height: int, width: int, quarter: int) -> None:
    generator = torch.Generator().manual_seed(0)
    widths = (3, 5, 6, 4 * quarter)
    sizes = [(8 * height, 8 * width), (4 * height, 4 * width), (2 * height, 2 * width), (height, width)]
    maps = tuple(
        torch.randn(batch, c, *size, generator=generator) for c, size in zip(widths, sizes, strict=True)
    )
    back = unpack_maps(pack_maps(maps), widths)
    assert all(torch.equal(a, b) for a, b in zip(back[1:], maps[1:], strict=True))
    assert back[0].shape == (batch, 0, *sizes[1])


def student() -> StreamPETR:
    torch.manual_seed(0)
    return build_stream_petr(small_config())


def assert_close(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    """Assert that losses agree within the float16 precision of cached features, and are not all 0."""
    assert first.keys() == second.keys()
    assert sum(first.values()) > 0.1
    for name, value in first.items():
        assert torch.allclose(value, second[name], rtol=1e-2, atol=1e-3), name


def freeze_backbone(model: StreamPETR | SparseBEV) -> None:
    model.train()
    model.backbone.eval().requires_grad_(False)


def test_streaming_step_equals_that_on_images(tmp_path: Path) -> None:
    """With a rotated world, dropped cameras, and gradients of the neck."""
    losses, gradients = [], []
    for cached in (False, True):
        model, clips = student(), TwoClips()
        source = cache_features(model, clips, tmp_path, 2, CPU) if cached else clips
        freeze_backbone(model)
        task = StreamingTask(model, 2)
        data = StreamDataset(source, 2, num_streams=2, segment=3, augment=ROTATED, seed=3)
        state, generator = task.start_state(), torch.Generator().manual_seed(0)
        assert data[0].images.is_floating_point() == cached
        terms, _ = task(data[0], state, generator)
        sum(terms.values()).backward()  # type: ignore[union-attr]
        losses.append({name: value.detach() for name, value in terms.items()})
        gradients.append(model.neck.lateral[0].weight.grad)
    assert_close(*losses)
    assert gradients[0].abs().max() > 0
    assert torch.nn.functional.cosine_similarity(*(g.flatten() for g in gradients), dim=0) > 0.99


def test_window_step_equals_that_on_images(tmp_path: Path) -> None:
    losses = []
    for cached in (False, True):
        model, clips = small_sparse(past=1, future=1, image_queries=8), TwoClips()
        source = cache_features(model, clips, tmp_path, 2, CPU) if cached else clips
        freeze_backbone(model)
        data = WindowDataset(source, 2, batch=2, num_past=1, num_future=1, augment=ROTATED, seed=3)
        assert data[0].images.is_floating_point() == cached
        with torch.no_grad():
            terms, _ = WindowTask(model)(data[0], (), torch.Generator().manual_seed(0))
        losses.append(terms)
    assert_close(*losses)


def test_teacher_inference_equals_that_on_images(tmp_path: Path) -> None:
    clips = TwoClips()
    plain = next(infer_clip(small_teacher(), clips(0)))
    model = small_teacher()
    cached = cache_features(model, clips, tmp_path, 1, CPU)
    found = next(infer_clip(model.eval(), cached(0)))
    for level, expected in zip(found.pyramid, plain.pyramid, strict=True):
        assert torch.allclose(level, expected, atol=5e-3)
    assert torch.allclose(found.predictions.logits, plain.predictions.logits, atol=5e-2)


@pytest.mark.parametrize("make", [small_model, small_teacher])
def test_detections_equal_those_on_images(make: Callable[[], StreamPETR | SparseBEV], tmp_path: Path) -> None:
    clips = TwoClips()
    plain = detect_clip(make(), clips(0), CPU)
    model = make()
    found = detect_clip(model, cache_features(model, clips, tmp_path, 1, CPU)(0), CPU)
    for cached, expected in zip(found, plain, strict=True):
        assert torch.allclose(cached.scores, expected.scores, atol=2e-3)
    assert torch.allclose(found[0].boxes[0, 0], plain[0].boxes[0, 0], atol=5e-2)


def test_targets_equal_those_on_images(tmp_path: Path) -> None:
    clips = TwoClips()
    cached = cache_features(student(), clips, tmp_path, 1, CPU)
    change = Augmentation(angle=0.2)
    sample, expected = make_sample(cached(0), 1, change, True, 2), make_sample(clips(0), 1, change, True, 2)
    for name, value in expected.targets._asdict().items():
        assert torch.equal(getattr(sample.targets, name), value), name
    blank = torch.from_numpy(np.array(cached(0).blank))
    assert torch.equal(sample.images[0, 2], blank) and not torch.equal(sample.images[0, 1], blank)


def test_each_backbone_and_source_has_its_own_folder_and_files_are_written_once(tmp_path: Path) -> None:
    clips, model = TwoClips(), student()
    image = model.config.image
    first = FeatureCache(clips, model.backbone, image, tmp_path)
    first.fill(model.backbone, 2, CPU)
    written = first.file(0).stat().st_mtime_ns
    first.file(1).unlink()
    first.fill(model.backbone, 2, CPU)
    assert first.file(0).stat().st_mtime_ns == written and first.file(1).is_file()
    with torch.no_grad():
        model.backbone.bn1.running_mean += 1
    second = FeatureCache(clips, model.backbone, image, tmp_path)
    clips.name = "other clips"
    third = FeatureCache(clips, model.backbone, image, tmp_path)
    fourth = FeatureCache(clips, model.backbone, replace(image, height=image.height + 16), tmp_path)
    assert len({first.folder, second.folder, third.folder, fourth.folder}) == 4


def test_worker_process_extracts_the_same_features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 1)  # the default is all cores
    clips, backbone = TwoClips(), student().backbone
    clips.clips *= 2
    image = small_config().image
    pooled = FeatureCache(clips, backbone, image, tmp_path)
    pooled.fill(backbone, 4, CPU)
    local = FeatureCache(clips, backbone, image, tmp_path / "local")
    local.fill(backbone, 2, CPU)
    assert np.array_equal(np.load(pooled.file(3)), np.load(local.file(1)))


def test_damaged_file_is_named(tmp_path: Path) -> None:
    model = student()
    cached = cache_features(model, TwoClips(), tmp_path, 1, CPU)
    cached.file(0).write_bytes(cached.file(0).read_bytes()[:200])
    with pytest.raises(UserError, match=r"000000\.npy.*delete the file"):
        cached(0)


def test_settings_that_change_images_or_backbone_are_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    refuse_image_augmentation(ROTATED, 0.0)
    with pytest.raises(
        UserError, match=r"augment\.flip, augment\.colour, optim\.backbone_ratio would change"
    ):
        refuse_image_augmentation(AugmentConfig(), 1.0)
    with pytest.raises(UserError, match=r"neck reads stride 4"):
        cache_features(small_sparse("decoder.levels=4"), TwoClips(), tmp_path, 0, CPU)
    with pytest.raises(UserError, match="images of 96x48: expected multiples of 32"):
        cache_features(build_stream_petr(small_config("image.height=48")), TwoClips(), tmp_path, 0, CPU)
    assert experiments(["--out", str(tmp_path / "matrix"), "--cache-features"]) == 2
    assert "give --init and --backbone-ratio 0" in capsys.readouterr().err


def test_run_with_cached_features_writes_a_complete_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights file loads into a model that takes images, and its backbone is that of the start."""
    clips = TwoClips()
    monkeypatch.setattr(train, "open_clips", lambda config, fabric: (clips, 2))
    config = TrainConfig(
        model=small_config(), steps=2, streams=2, save_every=2, augment=ROTATED,
        data=DataConfig(cache_features=True, cache=str(tmp_path / "clips"), workers=0),
        optim=OptimConfig(backbone_ratio=0.0),
    )  # fmt: skip
    weights = train.run_training(config, cpu_fabric(), tmp_path / "run", None)
    torch.manual_seed(config.seed)
    model = build_stream_petr(config.model)
    train.start_from(weights, model, config.model)
    assert type(model.backbone) is ResNet
    assert len(list((tmp_path / "clips").glob("features-*/00000[01].npy"))) == 2
    assert next(iter(model.backbone.state_dict().values())).isfinite().all()
