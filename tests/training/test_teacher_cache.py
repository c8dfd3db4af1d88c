# SPDX-License-Identifier: Apache-2.0
"""Cache of teacher outputs: the losses equal those of the running teacher, and damaged caches are refused."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ftkd_core.data.augmentation import Augmentation, AugmentConfig
from ftkd_core.data.clips import Clip, StreamDataset
from ftkd_core.data.windows import make_window
from ftkd_core.distillation.cache import (
    Manifest,
    TeacherCache,
    collate_outputs,
    describe,
    fill_cache,
    refuse_augmentation,
)
from ftkd_core.distillation.teacher_output import TeacherOutput
from ftkd_core.errors import UserError
from tests.core.helpers import NO_AUGMENTATION, make_clip
from tests.training.helpers import distiller_of, make_trainer, paired_data, streaming_task
from training.datasets import CachedDataset
from training.distiller import Distiller

CLIPS = [make_clip(seed=seed) for seed in range(2)]
DESCRIPTION = describe(teacher="abc", data="two clips", map_target="mean_residual", strides=[16])
RELATIONS = describe(teacher="abc", data="two clips", map_target="current", strides=[16], with_previous=True)


def make_distiller(method: str = "ftkd") -> Distiller:
    return distiller_of(streaming_task(method))


def fill(folder: Path, description: Manifest = DESCRIPTION, count: int = 2, method: str = "ftkd") -> Path:
    """Fill a cache; `loaded.txt` lists the clips for which the teacher ran."""
    loaded: list[int] = []

    def load(index: int) -> Clip:
        loaded.append(index)
        return CLIPS[index]

    fill_cache(folder, description, make_distiller(method).run_teacher_on_clip, load, count)
    (folder / "loaded.txt").write_text(str(loaded))
    return folder


def test_outputs_for_a_whole_clip_equal_those_of_single_windows() -> None:
    distiller = make_distiller("stxd")
    whole = collate_outputs(list(distiller.run_teacher_on_clip(CLIPS[0])))
    windows = [make_window(CLIPS[0], i, Augmentation(), 1, 1) for i in range(len(CLIPS[0].times))]
    single = collate_outputs([distiller.run_teacher(window) for window in windows])
    assert torch.allclose(whole.logits, single.logits, atol=1e-4)
    assert torch.allclose(whole.codes, single.codes, atol=1e-4)
    assert torch.allclose(whole.targets[16], single.targets[16], atol=1e-5)
    assert whole.previous is not None and single.previous is not None
    assert torch.equal(whole.previous.known, single.previous.known)
    assert torch.allclose(whole.previous.maps[16], single.previous.maps[16], atol=1e-5)


@pytest.mark.parametrize(("method", "description"), [("ftkd", DESCRIPTION), ("stxd", RELATIONS)])
def test_losses_from_a_cache_equal_those_of_the_running_teacher(
    tmp_path: Path, method: str, description: Manifest
) -> None:
    cache = TeacherCache(fill(tmp_path / "cache", description, method=method), description, 2)
    live = make_trainer(tmp_path / "live", streaming_task(method), 4)
    read = make_trainer(tmp_path / "read", streaming_task(method), 4)
    streams = StreamDataset(CLIPS.__getitem__, 2, num_streams=2, segment=3, augment=NO_AUGMENTATION, seed=3)
    windows, cached = paired_data(), CachedDataset(streams, cache)
    for step in range(3):
        read.task.load_state_dict(live.task.state_dict())  # float16 errors would accumulate over steps
        read.state = live.state
        live_terms, _ = live.train_step(windows[step])
        read_terms, _ = read.train_step(cached[step])
        assert live_terms.keys() == read_terms.keys()
        for name, value in live_terms.items():
            assert float(read_terms[name]) == pytest.approx(float(value), rel=2e-2, abs=1e-4), name
        live.step, read.step = step + 1, step + 1


def test_filling_that_was_killed_resumes_with_the_missing_scenes(tmp_path: Path) -> None:
    folder = fill(tmp_path / "cache", count=1)
    with pytest.raises(UserError, match="lacks 1 of 2 scenes"):
        TeacherCache(folder, DESCRIPTION, 2)
    (folder / "scene-00001.safetensors.partial").write_bytes(b"half")
    assert json.loads((fill(folder) / "loaded.txt").read_text()) == [1]
    output = TeacherCache(folder, DESCRIPTION, 2)(1, 3)
    assert output.logits.shape[1:] == (1, 16, 10) and output.targets[16].shape == (1, 6, 32, 2, 6)
    assert torch.isfinite(output.codes).all()


@pytest.mark.parametrize(
    ("name", "value"),
    [("teacher", "def"), ("data", "other clips"), ("map_target", "sum"), ("strides", [16, 32])],
)
def test_cache_of_another_teacher_or_data_set_is_refused(tmp_path: Path, name: str, value: object) -> None:
    folder = fill(tmp_path / "cache", count=1)
    other = {**DESCRIPTION, name: value}
    with pytest.raises(UserError, match=f"for {name} .* this run has"):
        TeacherCache(folder, other, 1)
    with pytest.raises(UserError, match=f"for {name} "):
        fill(folder, other)


def test_cache_may_hold_more_than_a_run_reads(tmp_path: Path) -> None:
    folder = fill(tmp_path / "cache", RELATIONS, count=1, method="stxd")
    TeacherCache(folder, {**RELATIONS, "with_previous": False}, 1)
    TeacherCache(folder, {**DESCRIPTION, "strides": []}, 1)  # reads no maps, so their target does not matter
    with pytest.raises(UserError, match="for map_target 'current'"):
        TeacherCache(folder, DESCRIPTION, 1)
    with pytest.raises(UserError, match="for with_previous False"):
        TeacherCache(fill(tmp_path / "other", count=1), {**DESCRIPTION, "with_previous": True}, 1)


def test_damaged_shards_and_manifests_are_refused(tmp_path: Path) -> None:
    folder = fill(tmp_path / "cache", count=2)
    shard = folder / "scene-00000.safetensors"
    content = bytearray(shard.read_bytes())
    content[-7] ^= 1
    shard.write_bytes(content)
    cache = TeacherCache(folder, DESCRIPTION, 2)
    with pytest.raises(UserError, match=r"scene-00000.safetensors' is damaged"):
        cache(0, 0)
    shard.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="damaged"):
        cache(0, 0)
    shard.unlink()
    with pytest.raises(UserError, match="cannot be read"):
        cache(0, 0)
    assert cache(1, 0).features.shape == (1, 16, 32)
    before = (folder / "scene-00001.safetensors").stat().st_mtime_ns
    for cut in (b"", bytes(content[: len(content) // 2])):  # a wrong size is found on opening
        shard.write_bytes(cut)
        with pytest.raises(UserError, match=rf"has {len(cut)} bytes; expected {len(content)}: .* cut off"):
            TeacherCache(folder, DESCRIPTION, 2)
        fill(folder, count=2)
        assert TeacherCache(folder, DESCRIPTION, 2)(0, 0).features.shape == (1, 16, 32)
    assert (folder / "scene-00001.safetensors").stat().st_mtime_ns == before
    (folder / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="manifest"):
        TeacherCache(folder, DESCRIPTION, 1)
    with pytest.raises(UserError, match="not found"):
        TeacherCache(tmp_path / "none", DESCRIPTION, 1)


def test_augmentation_that_changes_the_world_is_refused() -> None:
    refuse_augmentation(AugmentConfig(flip=0.0, rotation=0.0, colour=0.5, camera_dropout=0.5, grid_mask=0.7))
    with pytest.raises(UserError, match=r"augment.rotation 0.3"):
        refuse_augmentation(AugmentConfig(flip=0.0, rotation=0.3))
    with pytest.raises(UserError, match=r"augment.scale 0.05 change the world"):
        refuse_augmentation(AugmentConfig(flip=0.0, rotation=0.0, scale=0.05))
    with pytest.raises(UserError, match=r"augment.zoom \[0.9, 1.2\]"):
        refuse_augmentation(AugmentConfig(flip=0.0, rotation=0.0, zoom=(0.9, 1.2)))


def test_outputs_beyond_float16_are_refused(tmp_path: Path) -> None:
    def too_large(clip: Clip) -> Iterator[TeacherOutput]:
        for output in make_distiller().run_teacher_on_clip(clip):
            yield output._replace(features=output.features * 1e6)

    with pytest.raises(UserError, match=r"the teacher's features reach .*, beyond what the cache's float16"):
        fill_cache(tmp_path / "cache", DESCRIPTION, too_large, CLIPS.__getitem__, 1)
