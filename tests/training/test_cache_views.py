# SPDX-License-Identifier: Apache-2.0
"""The teacher cache at scale: seeded augmentations, window students, several processes, checksums."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ftkd_core.config import to_dict
from ftkd_core.data.augmentation import AugmentConfig, in_view, seeded_view
from ftkd_core.data.clips import StreamDataset
from ftkd_core.data.windows import PairedDataset, WindowDataset
from ftkd_core.distillation.cache import Manifest, TeacherCache, fill_cache, is_intact, join_shards
from ftkd_core.errors import UserError
from ftkd_core.weights import save_weights
from tests.core.helpers import make_clip
from tests.training.helpers import distiller_of, small_arguments, small_teacher, streaming_task, window_task
from training import distill
from training.datasets import CachedDataset, CachedWindows, teacher_view

CLIPS = [make_clip(seed=seed, frames=5) for seed in range(2)]
VIEWS = AugmentConfig(views=2, zoom=(0.9, 1.2), scale=0.05, colour=0.3, camera_dropout=0.0)


def fill(
    folder: Path, task: Any, augment: AugmentConfig = VIEWS, ranks: int = 1, only: int | None = None
) -> Manifest:
    """Fill a cache as each of `ranks` processes in turn, or as one of them only; return its description."""
    distiller = distiller_of(task)
    description = distiller.describe("abc", "clips", augment)
    for rank in range(ranks) if only is None else [only]:
        fill_cache(
            folder, description, lambda item: distiller.run_teacher_on_clip(*item),
            lambda number: teacher_view(CLIPS.__getitem__, 2, augment, number), 2 * max(1, augment.views),
            rank, ranks,
        )  # fmt: skip
    if ranks > 1:
        join_shards(folder, description)
    return description


def close(cached: Any, live: Any) -> None:
    for name in ("logits", "codes", "features"):
        torch.testing.assert_close(getattr(cached, name), getattr(live, name), rtol=2e-3, atol=2e-2, msg=name)
    for stride, target in live.targets.items():
        torch.testing.assert_close(cached.targets[stride], target, rtol=2e-3, atol=5e-3)


@pytest.mark.parametrize("as_published", [False, True])
def test_cached_views_equal_the_running_teacher_for_streams(tmp_path: Path, as_published: bool) -> None:
    """Each frame is augmented as in its view; colours are the student's only."""
    augment = replace(VIEWS, as_published=as_published)
    task = streaming_task()
    description = fill(tmp_path, task, augment)
    streams = StreamDataset(CLIPS.__getitem__, 2, num_streams=2, segment=3, augment=augment, seed=3)
    cached = CachedDataset(streams, TeacherCache(tmp_path, description, 4))
    live = PairedDataset(streams, 1, 1)
    views = set()
    for step in range(8):
        views |= {(c.clip_index, c.view) for c in (streams.select_frame(s, step) for s in range(2))}
        with torch.no_grad():
            close(cached[step][1], distiller_of(task).run_teacher(live[step][1]))
    assert len(views) > 2


def test_cached_views_equal_the_running_teacher_for_windows(tmp_path: Path) -> None:
    """The student's windows have no future frames, and its losses are those with a running teacher."""
    augment = replace(VIEWS, colour=0.0)
    task = window_task()
    description = fill(tmp_path, task, augment)
    settings: dict[str, Any] = {"batch": 2, "num_past": 1, "augment": augment, "seed": 3}
    short, long = (WindowDataset(CLIPS.__getitem__, 2, num_future=n, **settings) for n in (0, 1))
    cached = CachedWindows(short, TeacherCache(tmp_path, description, 4))
    for step in range(4):
        windows, output = cached[step]
        assert windows.images.shape[1] == 2
        assert torch.equal(windows.images, long[step].images[:, :2])
        with torch.no_grad():
            close(output, distiller_of(task).run_teacher(long[step]))
    task.eval()
    read, _ = task(cached[0], (), torch.Generator().manual_seed(1))
    live, _ = task(long[0], (), torch.Generator().manual_seed(1))
    assert read.keys() == live.keys()
    for name, value in live.items():
        assert float(read[name]) == pytest.approx(float(value), rel=3e-2, abs=1e-3), name


