# SPDX-License-Identifier: Apache-2.0
"""True and false positives by scene, so that mAP of any selection of scenes costs only a sort.

The devkit matches and scores all key frames at once; mAP of all scenes equals its result.
"""

from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from nuscenes.eval.detection.data_classes import DetectionBox

from ftkd_core.evaluation.nuscenes import SubsetEvaluation

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
