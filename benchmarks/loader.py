# SPDX-License-Identifier: Apache-2.0
"""Throughput of training data from a nuScenes data set: steps of one image, and whole data loaders.

    python -m benchmarks.loader --json FILE
    python -m benchmarks.loader --data-root DATA/nuscenes --version v1.0-mini --split mini_train --json FILE
    python -m benchmarks.loader --preset sparse_bev_r101_704x256_offline --half-decode --json FILE

Without `--data-root`, a rendered data set of 1600x900 JPEGs is used; decoding time depends on size and
quality, hardly on content. All files are read once before, so that the disk has no influence.

`stages` are times of one image in one thread: JPEG to RGB (libjpeg-turbo in OpenCV), then scaling and
cropping to the network's size, without and with the recipe's zoom, from full and from half resolution.
`loader` is the throughput of PyTorch's DataLoader by number of workers, as in training: a batch is one frame
of each stream or, with a SparseBEV preset, windows with all their frames, with rig and targets, augmented as
in the recipe.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from benchmarks.report import report
from benchmarks.run import median_ms
from ftkd_core.config import DetectorConfig, SparseBEVConfig, override
from ftkd_core.data.augmentation import AugmentConfig
from ftkd_core.data.clips import StreamDataset
from ftkd_core.data.nuscenes import read_image
from ftkd_core.data.nuscenes_clips import ImageFiles, NuScenesClips
from ftkd_core.data.synthetic.export import write_dataset
from ftkd_core.data.windows import WindowDataset
from ftkd_core.errors import UserError
from ftkd_core.presets import SPARSE_BEV_PRESETS, preset, sparse_bev_preset
from ftkd_core.runtime.preprocess import resize_and_crop, zoom_and_crop
from training.recipes import RECIPES

_BATCHES_TO_WARM_UP = 4


def run(
    clips: NuScenesClips, model: DetectorConfig | SparseBEVConfig, *, streams: int, workers: Sequence[int],
    seconds: float,
) -> dict[str, Any]:  # fmt: skip
    """Measure all figures of one data set."""
    clips.prepare()
    files = [path for number in range(len(clips)) for path in _files(clips, number)]
    for file in files:
        file.read_bytes()
    cv2.setNumThreads(1)
    image, half, size = read_image(files[0]), read_image(files[0], half=True), clips.image
    data, frames = _data(clips, model, streams)
    return {
        "data": clips.name,
        "preset": model.preset,
        "images": len(files),
        "image_size": [image.shape[1], image.shape[0]],
        "mean_bytes": float(np.mean([file.stat().st_size for file in files])),
        "stages": {
            "decode_ms": _median_over(files, read_image),
            "scale_ms": median_ms(lambda: resize_and_crop(image, size), 50),
            "zoom_ms": median_ms(lambda: zoom_and_crop(image, size, 1.1, 0.5), 50),
            "half_decode_ms": _median_over(files, partial(read_image, half=True)),
            "half_scale_ms": median_ms(lambda: resize_and_crop(half, size), 50),
            "half_zoom_ms": median_ms(lambda: zoom_and_crop(half, size, 1.1, 0.5), 50),
        },
        "half_decode": clips.half_decode,
        "streams": streams,
        "frames": frames,
        "loader": {
            str(count): _loader_throughput(data, count, streams * frames * len(clips.channels), seconds)
            for count in tqdm(workers, desc="loader", unit="number of workers")
        },
    }


def _files(clips: NuScenesClips, number: int) -> list[Path]:
    images = clips(number).images
    assert isinstance(images, ImageFiles)
    return [images.root / path for path in images.paths.ravel()]


def _data(
    clips: NuScenesClips, model: DetectorConfig | SparseBEVConfig, batch: int
) -> tuple[Dataset[Any], int]:
    """Return the training data set and the number of frames per batch element."""
    augment = _recipe_augmentation(
        "sparse_bev_r50" if isinstance(model, SparseBEVConfig) else "stream_petr_r50"
    )
    if isinstance(model, DetectorConfig):
        return StreamDataset(clips, len(clips), num_streams=batch, segment=20, augment=augment, seed=0), 1
    windows = WindowDataset(
        clips, len(clips), batch=batch, num_past=model.num_past, num_future=model.num_future, augment=augment,
        seed=0,
    )  # fmt: skip
    return windows, model.num_frames


def _recipe_augmentation(recipe: str) -> AugmentConfig:
    changes = [text for text in RECIPES[recipe].settings(1) if text.startswith("augment.")]
    return override(AugmentConfig(), [text.removeprefix("augment.") for text in changes])


def _median_over(files: Sequence[Path], work: Any, repeats: int = 60) -> float:
    """Median time over different files."""
    turn = iter([files[place % len(files)] for place in range(repeats + 3)])
    return median_ms(lambda: work(next(turn)), repeats)


def _loader_throughput(data: Dataset[Any], workers: int, images: int, seconds: float) -> dict[str, float]:
    """Return batches and images per second of a loader whose consumer does no other work."""
    loader = DataLoader(
        data,
        batch_size=None,
        sampler=range(1_000_000),
        num_workers=workers,
        prefetch_factor=4 if workers else None,
    )
    batches = iter(loader)
    for _ in range(_BATCHES_TO_WARM_UP * max(workers, 1)):
        next(batches)
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        next(batches)
        count += 1
    rate = count / (time.perf_counter() - began)
    return {"batches_per_s": rate, "images_per_s": rate * images}


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.loader",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--data-root", type=Path, help="nuScenes data set (default: a rendered one)")
    add("--version", default="v1.0-trainval", help="version of the data set (default v1.0-trainval)")
    add("--split", default="train", help="split of the data set (default train)")
    add(
        "--preset",
        default="r50_704x256_428q",
        help="preset that sets image size and windows (default r50_704x256_428q)",
    )
    add("--streams", type=int, default=8, help="batch size (default 8)")
    add(
        "--half-decode",
        action="store_true",
        help="decode at half resolution if possible, as data.half_decode in training",
    )
    add("--workers", default="0,1,2", help="numbers of worker processes (default 0,1,2)")
    add("--seconds", type=float, default=10.0, help="duration of each measurement (default 10)")
    add("--note", help="text for the JSON, such as other load on the machine")
    add("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    options = _make_parser().parse_args(argv)
    try:
        counts = _numbers(options.workers)
        model = (sparse_bev_preset if options.preset in SPARSE_BEV_PRESETS else preset)(options.preset)
        with tempfile.TemporaryDirectory() as folder:
            root, version, split = options.data_root, options.version, options.split
            if root is None:
                root, version, split = Path(folder) / "rendered", "v1.0-synth", "bench"
                write_dataset(
                    root, [0, 1], version=version, split=split, width=1600, height=900, duration_s=10.0,
                    sweeps=False,
                )  # fmt: skip
            clips = NuScenesClips(
                root, version, split, model.image, model.channels, Path(folder) / "index",
                half_decode=options.half_decode,
            )  # fmt: skip
            result = run(clips, model, streams=options.streams, workers=counts, seconds=options.seconds)
    except UserError as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return 2
    report(result, options.json, options.note)
    return 0


def _numbers(text: str) -> list[int]:
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 0:
        raise UserError(f"--workers {text!r}: expected numbers such as 0,2,4")
    return found


if __name__ == "__main__":
    sys.exit(main())
