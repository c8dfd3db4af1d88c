# SPDX-License-Identifier: Apache-2.0
"""ResNet: parameters and cost as published by torchvision."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ftkd_core.models.resnet import ResNet

PUBLISHED = {18: (11_689_512, 1.81), 34: (21_797_672, 3.66), 50: (25_557_032, 4.09), 101: (44_549_160, 7.80)}
"""Parameters and 1e9 multiply-adds for a 224x224 image, both with the classifier of 1000 classes."""


@pytest.mark.parametrize("depth", list(PUBLISHED))
def test_parameters_and_multiply_adds_match_torchvision(depth: int) -> None:
    with torch.device("meta"):
        model, image = ResNet(depth).eval(), torch.empty(1, 3, 224, 224)
    with FlopCounterMode(display=False) as counter:
        model(image)
    width = model.out_channels[-1]
    parameters, cost = PUBLISHED[depth]
    assert sum(p.numel() for p in model.parameters()) + (width + 1) * 1000 == parameters
    assert round((counter.get_total_flops() / 2 + width * 1000) / 1e9, 2) == cost