def test_a_view_does_not_depend_on_the_run() -> None:
    """Students of all seeds share a cache; colours are drawn freely."""
    first, second = (
        StreamDataset(CLIPS.__getitem__, 2, num_streams=1, segment=2, augment=VIEWS, seed=seed)
        for seed in (1, 2)
    )
    seen: dict[tuple[int, int], set[float]] = {}
    gains = set()
    for data in (first, second):
        for step in range(0, 60, 2):
            chosen = data.select_frame(0, step)
            seen.setdefault((chosen.clip_index, chosen.view), set()).add(chosen.augmentation.angle)
            gains.add(chosen.augmentation.gain)
    assert sorted(seen) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert all(len(angles) == 1 for angles in seen.values())
    assert len({angle for angles in seen.values() for angle in angles}) == 4
    assert len(gains) > 10
    plain = seeded_view(VIEWS, 1, 1)
    assert in_view(plain._replace(offset=3.0, zoom=9.0), VIEWS, 1, 1) == plain._replace(offset=3.0)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_processes_share_the_work_and_write_the_same_files(tmp_path: Path) -> None:
    task = streaming_task()
    description = fill(tmp_path / "one", task)
    fill(tmp_path / "three", task, ranks=3)
    one, three = contents(tmp_path / "one"), contents(tmp_path / "three")
    assert one.keys() == three.keys() and len(one) == 5
    assert json.loads(one.pop("manifest.json")) == json.loads(three.pop("manifest.json"))
    assert one == three
    TeacherCache(tmp_path / "three", description, 4)


def test_work_of_a_process_that_was_stopped_is_kept(tmp_path: Path) -> None:
    """A shard without an entry in the manifest is not computed again, also by another number of processes."""
    task = streaming_task()
    folder = tmp_path / "cache"
    distiller = distiller_of(task)
    description = distiller.describe("abc", "clips", VIEWS)
    numbers: list[int] = []

    def load(number: int) -> Any:
        numbers.append(number)
        return teacher_view(CLIPS.__getitem__, 2, VIEWS, number)

    for rank, ranks, count in ((1, 2, 4), (0, 1, 4)):
        fill_cache(
            folder, description, lambda item: distiller.run_teacher_on_clip(*item), load, count, rank, ranks
        )
    assert numbers == [1, 3, 0, 2]
    assert not list(folder.glob("*.json.partial")) and len(list(folder.glob("*.json"))) == 1


def test_a_shard_with_other_content_is_written_again(tmp_path: Path) -> None:
    """Same size, one byte changed."""
    task = streaming_task()
    fill(tmp_path, task)
    shard = tmp_path / "scene-00002.safetensors"
    good = shard.read_bytes()
    shard.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    entry = json.loads((tmp_path / "manifest.json").read_text())["shards"]["2"]
    assert not is_intact(tmp_path, entry)
    fill(tmp_path, task)
    assert shard.read_bytes() == good and is_intact(tmp_path, entry)


def test_caches_of_other_views_are_refused(tmp_path: Path) -> None:
    task = streaming_task()
    fill(tmp_path, task)
    for augment in (replace(VIEWS, views=3), replace(VIEWS, rotation=0.1), AugmentConfig(flip=0, rotation=0)):
        description = distiller_of(task).describe("abc", "clips", augment)
        if augment.views:
            with pytest.raises(UserError, match="was written for views"):
                TeacherCache(tmp_path, description, 1)
        else:
            with pytest.raises(UserError, match="has views of augmentations, but this run has none"):
                TeacherCache(tmp_path, description, 1)


@pytest.mark.parametrize("student", ["tiny", "sparse_bev_tiny"])
def test_command_trains_both_students_from_a_cache_of_views(tmp_path: Path, student: str) -> None:
    more = ["model.channels=[CAM_FRONT, CAM_BACK]"]
    if student != "tiny":
        more.append("model.num_past=1")
    arguments = small_arguments(tmp_path / "run", 2, "augment.views=2", "augment.camera_dropout=0", *more)
    teacher = small_teacher()
    config = replace(teacher.config, channels=("CAM_FRONT", "CAM_BACK"))
    save_weights(tmp_path / "teacher.safetensors", teacher.state_dict(), config, half=False)
    command = [*arguments, "--preset", student, "--teacher", str(tmp_path / "teacher.safetensors")]
    cache = ["--cache", str(tmp_path / "cache")]
    assert distill.main([*command, *cache, "--fill-cache"]) == 0
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 2
    manifest = json.loads((tmp_path / "cache" / "manifest.json").read_text())
    assert manifest["views"]["count"] == 2 and to_dict(AugmentConfig())["views"] == 0
