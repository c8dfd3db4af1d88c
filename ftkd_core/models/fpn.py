# SPDX-License-Identifier: Apache-2.0
"""Feature pyramid (Lin et al. 2017) that convolves only the levels that are used, as StreamPETR's CPFPN."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


class TopDownPyramid(nn.Module):
    """Compute pyramid levels `outputs` (indices) of feature maps, finest first; each (B, out_channels, H, W)
    at the size of its map."""

    def __init__(self, in_channels: Sequence[int], out_channels: int, outputs: Sequence[int]) -> None:
        super().__init__()
        self.outputs = tuple(outputs)
        self.finest = min(outputs)
        self.lateral = nn.ModuleList(
            nn.Conv2d(channels, out_channels, 1) for channels in in_channels[self.finest :]
        )
        self.output = nn.ModuleList(nn.Conv2d(out_channels, out_channels, 3, padding=1) for _ in outputs)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        maps = maps[self.finest :]
        merged: list[Tensor] = [self.lateral[-1](maps[-1])]
        for lateral, finer in zip(reversed(self.lateral[:-1]), reversed(maps[:-1]), strict=True):
            merged.insert(0, lateral(finer) + F.interpolate(merged[0], size=finer.shape[-2:], mode="nearest"))
        return [
            conv(merged[level - self.finest]) for conv, level in zip(self.output, self.outputs, strict=True)
        ]
