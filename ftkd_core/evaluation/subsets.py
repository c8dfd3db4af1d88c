# SPDX-License-Identifier: Apache-2.0
"""Official metrics of subsets of the objects: by visibility, distance, time since first seen, and motion.

The subsets show where future frames help. Detections of objects outside a subset are ignored: a detection is
dropped if the nearest true object of its class within 2 m is not in the subset. The rest is scored by the
devkit's own functions. Source: ours; the devkit has no such split.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from nuscenes.eval.common.data_classes import EvalBoxes
from nuscenes.eval.detection.data_classes import DetectionBox
from nuscenes.nuscenes import NuScenes

from ftkd_core.evaluation.nuscenes import ERROR_NAMES, SubsetEvaluation
from ftkd_core.evaluation.results_check import load_results

_SAME_OBJECT_M: Final = 2.0
_NEW_S: Final = 1.0
_MOVING_M_S: Final = 0.5


class ObjectFacts(NamedTuple):
    """visibility 1 (least) to 4; distance from ego in metres; seen_s seconds since the lidar first saw the
    object in its scene; its speed in m/s, nan if unknown."""

    visibility: int
    distance_m: float
    seen_s: float
    speed_m_s: float = math.nan


Choice = Callable[[ObjectFacts], bool]
SUBSETS: Final[dict[str, Choice]] = {
    "visibility_0_40": lambda facts: facts.visibility == 1,
    "visibility_40_60": lambda facts: facts.visibility == 2,
    "visibility_60_80": lambda facts: facts.visibility == 3,
    "visibility_80_100": lambda facts: facts.visibility == 4,
    "distance_0_20": lambda facts: facts.distance_m < 20,
    "distance_20_40": lambda facts: 20 <= facts.distance_m < 40,
    "distance_40_": lambda facts: facts.distance_m >= 40,
    "seen_less_than_1_s": lambda facts: facts.seen_s < _NEW_S,
    "seen_1_s_or_longer": lambda facts: facts.seen_s >= _NEW_S,
    "moving": lambda facts: facts.speed_m_s > _MOVING_M_S,
    "standing": lambda facts: facts.speed_m_s <= _MOVING_M_S,
}
_BY_DISTANCE: Final = {name: choice for name, choice in SUBSETS.items() if name.startswith("distance")}


class SubsetScorer:
    """Scores subsets of the objects of some key frames; facts and matches are computed once.

    results: a results dictionary or file. Raises UserError as `SubsetEvaluation`.
    """

    def __init__(
        self, dataset: NuScenes, results: Mapping[str, Any] | str | Path, sample_tokens: Sequence[str]
    ) -> None:
        self._evaluation = SubsetEvaluation(dataset, load_results(results), sample_tokens)
        self._truth, self._found = self._evaluation.gt_boxes, self._evaluation.pred_boxes
        self._facts = _object_facts(dataset, self._truth)
        self._nearest = {
            token: _nearest_facts(self._truth[token], self._found[token], self._facts)
            for token in self._truth.sample_tokens
        }

    def score(self, choice: Choice, *, by_distance: bool = False) -> dict[str, Any]:
        """Return AP (mean over the classes with such objects), the five errors (means over the classes with a
        known one), `truths`, and the same by class; None if there is nothing to score.

        A detection without an object nearby counts against a subset, with `by_distance` if it lies there.
        """
        chosen_truth, chosen_found = EvalBoxes(), EvalBoxes()
        for token in self._truth.sample_tokens:
            kept = [box for box in self._truth[token] if choice(self._facts[_box_key(box)])]
            chosen_truth.add_boxes(token, kept)
            found = [
                box
                for box, near in zip(self._found[token], self._nearest[token], strict=True)
                if (choice(near) if near is not None else not by_distance or choice(_facts_of(box)))
            ]
            chosen_found.add_boxes(token, found)
        self._evaluation.gt_boxes, self._evaluation.pred_boxes = chosen_truth, chosen_found
        return _scores(self._evaluation)

    def score_range(self, low_m: float, high_m: float) -> dict[str, Any]:
        """Return the scores of objects from `low_m` to below `high_m` metres from ego."""
        return self.score(lambda facts: low_m <= facts.distance_m < high_m, by_distance=True)

    def score_all(self) -> dict[str, dict[str, Any]]:
        """Return the scores of each of `SUBSETS`."""
        return {
            name: self.score(choice, by_distance=name in _BY_DISTANCE) for name, choice in SUBSETS.items()
        }


def evaluate_subsets(
    dataset: NuScenes, results: Mapping[str, Any], sample_tokens: Sequence[str]
) -> dict[str, dict[str, float | int | None]]:
    """For each of `SUBSETS`, return AP (mean over the classes with such objects), AVE over the classes with
    known velocity, and the number of true objects; None if there is nothing to score."""
    scores = SubsetScorer(dataset, results, sample_tokens).score_all()
    return {name: {key: own[key] for key in ("AP", "AVE", "truths")} for name, own in scores.items()}


def _facts_of(box: DetectionBox) -> ObjectFacts:
    """Return facts of a detection without an object, of which only the distance is known."""
    return ObjectFacts(4, float(box.ego_dist), 0.0)


def _scores(evaluation: SubsetEvaluation) -> dict[str, Any]:
    truths: dict[str, int] = {}
    for box in evaluation.gt_boxes.all:
        truths[box.detection_name] = truths.get(box.detection_name, 0) + 1
    if not truths:
        return {"AP": None, **dict.fromkeys(ERROR_NAMES), "truths": 0, "classes": {}}
    metrics, _ = evaluation.evaluate()
    classes: dict[str, dict[str, Any]] = {
        name: {
            "AP": float(metrics.mean_dist_aps[name]),
            **{short: _finite(metrics.get_label_tp(name, long)) for short, long in ERROR_NAMES.items()},
            "truths": count,
        }
        for name, count in truths.items()
    }
    means: dict[str, Any] = {}
    for key in ("AP", *ERROR_NAMES):
        known = [own[key] for own in classes.values() if own[key] is not None]
        means[key] = float(np.mean(known)) if known else None
    return {**means, "truths": sum(truths.values()), "classes": classes}


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _box_key(box: DetectionBox) -> tuple[str, tuple[float, ...]]:
    return box.sample_token, tuple(box.translation)


def _object_facts(dataset: NuScenes, truth: EvalBoxes) -> dict[tuple[str, tuple[float, ...]], ObjectFacts]:
    """Collect facts by sample and position, because the devkit's boxes do not name their annotation."""
    facts = {}
    first_seen: dict[str, float] = {}
    for token in truth.sample_tokens:
        sample = dataset.get("sample", token)
        now = sample["timestamp"] * 1e-6
        for annotation_token in sample["anns"]:
            annotation = dataset.get("sample_annotation", annotation_token)
            instance = annotation["instance_token"]
            if instance not in first_seen:
                first_seen[instance] = _first_seen(dataset, instance)
            key = (token, tuple(annotation["translation"]))
            facts[key] = ObjectFacts(
                int(annotation["visibility_token"] or 4), 0.0, now - first_seen[instance]
            )
    return {
        _box_key(box): facts[_box_key(box)]._replace(
            distance_m=float(box.ego_dist), speed_m_s=float(np.linalg.norm(box.velocity))
        )
        for box in truth.all
    }


