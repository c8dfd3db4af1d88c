# SPDX-License-Identifier: Apache-2.0
"""Data sets of a run as its configuration asks for them."""

from dataclasses import replace
from pathlib import Path

import pytest

from ftkd_core.data.clips import Clip
from ftkd_core.errors import UserError
from ftkd_core.presets import preset, sparse_bev_preset
from tests.core.helpers import make_clip
from tests.training.helpers import cpu_fabric
from training.config import DataConfig, TrainConfig, WindowTrainConfig
from training.datasets import make_streams, make_windows, open_clips
from training.train import TrainOptions, resolve_config


class Scenes:
    """Three scenes of 7, 8 and 9 frames."""

    name = "three scenes"

    def __call__(self, index: int) -> Clip:
        return make_clip(frames=7 + index, seed=index)


FABRIC = cpu_fabric()


def test_segments_are_drawn_at_random_or_in_epochs() -> None:
    config = TrainConfig(model=preset("tiny"), data=DataConfig(segment=4), seed=3, streams=2)
    assert make_streams(config, Scenes(), 3, FABRIC).order is None
    config = replace(config, data=replace(config.data, order="epochs"))
    order = make_streams(config, Scenes(), 3, FABRIC).order
    assert order is not None
    assert (order.lengths, order.segment, order.seed, order.segments_per_epoch) == ((7, 8, 9), 4, 3, 6)


def test_epochs_count_frames_for_window_models_and_windows_for_streaming_models() -> None:
    data = DataConfig(order="epochs")
    config = WindowTrainConfig(model=sparse_bev_preset("sparse_bev_tiny"), data=data)
    windows = make_windows(config, Scenes(), 3, FABRIC, None)
    assert windows.order is not None and windows.ranks == 1
    assert windows.order.segments_per_epoch == 24
    student = TrainConfig(model=preset("tiny"), data=replace(data, window=3))
    sliding = make_streams(student, Scenes(), 3, FABRIC)
    assert sliding.order is not None and sliding.order.segment == 3


def test_unknown_order_is_refused() -> None:
    with pytest.raises(UserError, match="data.order is 'shuffled'; expected 'random' or 'epochs'"):
        resolve_config(TrainOptions(out=Path("x"), overrides=["data.order=shuffled"]))


def test_rig_of_the_synthetic_world_is_checked_before_anything_is_rendered(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="rig 'van': expected one of nuscenes, .*, varied"):
        resolve_config(TrainOptions(out=Path("x"), overrides=["data.rig=van"]))
    data = DataConfig(root=str(tmp_path), rig="varied")
    with pytest.raises(UserError, match=r"data.rig 'varied' with data.root: a data set has its own cameras"):
        open_clips(TrainConfig(model=preset("tiny"), data=data), FABRIC)
