# SPDX-License-Identifier: Apache-2.0
"""One teacher with and without its future: at inference and in the cache."""

from pathlib import Path

import pytest
import torch

from ftkd_core.config import override
from ftkd_core.data.augmentation import Augmentation
from ftkd_core.data.clips import Clip
from ftkd_core.data.windows import hide_future, make_window
from ftkd_core.distillation.cache import TeacherCache, describe, fill_cache
from ftkd_core.distillation.config import FTKDConfig
from ftkd_core.errors import UserError
from ftkd_core.models.sparse_bev import SparseBEV, build_sparse_bev
from ftkd_core.presets import sparse_bev_preset
from ftkd_core.runtime.preprocess import normalise
from tests.core.helpers import make_clip, small_model
from training.distiller import Distiller, make_distiller
from training.teacher_inference import infer_clip

SMALL = (
    "image.width=96", "image.height=32", "backbone.base_channels=8", "decoder.channels=32",
    "decoder.num_heads=2", "decoder.num_layers=2", "decoder.ffn_channels=32", "decoder.num_queries=16",
    "num_past=1", "num_future=2",
)  # fmt: skip


@pytest.fixture
def teacher() -> SparseBEV:
    torch.manual_seed(0)
    return build_sparse_bev(override(sparse_bev_preset("sparse_bev_small_offline"), SMALL)).eval()


def distiller(teacher: SparseBEV, *, blind: bool) -> Distiller:
    return make_distiller(teacher, small_model(), FTKDConfig(), hide_future=blind)


def test_a_whole_clip_without_future_equals_its_windows_without_future(teacher: SparseBEV) -> None:
    clip = make_clip(frames=5)
    seen = [output.predictions.codes[-1] for output in infer_clip(teacher, clip)]
    blind = [output.predictions.codes[-1] for output in infer_clip(teacher, clip, hide_future=True)]
    alone = [
        teacher(hide_future(make_window(clip, index, Augmentation(), 1, 2), 1).window(images))[0].codes[-1]
        for index in range(5)
        for images in [network_images(teacher, clip, index)]
    ]
    torch.testing.assert_close(torch.cat(blind), torch.cat(alone), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(torch.cat(seen)[:3], torch.cat(blind)[:3], atol=1e-3)


def network_images(teacher: SparseBEV, clip: Clip, index: int) -> torch.Tensor:
    window = hide_future(make_window(clip, index, Augmentation(), 1, 2), 1)
    return normalise(window.images)


def test_the_future_changes_nothing_for_a_blind_teacher(teacher: SparseBEV) -> None:
    blind = distiller(teacher, blind=True)
    batch = make_window(make_clip(frames=5), 1, Augmentation(), 1, 2)
    changed = batch._replace(images=batch.images.clone())
    changed.images[:, 2:] = 255 - changed.images[:, 2:]
    assert torch.equal(blind.run_teacher(batch).logits, blind.run_teacher(changed).logits)
    seeing = distiller(teacher, blind=False)
    assert not torch.equal(seeing.run_teacher(batch).logits, seeing.run_teacher(changed).logits)


def test_caches_with_and_without_future_are_not_confused(teacher: SparseBEV, tmp_path: Path) -> None:
    clip = make_clip(frames=3)
    seeing, blind = (distiller(teacher, blind=value) for value in (False, True))
    assert "hide_future" not in seeing.describe("t", "d")
    assert blind.describe("t", "d") == seeing.describe("t", "d") | {"hide_future": True}
    fill_cache(tmp_path, blind.describe("t", "d"), blind.run_teacher_on_clip, lambda _: clip, 1)
    TeacherCache(tmp_path, blind.describe("t", "d"), 1)
    with pytest.raises(UserError, match="was written without future frames"):
        TeacherCache(tmp_path, seeing.describe("t", "d"), 1)
    assert describe(teacher="t", data="d", map_target="x", strides=[16]) == describe(
        teacher="t", data="d", map_target="x", strides=[16], hide_future=False
    )
