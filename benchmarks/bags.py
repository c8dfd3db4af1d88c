# SPDX-License-Identifier: Apache-2.0
"""Speed of bags: conversion, offline detection without the model, and evaluation of mini_val.

    python -m benchmarks.bags --json build/bags.json

convert: images/s of `ftkd convert`, of a plain loop that writes the same camera messages with `rosbags`, and
of copying the image files (the limit of the disk). detect: seconds of driving per second of the offline
runner with a detector that finds nothing, so reading, matching, decoding and geometry are measured. evaluate:
seconds for the official metrics of 300 detections in each of the 81 key frames; needs the tables of mini_val.
"""

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Final

import numpy as np
from rosbags.rosbag2 import StoragePlugin, Writer

from benchmarks.report import report
from ftkd_core.classes import CAMERA_CHANNELS
from ftkd_core.data import nuscenes
from ftkd_core.data.synthetic.export import write_dataset
from ftkd_core.evaluation.nuscenes import PosedObjects, evaluate, sample_tokens_of, to_devkit_results
from ftkd_core.types import CameraRound, ObjectList
from ftkd_ros.bag.convert import convert_opened
from ftkd_ros.bag.detect import detect_bag
from ftkd_ros.bag.message_definitions import ROSBAGS, message_types
from ftkd_ros.convert import to_ros

VERSION: Final = "v1.0-bench"
_SEED: Final = 900_000
_BOXES: Final = 300
_TABLES: Final = Path(__file__).resolve().parents[2] / "shared/data/nuscenes_mini_val_tables"


class NoDetector:
    """A detector that finds nothing and takes no time."""

    channels = CAMERA_CHANNELS
    assigns_by_yaw = False
    weights_name = "none"
    training = ""
    preset = "none"
    device = "cpu"
    warnings: ClassVar[list[str]] = []

    def warm_up(self) -> None: ...

    def reset(self) -> None: ...

    def step(self, camera_round: CameraRound) -> ObjectList:
        """Return no objects."""
        return ObjectList(
            boxes=np.zeros((0, 9)),
            scores=np.zeros(0),
            labels=np.zeros(0, dtype=np.int64),
            stamp_ns=camera_round.reference_stamp_ns,
        )


def best_of(repeats: int, work: Callable[[Path], object], folder: Path) -> float:
    """Return the shortest time in seconds; each repetition gets a new path, which is removed."""
    times = []
    for number in range(repeats):
        target = folder / f"run{number}"
        started = time.perf_counter()
        work(target)
        os.sync()
        times.append(time.perf_counter() - started)
        shutil.rmtree(target)
    return min(times)


def write_plainly(records: Sequence[nuscenes.CameraRecord], output: Path) -> None:
    """Write images and camera_info with `rosbags` as its documentation shows."""
    store = message_types()
    kinds = {
        "image/compressed": "sensor_msgs/msg/CompressedImage",
        "camera_info": "sensor_msgs/msg/CameraInfo",
    }
    with Writer(output, version=8, storage_plugin=StoragePlugin.MCAP) as writer:
        connections = {
            (channel, name): writer.add_connection(f"/{channel.lower()}/{name}", kind, typestore=store)
            for channel in dict.fromkeys(record.channel for record in records)
            for name, kind in kinds.items()
        }
        for record in records:
            frame, size = record.channel.lower(), (record.width, record.height)
            info = to_ros.camera_info(ROSBAGS, record.intrinsics, size, record.stamp_ns, frame)
            image = to_ros.compressed_image(ROSBAGS, record.path.read_bytes(), record.stamp_ns, frame)
            for name, message in (("camera_info", info), ("image/compressed", image)):
                content = store.serialize_cdr(message, kinds[name])
                writer.write(connections[record.channel, name], record.stamp_ns, content)


def copy_files(records: Sequence[nuscenes.CameraRecord], output: Path) -> None:
    """Copy the image files."""
    output.mkdir()
    for number, record in enumerate(records):
        shutil.copyfile(record.path, output / str(number))


