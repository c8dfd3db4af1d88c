# SPDX-License-Identifier: Apache-2.0
"""Feature cache: extract the features of a frozen backbone once and train on them from disk.

The maps of each camera at strides 8, 16 and 32 are packed into one float16 array of the stride-16 size,
(C8 * 4 + C16 + C32 / 4, H/16, W/16). The cached images are not augmented: only the world may be rotated and
cameras may be dropped. Symbols: B batch, T frames, N cameras, C channels, H/W image size in pixels.
"""

import hashlib
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from ftkd_core.config import ImageConfig
from ftkd_core.data.augmentation import AugmentConfig
from ftkd_core.data.clips import Clip, ClipSource
from ftkd_core.errors import UserError
from ftkd_core.models.resnet import ResNet
from ftkd_core.models.sparse_bev import SparseBEV
from ftkd_core.models.stream_petr import StreamPETR
from ftkd_core.runtime.preprocess import normalise


def pack_maps(maps: tuple[Tensor, ...]) -> Tensor:
    """Pack maps (B, C, H/s, W/s) of strides 8, 16 and 32 into one map of stride 16; stride 4 is dropped."""
    return torch.cat([F.pixel_unshuffle(maps[1], 2), maps[2], F.pixel_shuffle(maps[3], 2)], dim=1)


def unpack_maps(packed: Tensor, widths: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Invert `pack_maps`; widths are the channels of all four maps. The stride-4 map gets no channels."""
    fine, middle, coarse = torch.split(packed, [4 * widths[1], widths[2], widths[3] // 4], dim=1)
    eight = F.pixel_shuffle(fine, 2)
    return eight[:, :0], eight, middle, F.pixel_unshuffle(coarse, 2)


class CachedResNet(ResNet):
    """Backbone that takes its own packed output as input. It keeps its weights, so that a saved model is
    complete."""

    def forward(self, packed: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return unpack_maps(packed, self.out_channels)


def network_input(images: Tensor) -> Tensor:
    """Return the model input of a batch: normalised images (uint8 input) or packed features (float input)."""
    return images.float() if images.is_floating_point() else normalise(images)


def backbone_hash(backbone: ResNet) -> str:
    """Return 12 hexadecimal digits of a hash of the backbone's weights."""
    digest = hashlib.sha256()
    for name, value in sorted(backbone.state_dict().items()):
        value = value.detach().cpu() + 0  # averaging weights turns -0 into 0: hash both alike
        digest.update(name.encode() + value.numpy().tobytes())
    return digest.hexdigest()[:12]


class FeatureCache:
    """Clip source with the packed features (T, N, C, H/16, W/16) of one backbone in the place of images.

    One folder in `cache` per backbone and clip source, one file per clip.
    """

    def __init__(self, clips: ClipSource, backbone: ResNet, image: ImageConfig, cache: Path) -> None:
        self.clips, self.image, self.hash = clips, image, backbone_hash(backbone)
        self.name = f"features {self.hash} of {clips.name}"
        source = hashlib.sha256(f"{clips.name}, {image}".encode()).hexdigest()[:8]  # image size and scaling
        self.folder = cache / f"features-{self.hash}-{source}"

    def file(self, index: int) -> Path:
        """Return the path of a clip's features."""
        return self.folder / f"{index:06d}.npy"

    def __call__(self, index: int) -> Clip:
        features, blank = _read(self.file(index)), _read(self.folder / "blank.npy")
        return replace(self.clips(index), features=features, blank=blank)

    def extract(self, backbone: ResNet, index: int, device: torch.device) -> None:
        """Write the features of one clip."""
        clip = self.clips(index)
        frames = [
            self._features(backbone, np.array(clip.images[frame]), device) for frame in range(len(clip.times))
        ]
        _write(self.file(index), np.stack(frames))

    @torch.inference_mode()
    def _features(self, backbone: ResNet, images: NDArray[np.uint8], device: torch.device) -> Any:
        maps = backbone(normalise(torch.from_numpy(images).to(device)))
        return pack_maps(maps).half().cpu().numpy()

    def fill(self, backbone: ResNet, count: int, device: torch.device) -> None:
        """Extract the missing features of the first `count` clips: on the device, or on all CPU cores."""
        self.folder.mkdir(parents=True, exist_ok=True)
        missing = [index for index in range(count) if not self.file(index).is_file()]
        frozen = backbone.eval().requires_grad_(False).to(device)
        if not (self.folder / "blank.npy").is_file():
            black = np.zeros((1, self.image.height, self.image.width, 3), dtype=np.uint8)
            _write(self.folder / "blank.npy", self._features(frozen, black, device)[0])
        bar: Any = partial(tqdm, desc="extract features", unit="scene", total=len(missing))
        if device.type != "cpu" or len(missing) < 4:
            for index in bar(missing):
                self.extract(frozen, index, device)
            return
        context = multiprocessing.get_context("spawn")  # a forked process would inherit locked mutexes
        with ProcessPoolExecutor(
            os.cpu_count(), context, initializer=torch.set_num_threads, initargs=(1,)
        ) as pool:
            work = pool.map(partial(self.extract, frozen, device=device), missing)
            list(bar(work))


def _write(path: Path, features: Any) -> None:
    """Write a file atomically."""
    unfinished = path.with_suffix(f".{os.getpid()}.partial.npy")
    np.save(unfinished, features)
    unfinished.replace(path)


def _read(path: Path) -> Any:
    """Memory-map a file. Raise UserError if it is damaged."""
    try:
        return np.load(path, mmap_mode="r")
    except (OSError, ValueError) as error:
        raise UserError(
            f"cached features {str(path)!r} cannot be read ({error}); delete the file and start again"
        ) from None


def cache_features(
    model: StreamPETR | SparseBEV, clips: ClipSource, cache: Path, count: int, device: torch.device
) -> FeatureCache:
    """Return the first `count` clips with cached features, and switch the model to cached features.

    Missing features are extracted first. Raises UserError as `use_cached_features`.
    """
    cached = FeatureCache(clips, model.backbone, model.config.image, cache)
    backbone = model.backbone
    use_cached_features(model)
    cached.fill(backbone, count, device)
    return cached


def use_cached_features(model: StreamPETR | SparseBEV) -> None:
    """Replace the model's backbone by a `CachedResNet`. Raise UserError if its neck reads stride 4 or 32 does
    not divide its image size."""
    if model.neck.finest < 1:
        raise UserError(
            "data.cache_features stores strides 8 to 32, but this model's neck reads stride 4; leave it out"
        )
    width, height = model.config.image.width, model.config.image.height
    if width % 32 or height % 32:
        raise UserError(f"data.cache_features with images of {width}x{height}: expected multiples of 32")
    config = model.config.backbone
    cached = CachedResNet(config.depth, config.base_channels)
    cached.load_state_dict(model.backbone.state_dict())
    model.backbone = cached


def refuse_image_augmentation(augment: AugmentConfig, backbone_ratio: float) -> None:
    """Raise UserError if training would change the images or the backbone of the cached features."""
    changes = {
        "augment.flip": augment.flip, "augment.colour": augment.colour,
        "augment.grid_mask": augment.grid_mask,
        "augment.zoom": augment.zoom != (1.0, 1.0),
        "optim.backbone_ratio": backbone_ratio,
    }  # fmt: skip
    wrong = [name for name, value in changes.items() if value]
    if wrong:
        raise UserError(
            "data.cache_features needs a frozen backbone and unchanged images; "
            f"{', '.join(wrong)} would change them: set each to 0 (zoom to [1, 1]), or leave it out"
        )
