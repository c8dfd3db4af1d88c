# SPDX-License-Identifier: Apache-2.0
"""The bootstrap over scenes: its mAP equals the devkit's, and its interval covers what it should."""

import json
from pathlib import Path

import numpy as np
import pytest

from ftkd_core.data.nuscenes import NuScenes, open_dataset, sample_pose
from ftkd_core.data.nuscenes.ground_truth import ground_truth
from ftkd_core.data.synthetic.export import write_dataset
from ftkd_core.evaluation.nuscenes import sample_tokens_of
from ftkd_core.types import ObjectList
from training.study.bootstrap import SceneMatches, bootstrap, main, mean_ap, read_matches
from training.study.scoring import SPLIT, VERSION, score


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An experiment with two scenes, whose detections are noisy; those of `ftkd_blind` are worse."""
    out = tmp_path_factory.mktemp("experiment")
    write_dataset(
        out / "held_out", [900_003, 900_004], version=VERSION, split=SPLIT, width=160, height=90,
        duration_s=2.0, sweeps=False, progress=False,
    )  # fmt: skip
    dataset = open_dataset(out / "held_out", VERSION)
    (out / "predictions").mkdir()
    for method, noise in (("ftkd", 0.4), ("ftkd_blind", 1.2)):
        for seed in range(2):
            write_noisy(out / "predictions" / f"{method}-{seed}.npz", dataset, noise, seed)
    return out


def write_noisy(path: Path, dataset: NuScenes, noise: float, seed: int) -> None:
    """Write moved, duplicated and wrongly classified objects, with equal scores among them."""
    random = np.random.default_rng(seed)
    found, poses = [], []
    for token in sample_tokens_of(dataset, split=SPLIT):
        truth = ground_truth(dataset, token, min_points=1)
        boxes = truth.boxes.repeat(3, axis=0)
        boxes[:, :2] += random.normal(0, noise, boxes[:, :2].shape)
        labels = truth.labels.repeat(3)
        labels = np.where(random.random(len(labels)) < 0.1, random.integers(0, 10, len(labels)), labels)
        scores = random.integers(1, 9, len(labels)) / 8
        found.append(ObjectList(boxes=boxes, labels=labels, scores=scores, stamp_ns=0))
        poses.append(sample_pose(dataset, token))
    columns = {
        name: np.concatenate([getattr(f, name) for f in found]) for name in ("boxes", "scores", "labels")
    }
    counts = np.array([len(each.labels) for each in found])
    np.savez(
        path, counts=counts, global_from_ego=np.stack(poses), seen=np.ones(len(found), dtype=bool), **columns
    )


def test_map_equals_that_of_the_devkit(experiment: Path) -> None:
    dataset = open_dataset(experiment / "held_out", VERSION)
    for file in sorted((experiment / "predictions").glob("*.npz")):
        ours, theirs = mean_ap(read_matches(file, dataset)), score(file, dataset)["mAP"]
        assert 0.01 < theirs < 0.9
        assert ours == pytest.approx(theirs, abs=1e-9)


def test_the_command_prints_difference_and_interval(
    experiment: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--out", str(experiment), "--draws", "20", "--json", str(tmp_path / "found.json")]
    assert main(command) == 0
    values = json.loads(capsys.readouterr().out)
    assert values == json.loads((tmp_path / "found.json").read_text())
    assert values["seeds"] == 2 and values["scenes"] == 2 and values["draws"] == 20
    assert 0 < values["low"] <= values["difference"] <= values["high"] and values["share_above_0"] == 1
    assert main([*command, "--rows", "ftkd,mgd"]) == 2
    assert "no seed of both rows ftkd and mgd" in capsys.readouterr().err


def scene(random: np.random.Generator, quality: float) -> dict[str, SceneMatches]:
    right = random.random((1, 40)) < quality
    return {"car": SceneMatches(random.random(40), right, 40)}


def test_equal_rows_have_no_difference_and_noise_is_in_the_interval() -> None:
    random = np.random.default_rng(0)
    same = [scene(random, 0.5) for _ in range(12)]
    assert bootstrap([(same, same)], 50) == {"difference": 0, "low": 0, "high": 0, "share_above_0": 0}
    values = bootstrap([(same, same[::-1])], 200)
    assert abs(values["difference"]) < 1e-9
    assert values["low"] < 0 < values["high"]
    better = [scene(random, 0.8) for _ in range(12)]
    assert bootstrap([(better, same)], 200)["low"] > 0
