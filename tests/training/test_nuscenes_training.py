# SPDX-License-Identifier: Apache-2.0
"""Training on nuScenes data: index and devkit agree, images agree with their calibration under zoom, and the
commands train teacher and student on a data set in a folder."""

import json
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from benchmarks import loader
from ftkd_core.classes import CAMERA_CHANNELS
from ftkd_core.config import ImageConfig
from ftkd_core.data.augmentation import Augmentation
from ftkd_core.data.clips import make_sample
from ftkd_core.data.nuscenes import camera_round, ground_truth, open_dataset, sample_pose, scene_names
from ftkd_core.data.nuscenes_clips import ImageFiles, NuScenesClips
from ftkd_core.data.synthetic.export import write_dataset
from ftkd_core.data.synthetic_clips import render_clip
from ftkd_core.errors import UserError
from ftkd_core.presets import preset, sparse_bev_preset
from ftkd_core.runtime.preprocess import (
    normalise,
    resize_and_crop,
    round_to_frame,
    zoom_and_crop,
    zoomed_intrinsics,
)
from training import distill
from training.train import main
from training.trainer import Trainer

IMAGE = ImageConfig(width=176, height=64)
SEEDS = (900_002, 900_005)


@pytest.fixture(scope="module")
def dataroot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(
        tmp_path_factory.mktemp("synth") / "data", SEEDS, version="v1.0-synth", split="few", width=352,
        height=198, duration_s=2.0, sweeps=False, progress=False,
    )  # fmt: skip


def clips_of(dataroot: Path, cache: Path) -> NuScenesClips:
    found = NuScenesClips(dataroot, "v1.0-synth", "few", IMAGE, CAMERA_CHANNELS, cache)
    found.prepare()
    return found


def test_index_agrees_with_the_devkit(dataroot: Path, tmp_path: Path) -> None:
    clips, dataset = clips_of(dataroot, tmp_path), open_dataset(dataroot, "v1.0-synth")
    assert len(clips) == 2
    for index, name in enumerate(scene_names(dataset)):
        clip = clips(index)
        assert clip.name == name and len(clip.times) == 4
        tokens = [s["token"] for s in dataset.sample if s["scene_token"] == dataset.scene[index]["token"]]
        for frame, token in enumerate(tokens):
            truth = ground_truth(dataset, token)
            np.testing.assert_allclose(clip.objects[frame].boxes, truth.boxes)
            np.testing.assert_array_equal(clip.objects[frame].labels, truth.labels)
            np.testing.assert_allclose(clip.global_from_ego[frame], sample_pose(dataset, token))
            sample = make_sample(clip, frame, Augmentation(), frame == 0)
            deployed = round_to_frame(
                camera_round(dataset, token), IMAGE, CAMERA_CHANNELS, time_s=0.0, is_first=True,
                device=torch.device("cpu"),
            )  # fmt: skip
            assert torch.allclose(sample.rig.intrinsics, deployed.rig.intrinsics, atol=1e-3)
            assert torch.allclose(sample.rig.ego_from_camera, deployed.rig.ego_from_camera, atol=1e-5)
            assert torch.allclose(normalise(sample.images), deployed.images, atol=1e-4)


def test_indexed_clips_equal_the_rendered_clips_of_the_same_seed(dataroot: Path, tmp_path: Path) -> None:
    """Boxes, poses and times agree."""
    real, original = clips_of(dataroot, tmp_path)(0), render_clip(SEEDS[0], IMAGE, 2.0)
    np.testing.assert_allclose(real.times, original.times - original.times[0], atol=1e-5)
    np.testing.assert_allclose(real.global_from_ego, original.global_from_ego, atol=1e-3)
    np.testing.assert_allclose(real.ego_from_camera, original.ego_from_camera, atol=1e-3)
    np.testing.assert_allclose(real.intrinsics, original.intrinsics, atol=0.5)
    indexed = real.objects[1].boxes[real.objects[1].num_points > 0]
    rendered = original.objects[1].boxes[original.objects[1].num_points > 0]
    distance = np.linalg.norm(indexed[:, None, :3] - rendered[None, :, :3], axis=-1)
    assert len(indexed) > 5 and np.median(distance.min(axis=1)) < 1e-2


