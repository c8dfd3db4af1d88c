# SPDX-License-Identifier: Apache-2.0
"""Train only the decoder of a SparseBEV, on stored feature maps of its frozen image part.

    python -m training.decoder_only --preset sparse_bev_tiny_offline \
        --init research/weights/tiny_teacher_offline.safetensors --out build/teacher

Backbone, neck and 2-D head of --init stay as they are. Their maps of every frame are computed once and
stored, about 1 MB per frame for the tiny presets, so that a step costs a fraction of one with images. Images
are not augmented. A run that was stopped is resumed by the same command.
"""

import argparse
import sys
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from lightning_fabric import Fabric
from torch.utils.data import Dataset
from tqdm import tqdm

from ftkd_core.config import SparseBEVConfig, override
from ftkd_core.data.augmentation import Augmentation
from ftkd_core.data.clips import Clip, ClipSource, make_sample
from ftkd_core.data.synthetic_clips import SyntheticClips
from ftkd_core.data.windows import collate_windows, hide_future, make_window, window_order
from ftkd_core.errors import UserError
from ftkd_core.models.sparse_bev import SparseBEV, build_sparse_bev
from ftkd_core.presets import sparse_bev_preset
from ftkd_core.weights import read_window_weights
from training import checkpoint
from training.config import OptimConfig
from training.feature_cache import backbone_hash, network_input
from training.tasks import FROZEN, DecoderTask, MapBatch
from training.trainer import Trainer

_CLIPS_IN_MEMORY: Final = 4


