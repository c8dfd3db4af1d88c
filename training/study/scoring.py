# SPDX-License-Identifier: Apache-2.0
"""Official scores of files of detections (predicting.py). This needs the nuScenes devkit, so it is imported
where scoring begins: a machine without the devkit can train and detect.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ftkd_core.data.nuscenes import NuScenes, sample_pose
from ftkd_core.errors import UserError
from ftkd_core.evaluation.nuscenes import PosedObjects, evaluate, sample_tokens_of, to_devkit_results
from ftkd_core.evaluation.subsets import evaluate_subsets
from ftkd_core.types import ObjectList

_SAME_POSE_M = 1e-3


def score(predictions: Path, dataset: NuScenes, split: str, *, still: bool = False) -> dict[str, Any]:
    """Official metrics of a file of `predicting.predict` on the data set of the same seeds; `still`, had it
    said of everything that it stands. UserError where the two are not of the same drives."""
    tokens, results = _results(predictions, dataset, split)
    if still:
        for found in results["results"].values():
            for box in found:
                box["velocity"] = [0.0, 0.0]
    return evaluate(dataset, results, sample_tokens=tokens)


def score_subsets(predictions: Path, dataset: NuScenes, split: str) -> dict[str, Any]:
    """Official metrics of part of the objects at a time, as `evaluation.subsets`; errors as of `score`."""
    tokens, results = _results(predictions, dataset, split)
    return evaluate_subsets(dataset, results, tokens)


def _results(predictions: Path, dataset: NuScenes, split: str) -> tuple[tuple[str, ...], dict[str, Any]]:
    tokens = sample_tokens_of(dataset, split=split)
    return tokens, to_devkit_results(_posed(predictions, dataset, tokens), tokens)


def _posed(predictions: Path, dataset: NuScenes, tokens: Sequence[str]) -> dict[str, PosedObjects]:
    with np.load(predictions, allow_pickle=False) as file:
        values = {name: file[name] for name in file.files}
    if len(values["counts"]) != len(tokens):
        raise UserError(
            f"{str(predictions)!r} holds {len(values['counts'])} frames, the data set {len(tokens)}; "
            "expected the same seeds and durations"
        )
    splits = np.cumsum(values["counts"])[:-1]
    columns = [np.split(values[name], splits) for name in ("boxes", "scores", "labels")]
    found = {}
    for place, token in enumerate(tokens):
        pose = values["global_from_ego"][place]
        if np.abs(pose - sample_pose(dataset, token)).max() > _SAME_POSE_M:
            raise UserError(f"{str(predictions)!r} and the data set differ in where frame {place} was taken")
        boxes, scores, labels = (column[place] for column in columns)
        objects = ObjectList(
            boxes=boxes.astype(np.float64), scores=scores.astype(np.float64), labels=labels, stamp_ns=0
        )
        found[token] = PosedObjects(objects, pose)
    return found