def test_indexing_resumes_and_is_done_once(
    dataroot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clips = clips_of(dataroot, tmp_path)
    first, second = sorted(clips.folder.glob("scene*.npz"))
    second.unlink()
    before = first.stat().st_mtime_ns
    clips.prepare()
    assert second.exists() and first.stat().st_mtime_ns == before
    monkeypatch.setattr("ftkd_core.data.nuscenes_clips.open_dataset", lambda *_: pytest.fail("read again"))
    clips.prepare()
    other = NuScenesClips(dataroot, "v1.0-synth", "few", IMAGE, CAMERA_CHANNELS, tmp_path / "empty")
    with pytest.raises(UserError, match="holds no index of nuScenes"):
        len(other)


def test_data_sets_with_the_same_name_and_other_content_have_their_own_index(
    dataroot: Path, tmp_path: Path
) -> None:
    other = write_dataset(
        tmp_path / "other" / dataroot.name, SEEDS[1:], version="v1.0-synth", split="few", width=88, height=50,
        duration_s=1.0, sweeps=False, progress=False,
    )  # fmt: skip
    first, second = clips_of(dataroot, tmp_path), clips_of(other, tmp_path)
    assert first.name != second.name
    assert [len(first(index).times) for index in range(len(first))] == [4, 4]
    assert [len(second(index).times) for index in range(len(second))] == [2]
    assert second(0).name == first(1).name


def test_index_is_found_by_the_content_of_the_data_set(dataroot: Path, tmp_path: Path) -> None:
    def name_of(root: Path, channels: tuple[str, ...] = CAMERA_CHANNELS) -> str:
        return NuScenesClips(root, "v1.0-synth", "few", IMAGE, channels, tmp_path).name

    copy = tmp_path / dataroot.name
    shutil.copytree(dataroot / "v1.0-synth", copy / "v1.0-synth")
    assert name_of(copy) == name_of(dataroot)
    assert name_of(copy, CAMERA_CHANNELS[:3]) != name_of(dataroot)
    samples = copy / "v1.0-synth" / "sample.json"
    rows = json.loads(samples.read_text())
    samples.write_text(samples.read_text().replace(rows[0]["token"], "0" * len(rows[0]["token"])))
    assert name_of(copy) != name_of(dataroot)
    (copy / "v1.0-synth" / "scene.json").unlink()
    with pytest.raises(UserError, match=r"lacks the tables scene\.json"):
        name_of(copy)


def test_missing_image_is_named(dataroot: Path, tmp_path: Path) -> None:
    clip = clips_of(dataroot, tmp_path)(0)
    files = clip.images
    assert isinstance(files, ImageFiles) and files.shape == (4, 6, 64, 176, 3)
    lost = ImageFiles(tmp_path, files.paths, files.widths, IMAGE)
    with pytest.raises(UserError, match=r"samples/CAM_.* is missing; copy"):
        lost[0]


def test_half_decoded_images_are_close_to_fully_decoded_ones(dataroot: Path, tmp_path: Path) -> None:
    """Files are 352 pixels wide: half of that is the network's width and too little for a zoom above 1."""
    plain = clips_of(dataroot, tmp_path)
    fast = NuScenesClips(dataroot, "v1.0-synth", "few", IMAGE, CAMERA_CHANNELS, tmp_path, half_decode=True)
    assert fast.name != plain.name and fast.folder == plain.folder
    half, full = fast(0).images, plain(0).images
    assert isinstance(half, ImageFiles) and isinstance(full, ImageFiles)
    for zoom in (0.8, 1.0):
        error = np.abs(half.zoomed(1, zoom, 0.5).astype(int) - full.zoomed(1, zoom, 0.5))
        assert 0 < error.mean() < 2.0  # rendered edges are sharp; on six real images it is 0.5 to 0.7
    error = np.abs(half[1].astype(int) - full[1])
    assert 0 < error.mean() < 2.0 and half[1].shape == full[1].shape
    np.testing.assert_array_equal(half.zoomed(1, 1.25, 0.5), full.zoomed(1, 1.25, 0.5))
    with pytest.raises(UserError, match=r"samples/CAM_.* is missing; copy"):
        ImageFiles(tmp_path, half.paths, half.widths, IMAGE, half_decode=True)[0]


@pytest.mark.parametrize("zoom", [0.86, 1.0, 1.25])
@pytest.mark.parametrize("left", [0.0, 0.4, 1.0])
def test_zoomed_images_agree_with_their_intrinsics(zoom: float, left: float) -> None:
    """A dot in the camera image is where the zoomed camera matrix projects it."""
    image = np.zeros((360, 640, 3), dtype=np.uint8)
    spot = np.array([301.5, 282.5])  # pixel centres lie at .5
    cv2.circle(image, (301, 282), 5, (255, 255, 255), -1)
    config = ImageConfig(width=352, height=128)
    scale = 352 / 640
    camera = np.array([[300 * scale, 0, 320 * scale], [0, 300 * scale, 180 * scale - 70], [0, 0, 1.0]])
    ray = np.array([(spot[0] - 320) / 300, (spot[1] - 180) / 300, 1.0])
    u, v, _ = zoomed_intrinsics(camera, config, zoom, left) @ ray
    zoomed = zoom_and_crop(image, config, zoom, left)
    assert zoomed.shape == (128, 352, 3)
    rows, columns = np.nonzero(zoomed[..., 0] > 128)
    assert abs(columns.mean() + 0.5 - u) < 0.7 and abs(rows.mean() + 0.5 - v) < 0.7
    if zoom == 1.0:
        np.testing.assert_array_equal(zoomed, resize_and_crop(image, config))


def test_zoom_of_image_files_agrees_with_that_of_resized_images(dataroot: Path, tmp_path: Path) -> None:
    clip = clips_of(dataroot, tmp_path)(0)
    change = Augmentation(zoom=1.2, left=0.3)
    sharp = make_sample(clip, 1, change, True)
    assert isinstance(clip.images, ImageFiles)
    small = np.stack([clip.images[frame] for frame in range(4)])
    blurred = make_sample(type(clip)(**{**vars(clip), "images": small}), 1, change, True)
    assert torch.equal(sharp.rig.intrinsics, blurred.rig.intrinsics)
    assert (sharp.images.float() - blurred.images.float()).abs().mean() < 6
    assert torch.equal(sharp.targets.boxes.nan_to_num(), blurred.targets.boxes.nan_to_num())
    assert not torch.equal(
        sharp.targets.boxes_2d, make_sample(clip, 1, Augmentation(), True).targets.boxes_2d
    )


def test_command_trains_on_a_data_set(
    dataroot: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [
        "--preset", "tiny", "--out", str(tmp_path / "run"), "--accelerator", "cpu", "--steps", "1",
        "--streams", "1", "--set", f"data.root={dataroot}", "--set", "data.nuscenes=v1.0-synth", "--set",
        f"data.cache={tmp_path}", "--set", "data.workers=0", "--set", "augment.zoom=[0.9, 1]",
    ]  # fmt: skip
    assert main([*command, "--set", "data.split=few"]) == 0
    assert (tmp_path / "run" / "weights.safetensors").exists()
    assert main([*command, "--set", "data.split=many"]) == 2
    assert "split 'many' is neither" in capsys.readouterr().err
    assert main([*command, "--set", "augment.zoom=[0.9, 0.8]"]) == 2
    assert "zoom [0.9, 0.8]: expected the smallest scale first" in capsys.readouterr().err


def command_for(root: Path, cache: Path, out: Path, preset: str) -> list[str]:
    """Return arguments for one step of a small model on a data set, without augmentation."""
    settings = [
        f"data.root={root}", "data.nuscenes=v1.0-synth", "data.split=few", f"data.cache={cache}",
        "data.workers=0", "augment.flip=0", "augment.rotation=0", "augment.colour=0",
        "augment.camera_dropout=0", "model.image.width=96", "model.image.height=32",
        "model.backbone.base_channels=8", "model.decoder.num_image_queries=24", "model.decoder.num_layers=2",
    ]  # fmt: skip
    assigned = [part for setting in settings for part in ("--set", setting)]
    return [
        "--preset", preset, "--out", str(out), "--accelerator", "cpu", "--steps", "1", "--streams", "1",
        *assigned,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def teacher(dataroot: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the weights of a teacher after one step on the data set."""
    folder = tmp_path_factory.mktemp("teacher")
    command = command_for(dataroot, folder, folder / "run", "sparse_bev_tiny_offline")
    assert main([*command, "--set", "model.num_past=1", "--set", "model.num_future=1"]) == 0
    return folder / "run" / "weights.safetensors"


def test_student_losses_are_the_same_with_a_running_teacher_and_with_its_cache(
    dataroot: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses: list[dict[str, float]] = []
    step = Trainer.train_step

    def recorded(trainer: Trainer, batch: Any) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        terms, norm = step(trainer, batch)
        losses.append({name: float(value) for name, value in terms.items()})
        return terms, norm

    monkeypatch.setattr(Trainer, "train_step", recorded)
    for name, more in {"online": [], "cached": ["--cache", str(tmp_path / "a"), "--fill-cache"]}.items():
        command = command_for(dataroot, tmp_path, tmp_path / name, "tiny")
        assert distill.main([*command, "--teacher", str(teacher), *more]) == 0
        assert (tmp_path / name / "weights.safetensors").exists()
    online, cached = losses
    assert online.keys() == cached.keys() and online["ftkd/bev"] > 0
    for name, value in online.items():
        assert cached[name] == pytest.approx(value, rel=2e-2, abs=1e-4), name


def test_cached_features_with_a_running_teacher_are_refused(
    dataroot: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = command_for(dataroot, tmp_path, tmp_path / "run", "tiny")
    frozen = ["--set", "data.cache_features=true", "--set", "optim.backbone_ratio=0"]
    assert distill.main([*command, "--teacher", str(teacher), *frozen]) == 2
    assert "data.cache_features with a teacher that runs" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    cached = ["--cache", str(tmp_path / "answers"), "--fill-cache"]
    assert distill.main([*command, "--teacher", str(teacher), *frozen, *cached]) == 0


@pytest.mark.parametrize(("name", "frames"), [("tiny", 1), ("sparse_bev_tiny_offline", 7)])
def test_loader_benchmark_reads_the_batches_of_training(
    dataroot: Path, tmp_path: Path, name: str, frames: int
) -> None:
    model = (preset if frames == 1 else sparse_bev_preset)(name)
    clips = NuScenesClips(
        dataroot, "v1.0-synth", "few", model.image, model.channels, tmp_path, half_decode=frames == 1
    )
    found = loader.run(clips, model, streams=2, workers=[0], seconds=0.1)
    assert (found["preset"], found["frames"], found["images"]) == (name, frames, 2 * 4 * 6)
    rates = found["loader"]["0"]
    assert rates["images_per_s"] == pytest.approx(rates["batches_per_s"] * 2 * frames * 6)
    assert found["half_decode"] is (frames == 1) and min(found["stages"].values()) > 0
