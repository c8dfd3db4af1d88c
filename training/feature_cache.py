# SPDX-License-Identifier: Apache-2.0
"""Features of a frozen backbone, extracted once and read from disk: training of what follows it costs what it
costs by itself.

Each camera's maps at strides 8, 16 and 32 lie in one array of the size of the middle one, (C8 * 4 + C16 +
C32 / 4, H/16, W/16) in half precision: finer cells beside each other in more channels, coarser ones spread.
They are of the images as they are: augmentation may turn the world and take cameras away, no more. Symbols: T
frames, N cameras, H/W image size in pixels.
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
    """Maps (B, C, H/s, W/s) of strides 4, 8, 16 and 32 as one; that of stride 4 is left out."""
    return torch.cat([F.pixel_unshuffle(maps[1], 2), maps[2], F.pixel_shuffle(maps[3], 2)], dim=1)


def unpack_maps(packed: Tensor, widths: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The inverse of `pack_maps`, widths being the channels of all four; the first map has no channels."""
    fine, middle, coarse = torch.split(packed, [4 * widths[1], widths[2], widths[3] // 4], dim=1)
    eight = F.pixel_shuffle(fine, 2)
    return eight[:, :0], eight, middle, F.pixel_unshuffle(coarse, 2)


class KeptResNet(ResNet):
    """A backbone whose input is its packed output; it holds the weights it was extracted with, so that a
    model's file is whole."""

    def forward(self, packed: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return unpack_maps(packed, self.out_channels)


def network_input(images: Tensor, config: ImageConfig) -> Tensor:
    """What a model is given of a batch: normalised images, or packed features as they are."""
    return images.float() if images.is_floating_point() else normalise(images, config)


def backbone_hash(backbone: ResNet) -> str:
    """Twelve digits that tell backbones of other weights apart."""
    digest = hashlib.sha256()
    for name, value in sorted(backbone.state_dict().items()):
        value = value.detach().cpu() + 0  # averaging makes 0 of -0
        digest.update(name.encode() + value.numpy().tobytes())
    return digest.hexdigest()[:12]


class KeptFeatures:
    """Clips whose images are the packed features (T, N, C, H/16, W/16) of one backbone; a folder of `cache` a
    backbone and source of clips, a file a clip."""

    def __init__(self, clips: ClipSource, backbone: ResNet, image: ImageConfig, cache: Path) -> None:
        self.clips, self.image, self.hash = clips, image, backbone_hash(backbone)
        self.name = f"features {self.hash} of {clips.name}"
        seen = hashlib.sha256(f"{clips.name}, {image}".encode()).hexdigest()[:8]  # images, and how scaled
        self.folder = cache / f"features-{self.hash}-{seen}"

    def file(self, index: int) -> Path:
        """Where the features of a clip are kept."""
        return self.folder / f"{index:06d}.npy"

    def __call__(self, index: int) -> Clip:
        features, blank = _read(self.file(index)), _read(self.folder / "blank.npy")
        return replace(self.clips(index), features=features, blank=blank)

    def extract(self, backbone: ResNet, index: int, device: torch.device) -> None:
        """Write the features of a clip."""
        clip = self.clips(index)
        frames = [
            self._features(backbone, np.array(clip.images[frame]), device) for frame in range(len(clip.times))
        ]
        _write(self.file(index), np.stack(frames))

    @torch.inference_mode()
    def _features(self, backbone: ResNet, images: NDArray[np.uint8], device: torch.device) -> Any:
        maps = backbone(normalise(torch.from_numpy(images).to(device), self.image))
        return pack_maps(maps).half().cpu().numpy()

    def fill(self, backbone: ResNet, count: int, device: torch.device) -> None:
        """Extract what is missing of the first `count` clips: on the device, or on all cores."""
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
        context = multiprocessing.get_context("spawn")  # a forked process inherits the locks of threads
        with ProcessPoolExecutor(
            os.cpu_count(), context, initializer=torch.set_num_threads, initargs=(1,)
        ) as pool:
            work = pool.map(partial(self.extract, frozen, device=device), missing)
            list(bar(work))


def _write(path: Path, features: Any) -> None:
    """The file appears only when complete."""
    unfinished = path.with_suffix(f".{os.getpid()}.partial.npy")
    np.save(unfinished, features)
    unfinished.replace(path)


def _read(path: Path) -> Any:
    """Memory-mapped; UserError for a damaged file."""
    try:
        return np.load(path, mmap_mode="r")
    except (OSError, ValueError) as error:
        raise UserError(
            f"kept features {str(path)!r} cannot be read ({error}); delete the file and start again"
        ) from None


def keep_features(
    model: StreamPETR | SparseBEV, clips: ClipSource, cache: Path, count: int, device: torch.device
) -> KeptFeatures:
    """The first `count` clips with what the model's backbone says of them, extracted where it is missing; the
    model takes that in place of images from now on. Errors: UserError as `keep_backbone`."""
    kept = KeptFeatures(clips, model.backbone, model.config.image, cache)
    backbone = model.backbone
    keep_backbone(model)
    kept.fill(backbone, count, device)
    return kept


def keep_backbone(model: StreamPETR | SparseBEV) -> None:
    """Let a model take packed features from now on. UserError where its neck reads stride 4."""
    if model.neck.finest < 1:
        raise UserError(
            "data.cache_features keeps strides 8 to 32, but this model's neck reads stride 4; leave it out"
        )
    width, height = model.config.image.width, model.config.image.height
    if width % 32 or height % 32:
        raise UserError(f"data.cache_features with images of {width}x{height}: expected multiples of 32")
    backbone = model.config.backbone
    kept = KeptResNet(backbone.depth, backbone.base_channels)
    kept.load_state_dict(model.backbone.state_dict())
    model.backbone = kept


def refuse_images(augment: AugmentConfig, backbone_ratio: float) -> None:
    """UserError where training would change the images, or the backbone, that features were kept of."""
    changes = {
        "augment.flip": augment.flip, "augment.colour": augment.colour,
        "augment.grid_mask": augment.grid_mask,
        "augment.zoom_least": augment.zoom_least - 1, "augment.zoom_most": augment.zoom_most - 1,
        "optim.backbone_ratio": backbone_ratio,
    }  # fmt: skip
    wrong = [name for name, value in changes.items() if value]
    if wrong:
        raise UserError(
            "data.cache_features keeps what a frozen backbone says of the images as they are; "
            f"{', '.join(wrong)} would change that: set each to 0 (zoom to 1), or leave keep_features out"
        )
