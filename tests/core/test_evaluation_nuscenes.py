# SPDX-License-Identifier: Apache-2.0
"""Evaluation equals the devkit's numbers, and its notes state the devkit's conventions."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from nuscenes.eval.common.config import config_factory
from nuscenes.eval.detection.evaluate import DetectionEval
from nuscenes.nuscenes import NuScenes
from pyquaternion import Quaternion

from ftkd_core.boxes import transform_boxes
from ftkd_core.classes import CLASS_NAMES
from ftkd_core.errors import UserError
from ftkd_core.evaluation.nuscenes import PosedObjects, evaluate, sample_tokens_of, to_devkit_results
from ftkd_core.geometry import invert_rigid, make_transform, quaternion_to_rotation, yaw_transform
from ftkd_core.types import ObjectList
from tests.core.tiny_nuscenes import write_tiny_nuscenes

LABELS = {
    "vehicle.car": "car",
    "human.pedestrian.adult": "pedestrian",
    "movable_object.trafficcone": "traffic_cone",
}
SCENES = ("scene-0001", "scene-0002")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> NuScenes:
    root = write_tiny_nuscenes(tmp_path_factory.mktemp("tiny"))
    return NuScenes("v1.0-tiny", str(root), verbose=False)


def pose_of(dataset: NuScenes, token: str) -> NDArray[np.float64]:
    lidar = dataset.get("sample_data", dataset.get("sample", token)["data"]["LIDAR_TOP"])
    pose = dataset.get("ego_pose", lidar["ego_pose_token"])
    transform: NDArray[np.float64] = make_transform(pose["rotation"], pose["translation"])
    return transform


def true_objects(dataset: NuScenes, token: str) -> PosedObjects:
    """Return the annotations in ego, computed independently with pyquaternion, the devkit's velocity and
    torch's box transform."""
    boxes, labels = [], []
    for annotation in (dataset.get("sample_annotation", t) for t in dataset.get("sample", token)["anns"]):
        width, length, height = annotation["size"]
        yaw = Quaternion(annotation["rotation"]).yaw_pitch_roll[0]
        velocity = dataset.box_velocity(annotation["token"])[:2]
        boxes.append([*annotation["translation"], length, width, height, yaw, *velocity])
        labels.append(CLASS_NAMES.index(LABELS[annotation["category_name"]]))
    pose = pose_of(dataset, token)
    in_ego = transform_boxes(
        torch.from_numpy(invert_rigid(pose)), torch.tensor(boxes, dtype=torch.float64)
    ).numpy()
    scores = np.linspace(0.9, 0.5, len(boxes))
    return PosedObjects(ObjectList(boxes=in_ego, scores=scores, labels=np.array(labels), stamp_ns=0), pose)


def noisy(posed: PosedObjects, rng: np.random.Generator) -> PosedObjects:
    """Drop, move and invent some objects."""
    objects = posed.objects
    boxes = np.repeat(objects.boxes, 3, axis=0)
    boxes += rng.normal(0, [1.0, 1.0, 0.1, 0.1, 0.05, 0.05, 0.3, 0.5, 0.5], boxes.shape)
    boxes[:, 3:6] = np.abs(boxes[:, 3:6]) + 0.05
    keep = rng.random(len(boxes)) < 0.6
    labels = np.repeat(objects.labels, 3)
    made = ObjectList(boxes=boxes, scores=rng.random(len(boxes)), labels=labels, stamp_ns=0).select(keep)
    return PosedObjects(made, posed.global_from_ego)


def test_perfect_detections_score_perfectly_in_each_present_class(dataset: NuScenes) -> None:
    tokens = sample_tokens_of(dataset, scenes=SCENES)
    results = to_devkit_results({token: true_objects(dataset, token) for token in tokens}, tokens)
    summary = evaluate(dataset, results, scenes=SCENES)
    for name in ("car", "pedestrian", "traffic_cone"):
        metrics = summary["classes"][name]
        assert metrics["truths"] > 0
        assert metrics["AP"] == pytest.approx(1.0)
        for error in ("ATE", "ASE", "AOE", "AVE", "AAE"):
            assert metrics[error] is None or metrics[error] == pytest.approx(0.0, abs=1e-6), (name, error)
    assert summary["mAP"] == pytest.approx(0.3)
    assert summary["mAP_present"] == pytest.approx(1.0)
    assert summary["samples"] == 6
    assert "cannot exceed 0.30" in summary["notes"][0]


