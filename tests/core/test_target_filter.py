# SPDX-License-Identifier: Apache-2.0
"""Filtering of targets: range and class order of the model."""

from dataclasses import replace

import pytest
import torch

from ftkd_core.classes import CLASS_NAMES
from ftkd_core.config import DetectorConfig, SparseBEVConfig
from ftkd_core.data.augmentation import Augmentation
from ftkd_core.data.clips import make_sample
from ftkd_core.errors import UserError
from ftkd_core.losses.target_filter import filter_targets, in_range
from ftkd_core.models.denoising import make_denoising
from ftkd_core.presets import preset, sparse_bev_preset
from ftkd_core.types import Targets
from ftkd_core.weights.importing.sparse_bev import sparse_bev_config
from ftkd_core.weights.importing.stream_petr import POINT_RANGE_M, stream_petr_config
from tests.core.helpers import make_clip, small_config

Config = DetectorConfig | SparseBEVConfig


def objects_at(*places: tuple[float, float]) -> Targets:
    """Return targets of one frame with a car at each position, visible in two cameras."""
    count, real = len(places), torch.ones(1, len(places), dtype=torch.bool)
    boxes = torch.tensor([[x, y, 1.0, 4.0, 2.0, 1.5, 0.0, 0.0, 0.0] for x, y in places])[None]
    return Targets(
        boxes=boxes, labels=torch.zeros(1, count, dtype=torch.long), mask=real,
        boxes_2d=torch.zeros(1, 2, count, 4), centers_2d=torch.zeros(1, 2, count, 2),
        depths=torch.ones(1, 2, count), mask_2d=real.expand(2, -1)[None],
    )  # fmt: skip


@pytest.mark.parametrize(
    "config",
    [
        sparse_bev_preset("sparse_bev_r50_704x256"),
        sparse_bev_preset("sparse_bev_r101_704x256_offline"),
        small_config(f"decoder.point_range_m={list(POINT_RANGE_M)}", image_queries=0),
    ],
)
def test_objects_beyond_the_range_of_a_model_are_removed(config: Config) -> None:
    places = [(51.1, 0.0), (51.3, 0.0), (-51.3, 3.0), (0.0, -51.3), (-51.1, 51.1), (60.0, 60.0)]
    expected = [True, False, False, False, True, False]
    targets = objects_at(*places)
    found = in_range(targets, config)
    assert found.mask[0].tolist() == expected
    assert found.mask_2d[0].tolist() == [expected, expected]
    noise = make_denoising(
        filter_targets(targets, config), config.loss, torch.ones(3) * 61.2, torch.Generator()
    )
    assert noise is not None
    groups = config.loss.denoising_groups
    assert noise.real[0].tolist() == expected * groups
    assert not noise.positive[~noise.real].any()
    assert targets.mask.all() and targets.mask_2d.all()


@pytest.mark.parametrize(
    "config",
    [
        *map(preset, ("tiny", "r18_352x128", "r50_704x256_900q")),
        *map(sparse_bev_preset, ("sparse_bev_tiny", "sparse_bev_tiny_offline", "sparse_bev_r18_352x128")),
    ],
)
def test_models_with_a_range_of_61_metres_keep_all_objects_of_datasets(config: Config) -> None:
    clip = make_clip(objects=40)
    boxes = clip.objects[0].boxes
    boxes[:, :2] *= 3.0
    boxes[0, :2] = 61.1999999, -61.1999999  # rounded up in float32
    targets = make_sample(clip, 0, Augmentation(), True).targets
    assert float(targets.boxes[..., :2].abs().max()) > 61.19999
    assert int((targets.boxes[..., :2].abs().amax(-1) > 51.2).sum()) > 4
    assert all(map(torch.equal, filter_targets(targets, config), targets))


@pytest.mark.parametrize(
    "config", [stream_petr_config("r50_704x256_428q", CLASS_NAMES), sparse_bev_config(CLASS_NAMES)]
)
def test_the_range_refers_to_the_frame_of_the_model(config: Config) -> None:
    """The lidar of the public models is 0.94 m ahead of ego's origin."""
    targets = objects_at((51.9, 0.0), (52.5, 0.0), (-50.1, 0.0), (-50.9, 0.0), (0.0, 50.9), (0.0, -52.0))
    with torch.autocast("cpu", torch.bfloat16):
        found = in_range(targets, config)
    assert found.mask[0].tolist() == [True, False, True, False, True, False]


def test_labels_become_indices_into_the_class_names_of_the_model() -> None:
    order = (*CLASS_NAMES[3:], *CLASS_NAMES[:3])
    config = replace(preset("tiny"), class_names=order)
    targets = objects_at(*[(float(place), 0.0) for place in range(10)])
    targets = targets._replace(labels=torch.arange(10)[None])
    found = filter_targets(targets, config)
    assert [order[label] for label in found.labels[0].tolist()] == list(CLASS_NAMES)
    noise = make_denoising(found, config.loss, torch.ones(3) * 61.2, torch.Generator().manual_seed(0))
    assert noise is not None
    assert int((noise.labels == found.labels).sum()) >= 4  # half are kept
    with pytest.raises(UserError, match="class_names .*'tree'.*: training expects"):
        filter_targets(targets, replace(config, class_names=("tree", *CLASS_NAMES[1:])))
