# SPDX-License-Identifier: Apache-2.0
"""What the settings of a run choose to be served."""

from dataclasses import replace

import pytest
from lightning_fabric import Fabric

from ftkd_core.data.clips import Clip, StreamDataset
from ftkd_core.data.windows import PairedDataset, WindowDataset
from ftkd_core.errors import UserError
from ftkd_core.presets import preset, sparse_bev_preset
from tests.core.helpers import make_clip
from training.config import DataConfig, TrainConfig, WindowTrainConfig
from training.datasets import make_dataset
from training.train import make_parser, resolve


class Scenes:
    """Three scenes of 7, 8 and 9 frames."""

    name = "three scenes"

    def __call__(self, index: int) -> Clip:
        return make_clip(frames=7 + index, seed=index)


FABRIC = Fabric(accelerator="cpu", devices=1)


def test_frames_are_drawn_at_random_unless_epochs_are_asked_for() -> None:
    config = TrainConfig(model=preset("tiny"), data=DataConfig(segment=4), seed=3, streams=2)
    drawn = make_dataset(config, Scenes(), 3, FABRIC, None)
    assert isinstance(drawn, StreamDataset) and drawn.order is None
    config = replace(config, data=replace(config.data, order="epochs"))
    paired = make_dataset(config, Scenes(), 3, FABRIC, sparse_bev_preset("sparse_bev_tiny_offline"))
    assert isinstance(paired, PairedDataset) and paired.streams.order is not None
    order = paired.streams.order
    assert (order.lengths, order.segment, order.seed, order.segments_an_epoch) == ((7, 8, 9), 4, 3, 6)


def test_windows_of_epochs_are_of_single_frames_and_streams_of_windows_of_theirs() -> None:
    data = DataConfig(order="epochs")
    config = WindowTrainConfig(model=sparse_bev_preset("sparse_bev_tiny"), data=data)
    windows = make_dataset(config, Scenes(), 3, FABRIC, None)
    assert isinstance(windows, WindowDataset) and windows.order is not None and windows.ranks == 1
    assert windows.order.segments_an_epoch == 24
    student = TrainConfig(model=preset("tiny"), data=replace(data, window=3))
    sliding = make_dataset(student, Scenes(), 3, FABRIC, None)
    assert isinstance(sliding, StreamDataset) and sliding.order is not None and sliding.order.segment == 3


def test_another_order_is_refused() -> None:
    arguments = make_parser().parse_args(["--out", "x", "--set", "data.order=shuffled"])
    with pytest.raises(UserError, match="data.order is 'shuffled'; expected 'random' or 'epochs'"):
        resolve(arguments)