@pytest.mark.parametrize("split", ["all", "held_out"])
@pytest.mark.parametrize("seed", [0, 1])
def test_metrics_equal_those_of_the_devkit(dataset: NuScenes, tmp_path: Path, split: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    tokens = sample_tokens_of(dataset, split=split)
    results = to_devkit_results({token: noisy(true_objects(dataset, token), rng) for token in tokens}, tokens)
    path = tmp_path / "results.json"
    path.write_text(json.dumps(results))
    config = config_factory("detection_cvpr_2019")
    official, _ = DetectionEval(
        dataset, config, str(path), split, str(tmp_path / "devkit"), verbose=False
    ).evaluate()

    summary = evaluate(dataset, path, split=split, output_dir=tmp_path / "ours")
    assert 0.02 < summary["mAP"] < 0.3
    assert summary["mAP"] == official.mean_ap
    assert summary["NDS"] == official.nd_score
    assert summary["mATE"] == official.tp_errors["trans_err"]
    assert summary["mAVE"] == official.tp_errors["vel_err"]
    assert summary["classes"]["car"]["AP"] == official.mean_dist_aps["car"]
    assert summary == evaluate(dataset, results, sample_tokens=tokens)
    assert json.loads((tmp_path / "ours" / "metrics_summary.json").read_text()) == summary

    ours = json.loads((tmp_path / "ours" / "metrics_devkit.json").read_text())
    devkit = json.loads(json.dumps(official.serialize()).replace("NaN", "null"))
    for name in ("label_aps", "label_tp_errors", "tp_scores"):
        assert ours[name] == devkit[name]


def test_no_detections_score_zero_with_a_note(dataset: NuScenes) -> None:
    summary = evaluate(dataset, to_devkit_results({}, sample_tokens_of(dataset, split="all")), split="all")
    assert summary["mAP"] == 0.0
    assert summary["NDS"] == 0.0
    assert any("Nothing was detected" in note for note in summary["notes"])


def test_unknown_ground_truth_velocity_gives_a_note(tmp_path: Path) -> None:
    root = write_tiny_nuscenes(tmp_path)
    path = root / "v1.0-tiny" / "sample_annotation.json"
    alone = [{**row, "prev": "", "next": ""} for row in json.loads(path.read_text())]
    path.write_text(json.dumps(alone))
    dataset = NuScenes("v1.0-tiny", str(root), verbose=False)
    tokens = sample_tokens_of(dataset, split="held_out")
    posed = {token: true_objects(dataset, token) for token in tokens}
    assert np.isnan(posed[tokens[0]].objects.boxes[:, 7]).all()
    summary = evaluate(dataset, to_devkit_results(posed, tokens), split="held_out")
    assert summary["mAVE"] == 1.0
    assert any("velocity" in note for note in summary["notes"])
    assert summary["classes"]["car"]["AP"] == pytest.approx(1.0)
    json.dumps(summary, allow_nan=False)


def test_best_500_boxes_are_kept(dataset: NuScenes) -> None:
    token = sample_tokens_of(dataset, split="held_out")[0]
    rng = np.random.default_rng(0)
    boxes = np.tile([10.0, 0, 0, 4, 2, 1.5, 0, 0, 0], (700, 1))
    objects = ObjectList(
        boxes=boxes, scores=rng.random(700), labels=np.zeros(700, dtype=np.int64), stamp_ns=0
    )
    entries = to_devkit_results({token: PosedObjects(objects, np.eye(4))}, [token])["results"][token]
    scores = [entry["detection_score"] for entry in entries]
    assert scores == sorted(objects.scores.tolist(), reverse=True)[:500]


def test_attributes_follow_class_and_speed(dataset: NuScenes) -> None:
    boxes = np.array([[10.0, 0, 0, 4, 2, 1.5, 0, vx, 0.0] for vx in (3.0, 0.0, np.nan)])
    labels = np.array([CLASS_NAMES.index("car")] * 3)
    objects = ObjectList(boxes=boxes, scores=np.array([0.9, 0.8, 0.7]), labels=labels, stamp_ns=0)
    entries = to_devkit_results({"s": PosedObjects(objects, np.eye(4))}, ["s"])["results"]["s"]
    assert [entry["attribute_name"] for entry in entries] == [
        "vehicle.moving",
        "vehicle.parked",
        "vehicle.parked",
    ]


def test_headings_rotate_with_a_tilted_vehicle() -> None:
    """The plain twin is the product of the rotation matrices."""
    rng = np.random.default_rng(0)
    pose = make_transform(rng.normal(size=4) * [1, 0.1, 0.1, 1], [500.0, -20.0, 3.0])
    boxes = np.tile([10.0, 0, 0, 4, 2, 1.5, 0, 3.0, 1.0], (40, 1))
    boxes[:, 6] = rng.uniform(-4, 4, 40)
    objects = ObjectList(boxes=boxes, scores=np.ones(40), labels=np.zeros(40, dtype=np.int64), stamp_ns=0)
    entries = to_devkit_results({"s": PosedObjects(objects, pose)}, ["s"])["results"]["s"]
    for box, entry in zip(boxes, entries, strict=True):
        expected = pose[:3, :3] @ yaw_transform(box[6])[:3, :3]
        np.testing.assert_allclose(quaternion_to_rotation(entry["rotation"]), expected, atol=1e-12)
        np.testing.assert_allclose(entry["velocity"], (pose[:3, :3] @ [3.0, 1.0, 0.0])[:2], atol=1e-12)


def test_sample_without_boxes_has_an_empty_entry() -> None:
    objects = ObjectList(
        boxes=np.zeros((0, 9)), scores=np.zeros(0), labels=np.zeros(0, dtype=np.int64), stamp_ns=0
    )
    assert to_devkit_results({"s": PosedObjects(objects, np.eye(4))}, ["s"])["results"] == {"s": []}


@pytest.mark.parametrize(("column", "value"), [(0, np.nan), (3, 0.0), (5, -1.0), (6, np.inf)])
def test_invalid_boxes_raise(column: int, value: float) -> None:
    box = np.array([[10.0, 0, 0, 4, 2, 1.5, 0, 0, 0]])
    box[0, column] = value
    objects = ObjectList(boxes=box, scores=np.ones(1), labels=np.zeros(1, dtype=np.int64), stamp_ns=7)
    with pytest.raises(ValueError, match="expected finite numbers and sizes above 0"):
        to_devkit_results({"s": PosedObjects(objects, np.eye(4))}, ["s"])


def test_unknown_scene_or_split_raises_with_existing_names(dataset: NuScenes) -> None:
    with pytest.raises(UserError, match="scene-0001, scene-0002"):
        sample_tokens_of(dataset, scenes=["scene-9999"])
    with pytest.raises(UserError, match="all, held_out"):
        sample_tokens_of(dataset, split="nowhere")
    with pytest.raises(UserError, match="scene-0001, scene-0002"):
        sample_tokens_of(dataset, split="mini_val")


def test_results_without_a_key_frame_raise(dataset: NuScenes, tmp_path: Path) -> None:
    tokens = sample_tokens_of(dataset, split="all")
    with pytest.raises(UserError, match="no entry for 1 of 6"):
        evaluate(dataset, to_devkit_results({}, tokens[1:]), split="all")
    broken = tmp_path / "results.json"
    broken.write_text("{")
    with pytest.raises(UserError, match=r"results\.json"):
        evaluate(dataset, broken, split="all")
    with pytest.raises(UserError, match="not a nuScenes results file"):
        evaluate(dataset, {"boxes": []}, split="all")
