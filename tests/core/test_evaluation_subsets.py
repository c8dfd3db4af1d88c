# SPDX-License-Identifier: Apache-2.0
"""Scores of subsets of the objects; detections of other objects are ignored."""

import json
from dataclasses import replace

import numpy as np
import pytest
from nuscenes.eval.detection.evaluate import DetectionEval
from nuscenes.nuscenes import NuScenes

from ftkd_core.data.nuscenes import ground_truth, sample_pose
from ftkd_core.data.synthetic.export import write_dataset
from ftkd_core.evaluation.nuscenes import (
    PosedObjects,
    SubsetEvaluation,
    evaluate,
    sample_tokens_of,
    to_devkit_results,
)
from ftkd_core.evaluation.results_check import load_results
from ftkd_core.evaluation.subsets import SUBSETS, evaluate_subsets
from ftkd_core.types import ObjectList

SPLIT = "some"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> NuScenes:
    root = write_dataset(
        tmp_path_factory.mktemp("synth") / "data", [900_003], version="v1.0-synth", split=SPLIT,
        width=160, height=90, duration_s=3.0, sweeps=False, progress=False,
    )  # fmt: skip
    return NuScenes("v1.0-synth", str(root), verbose=False)


def truth(dataset: NuScenes) -> dict[str, PosedObjects]:
    """Return the objects that the devkit scores, as perfect detections."""
    return {
        token: PosedObjects(ground_truth(dataset, token, min_points=1), sample_pose(dataset, token))
        for token in sample_tokens_of(dataset, split=SPLIT)
    }


def scores(dataset: NuScenes, found: dict[str, PosedObjects]) -> dict[str, dict[str, float | int | None]]:
    return evaluate_subsets(dataset, to_devkit_results(found, found), list(found))


def keep(posed: PosedObjects, chosen: np.ndarray) -> PosedObjects:
    return posed._replace(objects=posed.objects.select(chosen))


def distance(posed: PosedObjects) -> np.ndarray:
    return np.linalg.norm(posed.objects.boxes[:, :2], axis=1)


def test_evaluation_per_class_is_bit_identical_to_the_devkit(dataset: NuScenes) -> None:
    """Uses ten classes and detections that are moved, duplicated, of the wrong class or of equal score."""
    rng = np.random.default_rng(4)
    found = {}
    for token, posed in truth(dataset).items():
        objects = posed.objects
        boxes = objects.boxes.repeat(4, axis=0)
        boxes[:, :2] += rng.normal(0, 1.0, boxes[:, :2].shape)
        labels = objects.labels.repeat(4)
        labels = np.where(rng.random(len(labels)) < 0.3, rng.integers(0, 10, len(labels)), labels)
        scores = rng.integers(1, 8, len(labels)) / 8
        made = ObjectList(boxes=boxes, labels=labels, scores=scores, stamp_ns=0)
        found[token] = posed._replace(objects=made)
    results = load_results(to_devkit_results(found, found))
    evaluation = SubsetEvaluation(dataset, results, list(found))
    ours, our_data = evaluation.evaluate()
    plain, plain_data = DetectionEval.evaluate(evaluation)
    assert 0.05 < plain.mean_ap < 0.9
    for metrics in (ours, plain):
        metrics.add_runtime(0)
    assert json.dumps(ours.serialize()) == json.dumps(plain.serialize())  # as text, nan equals nan
    assert json.dumps(our_data.serialize()) == json.dumps(plain_data.serialize())


def test_perfect_detections_score_perfectly_in_every_subset(dataset: NuScenes) -> None:
    found = scores(dataset, truth(dataset))
    assert set(found) == set(SUBSETS)
    for name, values in found.items():
        if values["truths"]:
            assert values["AP"] == pytest.approx(1, abs=1e-6), name
            assert values["AVE"] is None or values["AVE"] < 1e-6
        else:
            assert values["AP"] is None
    whole = evaluate(dataset, to_devkit_results(truth(dataset), truth(dataset)), split=SPLIT)
    count = sum(part["truths"] for part in whole["classes"].values())
    for kind in ("visibility", "distance", "seen"):
        assert sum(int(v["truths"] or 0) for n, v in found.items() if n.startswith(kind)) == count


def test_wrong_velocities_of_moving_objects_appear_in_their_subset_only(dataset: NuScenes) -> None:
    halved = {}
    for token, posed in truth(dataset).items():
        objects = posed.objects
        boxes = objects.boxes.copy()
        moving = np.linalg.norm(boxes[:, 7:9], axis=1) > 0.5
        boxes[moving, 7:9] /= 2
        made = ObjectList(boxes=boxes, labels=objects.labels, scores=objects.scores, stamp_ns=0)
        halved[token] = posed._replace(objects=made)
    found = scores(dataset, halved)
    assert found["moving"]["truths"] and found["standing"]["truths"]
    assert float(found["moving"]["AVE"] or 0) > 0.25
    assert float(found["standing"]["AVE"] or 0) < 0.1


def test_missed_far_objects_do_not_affect_near_subsets(dataset: NuScenes) -> None:
    """Detections of far objects are no false alarms nearby either."""
    near_only = {token: keep(posed, distance(posed) < 30) for token, posed in truth(dataset).items()}
    found = scores(dataset, near_only)
    assert found["distance_0_20"]["AP"] == pytest.approx(1, abs=1e-6)
    assert found["distance_40_"]["truths"] and found["distance_40_"]["AP"] == 0
    assert 0 < float(found["distance_20_40"]["AP"] or 0) < 1


def test_false_alarms_count_in_the_distance_subset_of_their_position(dataset: NuScenes) -> None:
    invented = {}
    for token, posed in truth(dataset).items():
        objects = posed.objects
        boxes = objects.boxes[:1].repeat(200, axis=0)
        angle = np.linspace(0, 2 * np.pi, 200)
        boxes[:, 0], boxes[:, 1] = 30 * np.cos(angle), 30 * np.sin(angle)
        labels = np.resize(np.arange(10), 200)
        invented[token] = posed._replace(
            objects=replace(
                objects,
                boxes=np.concatenate([objects.boxes, boxes]),
                scores=np.concatenate([objects.scores * 0.4, np.full(200, 0.9)]),
                labels=np.concatenate([objects.labels, labels]),
                ids=(),
            )
        )
    found = scores(dataset, invented)
    assert found["distance_0_20"]["AP"] == pytest.approx(1, abs=1e-6)
    assert float(found["distance_20_40"]["AP"] or 0) < 0.7
    assert (
        float(found["visibility_80_100"]["AP"] or 0) < 0.9
    )  # unmatched detections count in every visibility subset
