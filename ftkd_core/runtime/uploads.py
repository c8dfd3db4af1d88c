# SPDX-License-Identifier: Apache-2.0
"""Transfer of camera images to the network: scaled by OpenCV on the host, or uploaded and scaled on the
device.

Both leave network images (N, H, W, 3) uint8 in a static buffer; the network normalises them. Symbols: N
cameras, H/W network image, h/w camera image.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ftkd_core.config import ImageConfig
from ftkd_core.runtime.device_remap import DeviceRemap
from ftkd_core.runtime.header import unpack_header
from ftkd_core.runtime.preprocess import stack_images
from ftkd_core.runtime.remap import ImageRemap
from ftkd_core.runtime.replay import Replay
from ftkd_core.runtime.resample import BatchTaps, ImageTaps, batch_taps, image_taps, resample
from ftkd_core.types import CameraView

Views = Sequence[CameraView | None]
Size = tuple[int, int]


class CpuImages:
    """Images scaled by OpenCV, the fastest choice on a CPU."""

    def __init__(
        self, config: ImageConfig, cameras: int, device: torch.device, _compile: Callable[[Any], Any]
    ) -> None:
        self._config = config
        shape = (cameras, config.height, config.width, 3)
        self._host = torch.zeros(shape, dtype=torch.uint8, pin_memory=device.type == "cuda")
        self.network_images = self._host.to(device)

    def upload(self, views: Views, _header: Tensor) -> None:
        """Scale the images of a round and start to copy them; the previous copy must have finished."""
        self._host.copy_(torch.from_numpy(stack_images(views, self._config)))
        if self.network_images is not self._host:
            self.network_images.copy_(self._host, non_blocking=True)


class DeviceImages:
    """Images uploaded through pinned memory without the rows that are cut, and scaled on the device, or
    resampled there if a view has a map.

    Buffers and taps are created for each new image size and map; a missing camera keeps its own.
    """

    def __init__(
        self, config: ImageConfig, cameras: int, device: torch.device, compile_: Callable[[Any], Any]
    ) -> None:
        self._config = config
        self._device = device
        self._compile = compile_
        self._compiled: dict[tuple[torch.Size, ...], Callable[..., Tensor]] = {}
        self._sizes: list[Size | None] = [None] * cameras
        self._taps: list[ImageTaps | None] = [None] * cameras
        self._maps: list[DeviceRemap | None] = [None] * cameras
        self._step: Replay | None = None
        self.network_images = torch.zeros(
            cameras, config.height, config.width, 3, dtype=torch.uint8, device=device
        )

    def upload(self, views: Views, header: Tensor) -> None:
        """Start to copy and scale the images of a round; upload the header, which holds the camera mask,
        first."""
        plain = [None if view is None or view.remap is not None else view for view in views]
        self._scale(plain, header)
        for camera, view in enumerate(views):
            if view is not None and view.remap is not None:
                self._map_of(camera, view.remap).upload(view)

    def _map_of(self, camera: int, remap: ImageRemap) -> DeviceRemap:
        """Return the map of a camera on the device; waits for the device, once per change of calibration."""
        known = self._maps[camera]
        if known is None or known.remap is not remap:
            known = DeviceRemap(remap, self.network_images[camera])
            self._maps[camera] = known
        return known

    def _scale(self, views: Views, header: Tensor) -> None:
        """Start to copy and scale the images without a map; missing cameras become black."""
        sizes = [
            old if view is None else (view.image.shape[1], view.image.shape[0])
            for view, old in zip(views, self._sizes, strict=True)
        ]
        if sizes != self._sizes or self._step is None:
            self._set_sizes(sizes, header)
        for view, taps, host, device in zip(views, self._taps, self._host, self._raw, strict=True):
            if view is None or taps is None:
                continue
            image = view.image[taps.first_row :]
            _copy_in(host[: image.shape[0], : image.shape[1]], image)
            device.copy_(host, non_blocking=True)
        assert self._step is not None
        self._step()

    def _set_sizes(self, sizes: list[Size | None], header: Tensor) -> None:
        """Create buffers and taps for these image sizes; waits for the device, once per change of sizes."""
        self._taps = [None if size is None else image_taps(self._config, *size) for size in sizes]
        known = [taps for taps in self._taps if taps is not None]
        filler = known[0] if known else image_taps(self._config, self._config.width, self._config.height)
        taps: BatchTaps = batch_taps([filler if t is None else t for t in self._taps], self._device)
        heights = [int(t.rows.source.max()) + 1 for t in known] or [self._config.height]
        widths = [int(t.columns.source.max()) + 1 for t in known] or [self._config.width]
        shape = (len(sizes), max(heights), max(widths), 3)
        self._host = torch.zeros(shape, dtype=torch.uint8, pin_memory=self._device.type == "cuda")
        self._raw = torch.zeros(shape, dtype=torch.uint8, device=self._device)
        raw, resampled = self._raw, self._resample_of(self._raw, taps)

        def step() -> None:
            self.network_images.copy_(resampled(raw, header, taps))

        self._step = Replay(step, self._device)
        self._sizes = sizes

    def _resample_of(self, raw: Tensor, taps: BatchTaps) -> Callable[..., Tensor]:
        """Return `_resample_round` compiled once for these shapes; a camera that appears later adds no new
        shapes."""
        shapes = (raw.shape, *(values.shape for values in taps))
        if shapes not in self._compiled:
            self._compiled[shapes] = self._compile(_resample_round)
        return self._compiled[shapes]


def _copy_in(target: Tensor, image: NDArray[np.uint8]) -> None:
    """Copy an image, with torch on all cores if possible (not if it is read-only or mirrored)."""
    if image.flags.writeable and min(image.strides) > 0:
        target.copy_(torch.from_numpy(image))
    else:
        np.copyto(target.numpy(), image)


def _resample_round(raw: Tensor, header: Tensor, taps: BatchTaps) -> Tensor:
    _, rig, _, _ = unpack_header(header, raw.shape[0])
    return resample(raw, taps, rig.mask[0])