def _first_seen(dataset: NuScenes, instance: str) -> float:
    """Seconds of the first sample in which lidar or radar saw the instance."""
    token = dataset.get("instance", instance)["first_annotation_token"]
    annotation = dataset.get("sample_annotation", token)
    while not annotation["num_lidar_pts"] + annotation["num_radar_pts"] and annotation["next"]:
        annotation = dataset.get("sample_annotation", annotation["next"])
    return float(dataset.get("sample", annotation["sample_token"])["timestamp"]) * 1e-6


def _nearest_facts(
    truth: Sequence[DetectionBox],
    found: Sequence[DetectionBox],
    facts: Mapping[tuple[str, tuple[float, ...]], ObjectFacts],
) -> list[ObjectFacts | None]:
    """Return for each detection the facts of the nearest true object of its class within 2 m, or None."""
    nearest: list[ObjectFacts | None] = [None] * len(found)
    for name in {box.detection_name for box in truth}:
        same = [box for box in truth if box.detection_name == name]
        index = [place for place, box in enumerate(found) if box.detection_name == name]
        if not index:
            continue
        true_centers = np.array([box.translation[:2] for box in same])
        found_centers = np.array([found[place].translation[:2] for place in index])
        offsets = found_centers[:, None] - true_centers[None]  # (detections, objects, 2)
        distance = np.linalg.norm(offsets, axis=-1)
        for place, row in zip(index, distance, strict=True):
            if row.min() <= _SAME_OBJECT_M:
                nearest[place] = facts[_box_key(same[int(row.argmin())])]
    return nearest
