# SPDX-License-Identifier: Apache-2.0
"""Compute the official nuScenes metrics of a weights file on a data set, frame by frame through the detector.

    ftkd synth --output build/held_out --scenes 8 --first-seed 900000 --split held_out
    ftkd validate --dataroot build/held_out --weights runs/tiny/weights.safetensors

Key frames are streamed scene by scene at 2 Hz, as in training; a SparseBEV sees windows of key frames, with
its future frames if it has any. Cameras of another rig than the trained one are seen through virtual cameras,
as at inference. Prints the metrics as JSON.
"""

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from ftkd_core.config import DetectorConfig, SparseBEVConfig
from ftkd_core.data.nuscenes import NuScenes, camera_round, open_dataset
from ftkd_core.data.nuscenes_clips import NuScenesClips
from ftkd_core.errors import UserError
from ftkd_core.evaluation.nuscenes import PosedObjects, evaluate, sample_tokens_of, to_devkit_results
from ftkd_core.models.build import build_stream_petr
from ftkd_core.models.sparse_bev import SparseBEV, build_sparse_bev
from ftkd_core.models.stream_petr import StreamPETR
from ftkd_core.runtime.detector import Detector, resolve_device
from ftkd_core.weights import load_into, read_config, read_weights, read_window_weights
from training.split_detection import detect_scenes, score_scenes

SCORE_THRESHOLD = 0.01


@dataclass(frozen=True, kw_only=True)
class ValidateOptions:
    """Options of `validate`, one per command-line option; see `make_parser` for their meaning."""

    dataroot: Path
    weights: Path | None = None
    version: str = "v1.0-synth"
    split: str = "held_out"
    device: str = "auto"
    camera_model: str = "auto"
    output: Path | None = None


def make_parser(prog: str = "python -m training.validate") -> argparse.ArgumentParser:
    """Return the command-line parser."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--weights", type=Path, help="weights file (default: the shipped one)")
    add("--dataroot", type=Path, required=True, help="folder of a nuScenes data set")
    add("--version", default="v1.0-synth", help="version folder of the data set (default v1.0-synth)")
    add("--split", default="held_out", help="split to score, the devkit's or a custom one (default held_out)")
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--camera-model", default="auto", help="auto (default), virtual or as_is: how cameras are seen")
    add("--output", type=Path, help="also write the metrics as JSON to this file")
    return parser


def evaluate_detector(detector: Detector, dataroot: Path, version: str, split: str) -> dict[str, Any]:
    """Return the metrics of a detector on a split, and the median time of a step in milliseconds, without
    image decoding."""
    dataset = open_dataset(dataroot, version)
    tokens = sample_tokens_of(dataset, split=split)
    results, seconds = detect_samples(detector, dataset, tokens)
    metrics = evaluate(dataset, results, sample_tokens=tokens)
    return {
        **metrics,
        "frames": len(tokens),
        "step_ms_median": float(np.median(seconds) * 1e3),
        "weights": detector.weights_name,
        "split": split,
        "machine": {
            "device": str(detector.device),
            "gpu": torch.cuda.get_device_name() if detector.device.type == "cuda" else None,
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
    }


def scene_cameras(detector: Detector, sensors: Iterable[str]) -> tuple[str, ...]:
    """Return the cameras of a scene that a detector gets: its own channels by name or, if the scene lacks one
    of them, all cameras of the scene, which the detector assigns by yaw. It needs canonical cameras for
    that."""
    known = tuple(name for name in sensors if name.startswith("CAM"))
    if not detector.cameras.canonical or set(detector.channels) <= set(known):
        return detector.channels
    return known


def detect_samples(
    detector: Detector, dataset: NuScenes, tokens: Sequence[str]
) -> tuple[dict[str, Any], list[float]]:
    """Stream key frames scene by scene through a detector; return the results in the devkit's format and the
    seconds of each step, without image decoding. Tokens of a scene must be consecutive."""
    detections: dict[str, PosedObjects] = {}
    seconds: list[float] = []
    scene, channels = "", detector.channels
    for token in tqdm(tokens, desc="detect", unit="frame"):
        sample = dataset.get("sample", token)
        if sample["scene_token"] != scene:
            detector.reset()
            detector.cameras.forget()
            scene = sample["scene_token"]
            channels = scene_cameras(detector, sample["data"])
        camera = camera_round(dataset, token, channels)
        began = time.perf_counter()
        objects = detector.step(camera)
        seconds.append(time.perf_counter() - began)
        detections[token] = PosedObjects(objects, camera.global_from_ego)
    return to_devkit_results(detections, tokens), seconds


def score_weights(options: ValidateOptions) -> dict[str, Any]:
    """Return the metrics of a weights file on a split as during training: with the plain model, windows of
    key frames for a SparseBEV, and without the runtime of the node."""
    assert options.weights is not None
    model, config = _read_model(options.weights)
    with tempfile.TemporaryDirectory() as cache:
        clips = NuScenesClips(
            options.dataroot, options.version, options.split, config.image, config.channels, Path(cache)
        )
        clips.prepare()
        found = detect_scenes(model, clips, range(len(clips)), resolve_device(options.device))
    metrics = score_scenes([found], options.dataroot, options.version)
    return {
        **metrics, "frames": len(found.counts), "weights": options.weights.name, "split": options.split,
    }  # fmt: skip


def _read_model(path: Path) -> tuple[StreamPETR | SparseBEV, DetectorConfig | SparseBEVConfig]:
    """Return the model of a weights file and its configuration."""
    if isinstance(read_config(path), SparseBEVConfig):
        state, windows, _ = read_window_weights(path)
        teacher = build_sparse_bev(windows)
        load_into(teacher, state, str(path))
        return teacher, windows
    state, config, _ = read_weights(path)
    student = build_stream_petr(config)
    load_into(student, state, str(path))
    return student, config


def validate(options: ValidateOptions) -> dict[str, Any]:
    """Return the metrics of a weights file and write them to `options.output`, if given. Raise UserError for
    missing data or wrong weights."""
    if options.weights is not None and isinstance(read_config(options.weights), SparseBEVConfig):
        metrics = score_weights(options)
    else:
        detector = Detector.from_weights(
            options.weights, device=options.device, score_threshold=SCORE_THRESHOLD,
            camera_model=options.camera_model,
        )  # fmt: skip
        metrics = evaluate_detector(detector, options.dataroot, options.version, options.split)
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    return metrics


def main(argv: Sequence[str] | None = None, prog: str = "python -m training.validate") -> int:
    """Entry point. Bad input is reported in one sentence with exit code 2."""
    options = ValidateOptions(**vars(make_parser(prog).parse_args(argv)))
    try:
        metrics = validate(options)
    except UserError as error:
        print(f"validation: {error}", file=sys.stderr)
        return 2
    print(json.dumps(metrics, indent=2))
    if options.output is not None:
        print(f"wrote {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
