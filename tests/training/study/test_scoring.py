# SPDX-License-Identifier: Apache-2.0
"""Files of detections and their scores: content, agreement with the data set, the matrix of an experiment."""

import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ftkd_core.config import ImageConfig
from ftkd_core.data.nuscenes import open_dataset
from ftkd_core.data.synthetic.export import write_dataset
from ftkd_core.data.synthetic_clips import render_clip
from ftkd_core.errors import UserError
from ftkd_core.models.build import build_stream_petr
from tests.core.helpers import make_clip, small_config
from tests.training.helpers import small_teacher
from tests.training.study.helpers import PLAN, arguments
from training.study import predicting, scoring, velocity_errors
from training.study.experiments import main
from training.study.matrix import SCORES, read_matrix
from training.study.provenance import commit

ROOT = Path(__file__).parents[3]


def test_detections_are_stored_as_detected(tmp_path: Path) -> None:
    clips, cpu = [make_clip(seed=seed) for seed in range(2)], torch.device("cpu")
    torch.manual_seed(0)
    for model in (build_stream_petr(small_config()), small_teacher()):
        path = predicting.predict(model, clips.__getitem__, 2, tmp_path / "found.npz", cpu)
        with np.load(path) as file:
            assert len(file["counts"]) == sum(len(clip.times) for clip in clips)
            assert file["counts"].sum() == len(file["boxes"]) == len(file["scores"])
            first = predicting.detect_clip(model, clips[0], cpu)[0]
            kept = first.scores[0] >= 0.01
            assert np.allclose(file["boxes"][: file["counts"][0]], first.boxes[0][kept].numpy(), atol=1e-5)


class Truth(NamedTuple):
    """Ground truth of rendered clips as detections, and the exported data set of the same seeds."""

    values: dict[str, NDArray[Any]]
    root: Path


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> Truth:
    seeds, image = [900_001, 900_004], ImageConfig(width=352, height=128)
    root = write_dataset(
        tmp_path_factory.mktemp("truth") / "data", seeds, version="v1.0-synth", split="held_out", width=704,
        height=396, duration_s=1.0, sweeps=False, progress=False,
    )  # fmt: skip
    clips = [render_clip(seed, image, 1.0) for seed in seeds]
    visible = [
        (o.boxes[o.num_points > 0], o.labels[o.num_points > 0]) for clip in clips for o in clip.objects
    ]
    values = {
        "boxes": np.concatenate([boxes for boxes, _ in visible]),
        "labels": np.concatenate([labels for _, labels in visible]),
        "counts": np.array([len(labels) for _, labels in visible]),
        "global_from_ego": np.concatenate([clip.global_from_ego for clip in clips]),
        "seen": np.ones(sum(len(clip.times) for clip in clips), dtype=bool),
    }
    return Truth(values | {"scores": np.linspace(0.9, 0.5, len(values["labels"]))}, root)


