# SPDX-License-Identifier: Apache-2.0
"""`remap.ImageRemap` for a GPU: the part of a camera image that is read is uploaded and resampled there.

The steps are those of OpenCV's path, its plain twin: area average by whole pixels, bilinear reading at
positions in 1/32 pixel, average of the samples of a pixel, each rounded to grey levels. Both agree up to one
grey level. Symbols: h/w part of the camera image, H/W network image, S samples per pixel and axis.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ftkd_core.runtime.remap import ImageRemap
from ftkd_core.runtime.replay import Replay
from ftkd_core.types import CameraView


class RemapTensors(NamedTuple):
    """A map on a device: grid (1, H S, W S, 2) for `grid_sample`, factor of the area average, and S."""

    grid: Tensor
    shrink: int
    oversampling: int


def remap_tensors(remap: ImageRemap, device: torch.device) -> RemapTensors:
    """Move a map to a device."""
    positions = torch.from_numpy(remap.positions()).to(device)
    left, top, right, bottom = remap.window
    size = torch.tensor([right - left, bottom - top], device=device) / remap.shrink
    return RemapTensors(((positions + 0.5) * 2 / size - 1)[None], remap.shrink, remap.oversampling)


def remap_on_device(part: Tensor, maps: RemapTensors) -> Tensor:
    """Return the network image (H, W, 3) uint8 of a part (h, w, 3) uint8 of a camera image."""
    image = part.permute(2, 0, 1)[None].float()
    if maps.shrink > 1:
        image = _rounded(F.avg_pool2d(image, maps.shrink))
    image = F.grid_sample(image, maps.grid, mode="bilinear", padding_mode="border", align_corners=False)
    image = _rounded(image)
    if maps.oversampling > 1:
        image = _rounded(F.avg_pool2d(image, maps.oversampling))
    return image[0].permute(1, 2, 0).to(torch.uint8)


def _rounded(values: Tensor) -> Tensor:
    """Round halves up, as OpenCV does."""
    return (values + 0.5).floor()


class DeviceRemap:
    """Uploads the images of one camera and writes its network image into a static buffer (H, W, 3)."""

    def __init__(self, remap: ImageRemap, target: Tensor) -> None:
        device = target.device
        self.remap = remap
        left, top, right, bottom = remap.window
        shape = (bottom - top, right - left, 3)
        self._host = torch.zeros(shape, dtype=torch.uint8, pin_memory=device.type == "cuda")
        part = torch.zeros(shape, dtype=torch.uint8, device=device)
        maps = remap_tensors(remap, device)

        def step() -> None:
            target.copy_(remap_on_device(part, maps))

        self._part, self._step = part, Replay(step, device)

    def upload(self, view: CameraView) -> None:
        """Start to copy and resample an image; the previous copy must have finished."""
        left, top, right, bottom = self.remap.window
        np.copyto(self._host.numpy(), view.image[top:bottom, left:right])
        self._part.copy_(self._host, non_blocking=True)
        self._step()
