# SPDX-License-Identifier: Apache-2.0
"""Features of a frozen backbone on disk: what is trained on them is what is trained on the images."""

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
from tests.core.helpers import make_clip, small_config, small_model
from tests.core.test_sparse_bev import small_sparse
from training import train
from training.config import DataConfig, TrainConfig
from training.feature_cache import KeptFeatures, keep_features, pack_maps, refuse_images, unpack_maps
from training.study.experiments import main as experiments
from training.study.predicting import detect_clip
from training.tasks import StreamLesson, WindowLesson
from training.teacher_inference import view_clip
from training.trainer import OptimConfig

CPU = torch.device("cpu")
TURNED = AugmentConfig(flip=0.0, rotation=0.3, colour=0.0, camera_dropout=0.5)


class TwoClips:
    """Two small clips, as training draws them."""

    name = "two clips"

    def __init__(self) -> None:
        self.clips = [make_clip(seed=seed) for seed in range(2)]

    def __call__(self, index: int) -> object:
        return self.clips[index]


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 3))
def test_packing_loses_nothing(batch: int, height: int, width: int, quarter: int) -> None:
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
    """The losses agree within the half precision that features are kept in, and are losses."""
    assert first.keys() == second.keys()
    assert sum(first.values()) > 0.1
    for name, value in first.items():
        assert torch.allclose(value, second[name], rtol=1e-2, atol=1e-3), name


def frozen(model: StreamPETR | SparseBEV) -> None:
    model.train()
    model.backbone.eval().requires_grad_(False)


def test_a_streaming_step_is_that_of_the_images(tmp_path: Path) -> None:
    """In a turned world, with cameras missing, and gradients into the neck."""
    losses, gradients = [], []
    for keep in (False, True):
        model, clips = student(), TwoClips()
        kept = keep_features(model, clips, tmp_path, 2, CPU) if keep else clips
        frozen(model)
        lesson = StreamLesson(model, 2)
        data = StreamDataset(kept, 2, num_streams=2, segment=3, augment=TURNED, seed=3)
        state, generator = lesson.start_state(), torch.Generator().manual_seed(0)
        assert data[0].images.is_floating_point() == keep
        terms, _ = lesson(data[0], state, generator)
        sum(terms.values()).backward()  # type: ignore[union-attr]
        losses.append({name: value.detach() for name, value in terms.items()})
        gradients.append(model.neck.lateral[0].weight.grad)
    assert_close(*losses)
    assert gradients[0].abs().max() > 0
    assert torch.nn.functional.cosine_similarity(*(g.flatten() for g in gradients), dim=0) > 0.99


def test_a_step_of_windows_is_that_of_the_images(tmp_path: Path) -> None:
    losses = []
    for keep in (False, True):
        model, clips = small_sparse(past=1, future=1, image_queries=8), TwoClips()
        kept = keep_features(model, clips, tmp_path, 2, CPU) if keep else clips
        frozen(model)
        data = WindowDataset(kept, 2, batch=2, num_past=1, num_future=1, augment=TURNED, seed=3)
        assert data[0].images.is_floating_point() == keep
        with torch.no_grad():
            terms, _ = WindowLesson(model)(data[0], (), torch.Generator().manual_seed(0))
        losses.append(terms)
    assert_close(*losses)


def test_a_whole_clip_looks_the_same(tmp_path: Path) -> None:
    clips = TwoClips()
    plain = next(view_clip(small_sparse(past=1, future=1), clips(0)))
    model = small_sparse(past=1, future=1)
    kept = keep_features(model, clips, tmp_path, 1, CPU)
    found = next(view_clip(model.eval(), kept(0)))
    for mine, theirs in zip(found.pyramid, plain.pyramid, strict=True):
        assert torch.allclose(mine, theirs, atol=5e-3)
    assert torch.allclose(found.predictions.logits, plain.predictions.logits, atol=5e-2)


@pytest.mark.parametrize("make", [small_model, lambda: small_sparse(past=1, future=1)])
def test_detections_are_those_of_the_images(
    make: Callable[[], StreamPETR | SparseBEV], tmp_path: Path
) -> None:
    clips = TwoClips()
    plain = detect_clip(make(), clips(0), CPU)
    model = make()
    found = detect_clip(model, keep_features(model, clips, tmp_path, 1, CPU)(0), CPU)
    for mine, theirs in zip(found, plain, strict=True):
        assert torch.allclose(mine.scores, theirs.scores, atol=2e-3)
    assert torch.allclose(found[0].boxes[0, 0], plain[0].boxes[0, 0], atol=5e-2)


