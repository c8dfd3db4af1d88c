# SPDX-License-Identifier: Apache-2.0
"""Score threshold per class with the best F1 on held-out scenes; the node uses them by default.

    python -m benchmarks.score_thresholds --dataroot build/held_out --version v1.0-synth --output FILE

A detection is right if a ground-truth object of its class, not matched by a stronger detection, is within
2 m of its centre. Classes without ground truth get the mean of the others. Store the file as
WEIGHTS.thresholds.json next to WEIGHTS.safetensors.
"""

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from benchmarks.report import write_figures
from ftkd_core.classes import CLASS_NAMES
from ftkd_core.data.nuscenes import camera_round, ground_truth, open_dataset, scene_names
from ftkd_core.errors import UserError
from ftkd_core.evaluation.nuscenes import sample_tokens_of
from ftkd_core.runtime.detector import Detector
from ftkd_core.types import ObjectList

RADIUS_M: Final = 2.0
_SMALLEST: Final = 0.05


def best_thresholds(frames: Iterable[tuple[ObjectList, ObjectList]]) -> dict[str, dict[str, float]]:
    """Return threshold, F1, precision and recall by class from (detections, ground truth) of each frame."""
    scores: list[list[float]] = [[] for _ in CLASS_NAMES]
    right: list[list[bool]] = [[] for _ in CLASS_NAMES]
    truths = np.zeros(len(CLASS_NAMES), dtype=int)
    for found, truth in frames:
        for label in range(len(CLASS_NAMES)):
            own, real = found.select(found.labels == label), truth.select(truth.labels == label)
            truths[label] += len(real.boxes)
            scores[label] += own.scores.tolist()
            right[label] += match(own, real).tolist()
    return {
        name: best_f1(np.array(scores[label]), np.array(right[label], dtype=bool), int(truths[label]))
        for label, name in enumerate(CLASS_NAMES)
        if truths[label]
    }


def match(found: ObjectList, truth: ObjectList) -> NDArray[np.bool_]:
    """Return for each detection whether it is the strongest one within 2 m of an object."""
    right = np.zeros(len(found.boxes), dtype=bool)
    free = np.ones(len(truth.boxes), dtype=bool)
    for index in np.argsort(-found.scores, kind="stable"):
        distance = np.hypot(*(truth.boxes[:, :2] - found.boxes[index, :2]).T)
        distance[~free] = np.inf
        if len(distance) and distance.min() <= RADIUS_M:
            free[int(distance.argmin())] = False
            right[index] = True
    return right


def best_f1(scores: NDArray[np.float64], right: NDArray[np.bool_], truths: int) -> dict[str, float]:
    """Return the threshold with the best F1, with its F1, precision and recall."""
    order = np.argsort(-scores, kind="stable")
    hits = np.cumsum(right[order])
    counts = np.arange(1, len(order) + 1)
    f1 = 2 * hits / (counts + truths)
    ends = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True)) if len(order) else np.zeros(0, int)
    if not len(ends) or f1[ends].max() == 0:
        return {"threshold": 1.0, "f1": 0.0, "precision": 0.0, "recall": 0.0}
    best = ends[int(f1[ends].argmax())]
    return {
        "threshold": round(max(float(scores[order][best]) - 5e-4, _SMALLEST), 3),
        "f1": round(float(f1[best]), 4),
        "precision": round(float(hits[best] / counts[best]), 4),
        "recall": round(float(hits[best] / truths), 4),
    }


def detect(dataroot: Path, version: str, weights: Path | None) -> Iterable[tuple[ObjectList, ObjectList]]:
    """Yield detections with all scores and ground truth of each key frame of a data set."""
    dataset = open_dataset(dataroot, version)
    detector = Detector.from_weights(weights, score_threshold=0.0)
    scene = ""
    for token in tqdm(sample_tokens_of(dataset, scenes=scene_names(dataset)), desc="detect", unit="frame"):
        sample = dataset.get("sample", token)
        if sample["scene_token"] != scene:
            detector.reset()
            scene = sample["scene_token"]
        found = detector.step(camera_round(dataset, token, detector.channels))
        yield found, ground_truth(dataset, token, min_points=1)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a table and write the JSON file. Returns 2 for an error."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0] if __doc__ else None)
    parser.add_argument("--dataroot", type=Path, required=True, help="data set of held-out scenes")
    parser.add_argument("--version", required=True, help="version of the data set, such as v1.0-synth")
    parser.add_argument("--weights", type=Path, help="weights file  [default: the shipped one]")
    parser.add_argument("--output", type=Path, required=True, help="JSON file for the thresholds")
    options = parser.parse_args(arguments)
    try:
        found = best_thresholds(detect(options.dataroot, options.version, options.weights))
    except UserError as error:
        print(f"benchmarks.score_thresholds: {error}", file=sys.stderr)
        return 2
    for name, row in found.items():
        print(f"{name:22} " + "  ".join(f"{key} {value:.3f}" for key, value in row.items()))
    mean = round(float(np.mean([row["threshold"] for row in found.values()])), 3)
    thresholds = {name: found[name]["threshold"] if name in found else mean for name in CLASS_NAMES}
    content: dict[str, Any] = {"class_score_thresholds": thresholds, "classes": found}
    write_figures(options.output, content)
    return 0


if __name__ == "__main__":
    sys.exit(main())
