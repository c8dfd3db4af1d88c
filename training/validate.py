# SPDX-License-Identifier: Apache-2.0
"""Official metrics of a weights file on a nuScenes data set, frame by frame through the detector.

    ftkd synth --output build/held_out --scenes 8 --first-seed 900000 --split held_out
    python -m training.validate --dataroot build/held_out --weights runs/tiny/weights.safetensors

Key frames are streamed scene by scene (2 Hz), as in training. Prints a table and writes metrics.json.
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from ftkd_core.data.nuscenes import camera_round, open_dataset
from ftkd_core.errors import UserError
from ftkd_core.evaluation.nuscenes import PosedObjects, evaluate, sample_tokens_of, to_devkit_results
from ftkd_core.json_files import write_json
from ftkd_core.runtime.detector import Detector


def make_parser() -> argparse.ArgumentParser:
    """Command line of `python -m training.validate`."""
    parser = argparse.ArgumentParser(
        prog="python -m training.validate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--weights", type=Path, help="weights file (default: the shipped one)")
    parser.add_argument("--dataroot", type=Path, required=True, help="folder of a nuScenes data set")
    parser.add_argument("--version", default="v1.0-synth", help="its version folder (default v1.0-synth)")
    parser.add_argument("--split", default="held_out", help="split to score, the devkit's or a custom one")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--output", type=Path, help="write metrics as JSON to this file")
    return parser


def validate(detector: Detector, dataroot: Path, version: str, split: str) -> dict[str, Any]:
    """Metrics of a detector on a split, and the median milliseconds of a step (images decoded before)."""
    dataset = open_dataset(dataroot, version)
    tokens = sample_tokens_of(dataset, split=split)
    detections: dict[str, PosedObjects] = {}
    seconds: list[float] = []
    scene = ""
    for token in tqdm(tokens, desc="detect", unit="frame"):
        sample = dataset.get("sample", token)
        if sample["scene_token"] != scene:
            detector.reset()
            scene = sample["scene_token"]
        camera = camera_round(dataset, token, detector.channels)
        began = time.perf_counter()
        objects = detector.step(camera)
        seconds.append(time.perf_counter() - began)
        detections[token] = PosedObjects(objects, camera.global_from_ego)
    metrics = evaluate(dataset, to_devkit_results(detections, tokens), sample_tokens=tokens)
    machine = {
        "device": str(detector.device),
        "gpu": torch.cuda.get_device_name() if detector.device.type == "cuda" else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    return {
        **metrics,
        "frames": len(tokens),
        "step_ms_median": float(np.median(seconds) * 1e3),
        "weights": detector.weights_name,
        "split": split,
        "machine": machine,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; bad input is one sentence and exit code 2."""
    arguments = make_parser().parse_args(argv)
    try:
        detector = Detector.from_weights(arguments.weights, device=arguments.device, score_threshold=0.01)
        metrics = validate(detector, arguments.dataroot, arguments.version, arguments.split)
    except UserError as error:
        print(f"validation: {error}", file=sys.stderr)
        return 2
    text = json.dumps(metrics, indent=2)
    print(text)
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        write_json(arguments.output, metrics)
        print(f"wrote {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