def test_the_targets_are_those_of_the_images(tmp_path: Path) -> None:
    clips = TwoClips()
    kept = keep_features(student(), clips, tmp_path, 1, CPU)
    change = Augmentation(angle=0.2)
    mine, theirs = make_sample(kept(0), 1, change, True, 2), make_sample(clips(0), 1, change, True, 2)
    for name, value in theirs.targets._asdict().items():
        assert torch.equal(getattr(mine.targets, name), value), name
    absent = torch.from_numpy(np.array(kept(0).blank))
    assert torch.equal(mine.images[0, 2], absent) and not torch.equal(mine.images[0, 1], absent)


def test_each_backbone_and_source_has_its_own_and_what_is_there_is_kept(tmp_path: Path) -> None:
    clips, model = TwoClips(), student()
    image = model.config.image
    first = KeptFeatures(clips, model.backbone, image, tmp_path)
    first.fill(model.backbone, 2, CPU)
    written = first.file(0).stat().st_mtime_ns
    first.file(1).unlink()
    first.fill(model.backbone, 2, CPU)
    assert first.file(0).stat().st_mtime_ns == written and first.file(1).is_file()
    with torch.no_grad():
        model.backbone.bn1.running_mean += 1
    second = KeptFeatures(clips, model.backbone, image, tmp_path)
    clips.name = "other clips"
    third = KeptFeatures(clips, model.backbone, image, tmp_path)
    fourth = KeptFeatures(clips, model.backbone, replace(image, mean=(0.0, 0.0, 0.0)), tmp_path)
    assert len({first.folder, second.folder, third.folder, fourth.folder}) == 4


def test_another_process_extracts_what_this_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 1)  # on all cores, else
    clips, backbone = TwoClips(), student().backbone
    clips.clips *= 2
    image = small_config().image
    kept = KeptFeatures(clips, backbone, image, tmp_path)
    kept.fill(backbone, 4, CPU)
    alone = KeptFeatures(clips, backbone, image, tmp_path / "alone")
    alone.fill(backbone, 2, CPU)
    assert np.array_equal(np.load(kept.file(3)), np.load(alone.file(1)))


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    model = student()
    kept = keep_features(model, TwoClips(), tmp_path, 1, CPU)
    kept.file(0).write_bytes(kept.file(0).read_bytes()[:200])
    with pytest.raises(UserError, match=r"000000\.npy.*delete the file"):
        kept(0)


def test_what_would_change_the_images_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    refuse_images(TURNED, 0.0)
    with pytest.raises(
        UserError, match=r"augment\.flip, augment\.colour, optim\.backbone_ratio would change"
    ):
        refuse_images(AugmentConfig(), 1.0)
    with pytest.raises(UserError, match=r"neck reads stride 4"):
        keep_features(small_sparse("decoder.levels=4"), TwoClips(), tmp_path, 0, CPU)
    with pytest.raises(UserError, match="images of 96x48: expected multiples of 32"):
        keep_features(build_stream_petr(small_config("image.height=48")), TwoClips(), tmp_path, 0, CPU)
    assert experiments(["--out", str(tmp_path / "matrix"), "--keep-features"]) == 2
    assert "give --init and --backbone-ratio 0" in capsys.readouterr().err


def test_a_run_reads_them_and_writes_a_whole_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line: the weights file fits a model that takes images, with the backbone it began with."""
    clips = TwoClips()
    monkeypatch.setattr(train, "open_clips", lambda config, fabric: (clips, 2))
    config = TrainConfig(
        model=small_config(), steps=2, streams=2, save_every=2, augment=TURNED,
        data=DataConfig(cache_features=True, cache=str(tmp_path / "clips"), workers=0),
        optim=OptimConfig(backbone_ratio=0.0),
    )  # fmt: skip
    fabric = train.Fabric(accelerator="cpu", devices=1)
    weights = train.run(config, fabric, tmp_path / "run", None)
    torch.manual_seed(config.seed)
    model = build_stream_petr(config.model)
    train.start_from(weights, model, config.model)
    assert type(model.backbone) is ResNet
    kept = KeptFeatures(clips, model.backbone, config.model.image, tmp_path / "clips")
    assert kept.folder.parent.is_dir()
    assert next(iter(model.backbone.state_dict().values())).isfinite().all()
