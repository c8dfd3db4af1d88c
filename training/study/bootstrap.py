# SPDX-License-Identifier: Apache-2.0
"""Interval of the difference in mAP between two rows of an experiment, by drawing held-out scenes.

    python -m training.study.bootstrap --out runs/matrix --rows ftkd,ftkd_blind --draws 1000

Scenes are drawn with replacement, the same for all runs; each draw gives the mean over seeds of the paired
difference in mAP. It shows how much of a difference depends on the choice of scenes, which the interval over
seeds (`training.study.table`) does not. The matches of each key frame are computed once, so a draw costs only
a sort; mAP of the whole set equals the devkit's.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from nuscenes.eval.detection.data_classes import DetectionBox

from ftkd_core.data.nuscenes import NuScenes, open_dataset
from ftkd_core.errors import UserError
from ftkd_core.evaluation.nuscenes import SubsetEvaluation
from training.study.json_files import write_json
from training.study.matrix import method_of, seed_of
from training.study.scoring import SPLIT, VERSION, devkit_results

_LEVEL: Final = 0.95
_RECALLS: Final = 101
_LEAST: Final = 0.1  # of recall and of precision: the devkit's configuration

Array = NDArray[np.float64]


class SceneMatches(NamedTuple):
    """Detections of one scene and class: scores (M,); whether each is a true positive, (D, M) for the D
    distance thresholds; number of true objects."""

    scores: Array
    right: NDArray[np.bool_]
    truths: int


def match_scenes(evaluation: SubsetEvaluation, scenes: Mapping[str, str]) -> list[dict[str, SceneMatches]]:
    """Return the matches by class of each scene, in the order of the key frames. scenes: scene by sample
    token."""
    found: dict[str, dict[str, list[SceneMatches]]] = {}
    for token in evaluation.gt_boxes.sample_tokens:
        own = found.setdefault(scenes[token], {})
        for name in evaluation.cfg.class_names:
            truth = [box for box in evaluation.gt_boxes[token] if box.detection_name == name]
            boxes = [box for box in evaluation.pred_boxes[token] if box.detection_name == name]
            own.setdefault(name, []).append(_match(truth, boxes, evaluation.cfg.dist_ths))
    return [{name: _join(parts) for name, parts in own.items()} for own in found.values()]


def _match(
    truth: Sequence[DetectionBox], boxes: Sequence[DetectionBox], thresholds: Sequence[float]
) -> SceneMatches:
    """Match one key frame: by falling score, a detection takes the nearest free object within the
    threshold."""
    scores = np.array([box.detection_score for box in boxes], dtype=np.float64)
    order = np.argsort(scores, kind="stable")[::-1]  # as the devkit orders equal scores
    right = np.zeros((len(thresholds), len(boxes)), dtype=bool)
    if truth and boxes:
        true = np.array([box.translation[:2] for box in truth])
        seen = np.array([box.translation[:2] for box in boxes])
        distance = np.linalg.norm(seen[:, None] - true[None], axis=-1)
        for row, threshold in enumerate(thresholds):
            free = np.ones(len(truth), dtype=bool)
            for place in order:
                nearest = int(np.where(free, distance[place], np.inf).argmin())
                if free[nearest] and distance[place, nearest] < threshold:
                    free[nearest] = False
                    right[row, place] = True
    return SceneMatches(scores, right, len(truth))


def _join(parts: Sequence[SceneMatches]) -> SceneMatches:
    return SceneMatches(
        np.concatenate([part.scores for part in parts]),
        np.concatenate([part.right for part in parts], axis=1),
        sum(part.truths for part in parts),
    )


def mean_ap(scenes: Sequence[Mapping[str, SceneMatches]]) -> float:
    """Return mAP of scenes, which may repeat, as the devkit computes it: classes without true objects have an
    AP of 0."""
    values = []
    for name in scenes[0]:
        whole = _join([scene[name] for scene in scenes])
        order = np.argsort(whole.scores, kind="stable")[::-1]
        values.append(np.mean([_average_precision(row[order], whole.truths) for row in whole.right]))
    return float(np.mean(values))


def _average_precision(right: NDArray[np.bool_], truths: int) -> float:
    """Return the AP of detections (M,) by falling score."""
    if not truths or not right.any():
        return 0.0
    positives = np.cumsum(right).astype(np.float64)
    precision, recall = positives / np.arange(1, len(right) + 1), positives / truths
    curve = np.interp(np.linspace(0, 1, _RECALLS), recall, precision, right=0)
    used = curve[round(100 * _LEAST) + 1 :] - _LEAST
    return float(np.clip(used, 0, None).mean()) / (1.0 - _LEAST)


def bootstrap(
    pairs: Sequence[tuple[Sequence[Mapping[str, SceneMatches]], Sequence[Mapping[str, SceneMatches]]]],
    draws: int,
    seed: int = 0,
) -> dict[str, float]:
    """Return the mean difference in mAP, its interval over drawn scenes, and the share of draws above 0.

    pairs: matches of the first and the second row by seed, each with the same scenes.
    """
    random, scenes = np.random.default_rng(seed), len(pairs[0][0])
    changes = []
    for _ in range(draws):
        drawn = random.integers(scenes, size=scenes)
        parts = [
            mean_ap([first[scene] for scene in drawn]) - mean_ap([second[scene] for scene in drawn])
            for first, second in pairs
        ]
        changes.append(float(np.mean(parts)))
    low, high = np.quantile(changes, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return {
        "difference": float(np.mean([mean_ap(first) - mean_ap(second) for first, second in pairs])),
        "low": float(low),
        "high": float(high),
        "share_above_0": float(np.mean(np.array(changes) > 0)),
    }


def read_matches(file: Path, dataset: NuScenes) -> list[dict[str, SceneMatches]]:
    """Return the matches of a file of detections by scene. UserError as `scoring.score`."""
    tokens, results = devkit_results(file, dataset, SPLIT)
    evaluation = SubsetEvaluation(dataset, results["results"], tokens)
    scenes = {token: dataset.get("sample", token)["scene_token"] for token in tokens}
    return match_scenes(evaluation, scenes)


def _files(out: Path, rows: Sequence[str]) -> list[tuple[Path, Path]]:
    """Return the detections of both rows by seed. UserError if the rows share no seed."""
    found: dict[str, dict[int, Path]] = {row: {} for row in rows}
    for file in sorted((out / "predictions").glob("*.npz")):
        if method_of(file.stem) in found:
            found[method_of(file.stem)][seed_of(file.stem)] = file
    first, second = found.values()
    seeds = sorted(first.keys() & second.keys())
    if not seeds:
        raise UserError(f"{str(out)!r} has no seed of both rows {' and '.join(rows)}; train them first")
    return [(first[seed], second[seed]) for seed in seeds]


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Bad input is reported in one sentence with exit code 2."""
    parser = argparse.ArgumentParser(
        prog="python -m training.study.bootstrap",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the experiment, already scored")
    parser.add_argument("--rows", default="ftkd,ftkd_blind", help="two rows (default ftkd,ftkd_blind)")
    parser.add_argument("--draws", type=int, default=1000, help="draws of scenes (default 1000)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    options = parser.parse_args(argv)
    rows = options.rows.split(",")
    try:
        if len(set(rows)) != 2 or options.draws < 1:
            raise UserError(
                f"--rows {options.rows}, --draws {options.draws}: expected two rows and 1 or more"
            )
        files = _files(options.out, rows)
        dataset = open_dataset(options.out / "held_out", VERSION)
        pairs = [(read_matches(a, dataset), read_matches(b, dataset)) for a, b in files]
        values: dict[str, Any] = {"rows": rows, "seeds": len(pairs), "scenes": len(pairs[0][0])}
        values |= {"draws": options.draws, **bootstrap(pairs, options.draws)}
    except UserError as error:
        print(f"bootstrap: {error}", file=sys.stderr)
        return 2
    print(json.dumps(values, indent=1))
    if options.json is not None:
        write_json(options.json, values)
    return 0


if __name__ == "__main__":
    sys.exit(main())