class StoredMaps:
    """Feature maps of clips on disk, in half precision, one file per clip and pyramid level."""

    def __init__(self, model: SparseBEV, clips: ClipSource, folder: Path) -> None:
        self.model, self.clips = model.eval(), lru_cache(_CLIPS_IN_MEMORY)(clips)
        self.folder = folder / f"maps-{backbone_hash(model.backbone)}-{clips.name.replace(' ', '-')}"

    def fill(self, count: int) -> None:
        """Compute the missing maps of the first `count` clips."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for index in tqdm(range(count), desc="store maps", unit="scene"):
            if not self._file(index, 0).is_file():
                self._write(index)

    @torch.inference_mode()
    def _write(self, index: int) -> None:
        clip = self.clips(index)
        frames = [make_sample(clip, i, Augmentation(), True).images for i in range(len(clip.times))]
        maps = [self.model.extract(network_input(images)) for images in frames]
        levels = [torch.cat(level).half().numpy() for level in zip(*maps, strict=True)]
        for number, level in reversed(list(enumerate(levels))):  # level 0 last: it marks a complete clip
            unfinished = self._file(index, number).with_suffix(".partial.npy")
            np.save(unfinished, level)
            unfinished.replace(self._file(index, number))

    def _file(self, index: int, level: int) -> Path:
        return self.folder / f"{index:06d}-{level}.npy"

    def clip(self, index: int) -> tuple[Clip, list[Any]]:
        """Return a clip and its maps (F, N, C, H, W) per level, memory-mapped."""
        levels = sorted(self.folder.glob(f"{index:06d}-?.npy"))
        return self.clips(index), [np.load(path, mmap_mode="r") for path in levels]


class MapWindows(Dataset[MapBatch]):
    """Item `step` is a batch of random windows, a function of (seed, step). The future of a window is hidden
    with probability `hide`."""

    def __init__(
        self, maps: StoredMaps, config: SparseBEVConfig, scenes: int, batch: int, seed: int, hide: float
    ) -> None:
        self.maps, self.config, self.scenes, self.batch = maps, config, scenes, batch
        self.seed, self.hide = seed, hide

    def __getitem__(self, step: int) -> MapBatch:
        random = np.random.default_rng([self.seed, step])
        past, future = self.config.num_past, self.config.num_future
        windows, rows = [], []
        for _ in range(self.batch):
            clip, levels = self.maps.clip(int(random.integers(self.scenes)))
            index = int(random.integers(len(clip.times)))
            window = make_window(clip, index, Augmentation(), past, future)
            order = window_order(index, len(clip.times), past, future)[0]
            if future and random.random() < self.hide:
                window = hide_future(window, past)
                order = [*order[: 1 + past], *[index] * future]
            rows.append([np.stack([level[frame] for frame in order]) for level in levels])
            windows.append(window)
        joined = collate_windows(windows)
        pyramid = tuple(torch.from_numpy(np.stack(level)).float() for level in zip(*rows, strict=True))
        return MapBatch(pyramid, joined.rig, joined.time, joined.targets)


def build(options: argparse.Namespace) -> SparseBEV:
    """Return the model that is trained: the frozen parts of --init, and those of its other parts that fit."""
    wrong = [change for change in options.set if not change.startswith("model.")]
    if wrong:
        raise UserError(f"--set {wrong[0]}: expected a setting of the model, such as model.num_past=3")
    changes = [change.removeprefix("model.") for change in options.set]
    config: SparseBEVConfig = override(sparse_bev_preset(options.preset), changes)
    if not config.has_dense_head:
        raise UserError(f"--preset {options.preset}: expected a preset with a dense 2-D head")
    torch.manual_seed(options.seed)
    model = build_sparse_bev(config)
    fresh = tuple(f"{name}." for name in options.fresh.split(",") if name)
    known, _, _ = read_window_weights(options.init)
    own = model.state_dict()
    fits = {
        k: v for k, v in known.items() if k in own and v.shape == own[k].shape and not k.startswith(fresh)
    }
    lost = [name for name in own if name not in fits]
    frozen = [name for name in lost if name.startswith(FROZEN)]
    if frozen:
        raise UserError(
            f"--init {options.init}: {frozen[0]} of {options.preset} is missing or has another shape"
        )
    model.load_state_dict(fits, strict=False)
    if lost:
        print(f"{len(lost)} tensors are not from {options.init}, among them {lost[0]}")
    return model


def run(options: argparse.Namespace) -> None:
    """Store the maps and train to the last step."""
    model = build(options)
    config = model.config
    clips = SyntheticClips(
        options.first_seed, config.image, options.clips, options.duration, world=options.world
    )
    maps = StoredMaps(model, clips, options.maps or options.clips)
    maps.fill(options.scenes)
    fabric = Fabric(accelerator=options.device, devices=1)
    optim = OptimConfig(lr=options.lr, warmup_steps=min(200, options.steps // 4), ema=0.999)
    trainer = Trainer(fabric, DecoderTask(model), optim, options.out, steps=options.steps, seed=options.seed)
    if (options.out / checkpoint.FILE_NAME).is_file():
        trainer.resume(options.out / checkpoint.FILE_NAME)
    data = MapWindows(maps, config, options.scenes, options.batch, options.seed, options.hide_future)
    trainer.run(data, workers=0, save_every=options.save_every)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Bad input is reported in one sentence with exit code 2."""
    parser = argparse.ArgumentParser(
        prog="python -m training.decoder_only", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--preset", required=True, help="a SparseBEV preset with a dense 2-D head")
    add("--init", type=Path, required=True, metavar="FILE", help="weights of its frozen parts")
    add("--fresh", default="", help="comma-separated parts of the decoder that start at random")
    add("--out", type=Path, required=True, metavar="DIR", help="folder for weights, checkpoint and logs")
    add(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a setting of the model, e.g. model.num_past=3",
    )
    add("--world", default="traffic", help="ordinary or traffic (default)")
    add("--scenes", type=int, default=120, help="scenes (default 120)")
    add("--duration", type=float, default=20.0, metavar="S", help="seconds per scene (default 20)")
    add("--first-seed", type=int, default=0, help="seed of the first scene (default 0)")
    add("--steps", type=int, default=6000, help="optimiser steps (default 6000)")
    add("--batch", type=int, default=4, help="windows per step (default 4)")
    add("--lr", type=float, default=4e-4, help="peak learning rate (default 4e-4)")
    add("--hide-future", type=float, default=0.5, help="share of windows without future (default 0.5)")
    add("--save-every", type=int, default=250, help="steps between checkpoints (default 250)")
    add("--seed", type=int, default=0, help="seed of weights, windows and noise")
    add("--clips", type=Path, default=Path("build/clips"), help="folder of rendered scenes")
    add("--maps", type=Path, metavar="DIR", help="folder of the maps (default: that of the scenes)")
    add("--device", default="cpu", help="cpu (default) or cuda")
    options = parser.parse_args(argv)
    try:
        if min(options.scenes, options.steps, options.batch, options.save_every) < 1:
            raise UserError("--scenes, --steps, --batch and --save-every: expected at least 1")
        run(options)
    except UserError as error:
        print(f"decoder_only: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