def test_ground_truth_as_detections_scores_perfectly(
    truth: Truth, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, dataset = tmp_path / "truth.npz", open_dataset(truth.root, "v1.0-synth")
    np.savez(file, **truth.values)
    assert scoring.score(file, dataset)["mAP_present"] > 0.97
    assert scoring.score_subsets(file, dataset)["distance_0_20"]["AP"] > 0.97

    errors = velocity_errors.velocity_errors(file, dataset, "held_out")
    moving = [own for own in errors.values() if (own["zero_AVE"] or 0) > 0.5]
    assert moving and all(own["AVE"] < 0.2 * own["zero_AVE"] for own in moving)
    assert velocity_errors.main(["--predictions", str(file), "--dataset", str(truth.root)]) == 0
    assert f"| mean |  | {errors['mean']['AVE']:.2f} |" in capsys.readouterr().out


def test_detections_of_another_data_set_are_refused(truth: Truth, tmp_path: Path) -> None:
    dataset, turned = open_dataset(truth.root, "v1.0-synth"), truth.values["global_from_ego"][::-1]
    np.savez(tmp_path / "other.npz", **{**truth.values, "global_from_ego": turned})
    with pytest.raises(UserError, match="differ in the ego pose of frame 0"):
        scoring.score(tmp_path / "other.npz", dataset)
    few = {**truth.values, "counts": truth.values["counts"][:-1]}
    np.savez(tmp_path / "few.npz", **few)
    with pytest.raises(UserError, match="holds 3 frames, the data set 4"):
        scoring.score(tmp_path / "few.npz", dataset)


@pytest.mark.parametrize("kind", ["cut", "empty", "text"])
def test_damaged_detections_are_refused(kind: str, truth: Truth, tmp_path: Path) -> None:
    file = tmp_path / f"{kind}.npz"
    np.savez(file, **truth.values)
    content = file.read_bytes()
    file.write_bytes({"cut": content[: len(content) // 2], "empty": b"", "text": b"{}"}[kind])
    dataset = open_dataset(truth.root, "v1.0-synth")
    with pytest.raises(UserError, match=f"{kind}.npz' cannot be read .*delete the file and its .json"):
        scoring.score(file, dataset)
    np.save(tmp_path / "array.npy", truth.values["boxes"])
    with pytest.raises(UserError, match=r"array.npy' cannot be read"):
        scoring.score(tmp_path / "array.npy", dataset)


def test_velocity_errors_of_a_missing_file_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--predictions", str(tmp_path / "none.npz"), "--dataset", str(tmp_path)]
    assert velocity_errors.main(command) == 2
    assert "none.npz'; expected detections of an experiment's run" in capsys.readouterr().err


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, list[str]]]:
    """Replace the devkit by constant scores; record (subsets, runs) of each call."""
    calls: list[tuple[bool, list[str]]] = []

    def score_files(files: Sequence[Path], folder: Path, *, subsets: bool) -> Iterator[dict[str, object]]:
        calls.append((subsets, [file.stem for file in files]))
        whole = {**dict.fromkeys(SCORES, 0.5), "samples": 1}
        parts = {"distance_0_20": {"AP": 0.5}, "moving": {"AVE": 1.5}}
        return iter([parts if subsets else dict(whole) for _ in files])

    monkeypatch.setattr(scoring, "write_held_out", lambda folder, count, world: None)
    monkeypatch.setattr(scoring, "score_files", score_files)
    return calls


def write_detections(out: Path, *names: str, content: bytes = b"") -> None:
    (out / "predictions").mkdir(exist_ok=True)
    for name in names:
        (out / "predictions" / f"{name}.npz").write_bytes(content)
        (out / "predictions" / f"{name}.json").write_text('{"steps": 1}')


def test_runs_are_scored_once_and_subsets_after_whole_runs(
    tmp_path: Path, scored: list[tuple[bool, list[str]]]
) -> None:
    write_detections(tmp_path, "none-0")
    first = read_matrix(scoring.score_runs(tmp_path, PLAN, subsets=False))
    assert scored == [(False, ["none-0"])] and "subsets" not in first[0]
    scored.clear()
    write_detections(tmp_path, "ftkd-0")
    second = read_matrix(scoring.score_runs(tmp_path, PLAN, subsets=True))
    assert scored == [(False, ["ftkd-0"]), (True, ["ftkd-0", "none-0"])]
    assert {e["method"] for e in second if "subsets" in e} == {"none", "ftkd"}
    assert all(e["ave_moving"] == 1.5 for e in second)
    scored.clear()
    scoring.score_runs(tmp_path, PLAN, subsets=True)
    assert scored == [(False, []), (True, [])], "nothing is scored twice"
    scored.clear()
    write_detections(tmp_path, "none-0", content=b"detections of other weights")
    scoring.score_runs(tmp_path, PLAN, subsets=True)
    assert scored == [(False, ["none-0"]), (True, ["none-0"])]


def test_damaged_notes_and_matrix_are_refused(tmp_path: Path, scored: list[tuple[bool, list[str]]]) -> None:
    with pytest.raises(UserError, match="no detections in .*; train first"):
        scoring.score_runs(tmp_path, PLAN, subsets=False)
    write_detections(tmp_path, "none-0")
    (tmp_path / "predictions" / "none-0.json").write_text('{"steps"')
    with pytest.raises(UserError, match=r"none-0.json' cannot be read .*; delete it to detect again"):
        scoring.score_runs(tmp_path, PLAN, subsets=False)
    (tmp_path / "matrix.json").write_text('[{"method"')
    with pytest.raises(UserError, match=r"matrix.json' cannot be read .*; delete it and score again"):
        scoring.score_runs(tmp_path, PLAN, subsets=False)


def test_training_needs_no_devkit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = """
import sys
sys.modules["nuscenes"] = None  # makes importing it fail
from training import distill, train
from training.study import experiments, runner, work
for module in (distill, experiments, train):
    try:
        module.main(["--help"])
    except SystemExit as end:
        assert not end.code
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage: python -m training.") == 3
    monkeypatch.setitem(sys.modules, "nuscenes", None)
    assert main(arguments(tmp_path)) == 2, "reported before training"
    assert "scoring needs the nuScenes devkit" in capsys.readouterr().err


def test_commit_is_marked_if_files_differ_from_it(tmp_path: Path) -> None:
    def git(*command: str) -> str:
        names = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
        done = subprocess.run(
            ["git", *names, *command], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    assert commit(tmp_path) == "unknown"
    git("init")
    (tmp_path / "file").write_text("first")
    git("add", "file")
    git("commit", "-m", "first")
    clean = commit(tmp_path)
    assert git("rev-parse", "HEAD").startswith(clean)
    (tmp_path / "file").write_text("second")
    assert commit(tmp_path) == f"{clean}-dirty"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_small_experiment_runs_and_resumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = arguments(
        tmp_path / "out", "--rows", "none,ftkd,stxd,ftkd_blind", "--seeds", "1", "--scenes", "1",
        "--held-out", "1", "--streams", "1", "--steps", "2", "--teacher-steps", "1", "--threads", "1",
        "--clips", str(tmp_path / "clips"),
    )  # fmt: skip
    assert main([*command, "--phase", "train"]) == 0
    assert not (tmp_path / "out" / "matrix.json").exists()
    assert main(command) == 0  # nothing is trained again
    assert "| ftkd_blind | 1 | 2 |" in capsys.readouterr().out
    entries = read_matrix(tmp_path / "out" / "matrix.json")
    assert {e["method"] for e in entries} == {
        "teacher", "teacher_blind", "none", "ftkd", "stxd", "ftkd_blind",
    }  # fmt: skip
    assert all({"preset", "device", "commit", "subsets"} <= e.keys() for e in entries)