def measure_convert(dataset: nuscenes.Dataset, folder: Path, repeats: int) -> dict[str, float]:
    """Return images/s of the converter, of the plain loop and of copying."""
    scene = nuscenes.scene_names(dataset)[0]
    records = sorted(
        (r for channel in CAMERA_CHANNELS for r in nuscenes.camera_records(dataset, scene, channel)),
        key=lambda record: record.stamp_ns,
    )
    seconds = {
        "ours": best_of(repeats, lambda p: convert_opened(dataset, scene, p, progress=False), folder),
        "plain_rosbags": best_of(repeats, lambda p: write_plainly(records, p), folder),
        "copy": best_of(repeats, lambda p: copy_files(records, p), folder),
    }
    rates = {f"{name}_fps": round(len(records) / value, 1) for name, value in seconds.items()}
    return {
        **rates,
        "ratio": round(seconds["plain_rosbags"] / seconds["ours"], 3),
        "ours_to_copy": round(seconds["copy"] / seconds["ours"], 3),
        "megabytes": round(sum(r.path.stat().st_size for r in records) / 1e6, 1),
    }


def measure_detect(bag: Path, folder: Path, repeats: int, seconds: float) -> float:
    """Return seconds of driving per second of the offline runner without a model."""
    run = best_of(
        repeats, lambda p: detect_bag(bag, p, factory=lambda _: NoDetector(), progress=False), folder
    )
    return round(seconds / run, 2)


def measure_evaluate(tables: Path) -> float | None:
    """Return the seconds of the official metrics on mini_val; None without its tables."""
    if not (tables / "v1.0-mini").is_dir():
        print(f"no tables at {tables}: evaluation is not measured", file=sys.stderr)
        return None
    dataset = nuscenes.open_dataset(tables, "v1.0-mini")
    rng = np.random.default_rng(0)
    found = {}
    for token in sample_tokens_of(dataset, split="mini_val"):
        truth = nuscenes.ground_truth(dataset, token, min_points=1)
        index = rng.integers(0, len(truth.boxes), _BOXES)
        boxes = truth.boxes[index]
        boxes[:, :2] += rng.normal(0, 2, (_BOXES, 2))
        objects = ObjectList(
            boxes=boxes, scores=rng.random(_BOXES), labels=truth.labels[index], stamp_ns=truth.stamp_ns
        )
        found[token] = PosedObjects(objects, nuscenes.sample_pose(dataset, token))
    started = time.perf_counter()
    evaluate(dataset, to_devkit_results(found, found), sample_tokens=list(found))
    return round(time.perf_counter() - started, 2)


def measure(
    seconds: float, size: tuple[int, int], repeats: int, tables: Path, folder: Path
) -> dict[str, Any]:
    """Return all figures; data and bags are written to `folder`."""
    dataroot = write_dataset(
        folder / "data", [_SEED], version=VERSION, split="bench", width=size[0], height=size[1],
        duration_s=seconds, progress=False,
    )  # fmt: skip
    dataset = nuscenes.open_dataset(dataroot, VERSION)
    scene = nuscenes.scene_names(dataset)[0]
    bag = folder / "bag"
    summary = convert_opened(dataset, scene, bag, progress=False)
    return {
        "convert": measure_convert(dataset, folder, repeats),
        "detect_x_realtime_without_model": measure_detect(bag, folder, repeats, summary.duration_s),
        "evaluate_mini_val_s": measure_evaluate(tables),
        "settings": {"seconds": seconds, "size": list(size), "repeats": repeats, "images": summary.images},
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print the figures; write them with --json."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--seconds", type=float, default=10.0, help="length of the drive")
    parser.add_argument("--size", type=int, nargs=2, default=(1600, 900), metavar=("W", "H"))
    parser.add_argument("--repeats", type=int, default=3, help="the fastest of these counts")
    parser.add_argument("--tables", type=Path, default=_TABLES, help="folder with the tables of mini_val")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="ftkd-bags-", dir=Path.cwd()) as folder:
        figures = measure(given.seconds, tuple(given.size), given.repeats, given.tables, Path(folder))
    report(figures, given.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
