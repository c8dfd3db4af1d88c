# SPDX-License-Identifier: Apache-2.0
"""Lost rounds: a student does not see them, they are not scored, and a command that was stopped goes on."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ftkd_core.data.clips import Clip
from ftkd_core.errors import UserError
from ftkd_core.models.build import build_stream_petr
from ftkd_core.types import Detections
from ftkd_core.weights import save_weights
from tests.core.helpers import make_clip, small_config
from tests.training.helpers import small_teacher
from tests.training.study.helpers import PLAN
from training.split_detection import detect_clip
from training.study import dropped_rounds, predicting, scoring
from training.study.json_files import write_json

CPU = torch.device("cpu")


def only(clip: Clip, frames: list[int]) -> Clip:
    """The clip of some of its frames."""
    return dataclasses.replace(
        clip, images=np.asarray(clip.images)[frames], ego_from_camera=clip.ego_from_camera[frames],
        global_from_ego=clip.global_from_ego[frames], times=clip.times[frames],
        objects=tuple(clip.objects[frame] for frame in frames),
    )  # fmt: skip


def equal(first: Detections, second: Detections) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_stream_without_frames_is_the_stream_of_the_others() -> None:
    torch.manual_seed(0)
    model, clip = build_stream_petr(small_config()), make_clip(seed=1)
    count = len(clip.times)
    dropped = [index in (0, 2) for index in range(count)]
    kept = [index for index in range(count) if not dropped[index]]
    found = detect_clip(model, clip, CPU, dropped=dropped)
    assert all(found[index].boxes.shape == (1, 0, 9) for index in (0, 2))
    alone = detect_clip(model, only(clip, kept), CPU)
    assert all(equal(found[index], other) for index, other in zip(kept, alone, strict=True))


def test_a_window_model_refuses_dropped_frames() -> None:
    clip = make_clip(seed=1)
    with pytest.raises(UserError, match="frames can be dropped from a stream"):
        detect_clip(small_teacher(), clip, CPU, dropped=[True] * len(clip.times))


def test_the_same_rounds_are_lost_for_every_model(tmp_path: Path) -> None:
    clips, masks = [make_clip(seed=seed) for seed in range(3)], []
    for seed in range(2):
        torch.manual_seed(seed)
        model = build_stream_petr(small_config())
        path = predicting.predict(model, clips.__getitem__, 3, tmp_path / f"{seed}.npz", CPU, drop=0.4)
        with np.load(path) as file:
            masks.append(file["seen"])
            assert (file["counts"][~file["seen"]] == 0).all()
    assert np.array_equal(masks[0], masks[1]) and 0 < masks[0].mean() < 1


@pytest.fixture
def experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An experiment with two runs; the devkit's score is the share of frames that were seen."""
    torch.manual_seed(0)
    config = small_config()
    for name in ("none-0", "ftkd-0"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        state = build_stream_petr(config).state_dict()
        save_weights(tmp_path / "runs" / name / "weights.safetensors", state, config)
    write_json(tmp_path / "plan.json", dataclasses.replace(PLAN, held_out=2).as_json())

    def share_seen(file: Path, dataset: Any) -> dict[str, float]:
        with np.load(file) as arrays:
            share = float(arrays["seen"].mean())
        return {"mAP": share, "NDS": share, "samples": 1}

    monkeypatch.setattr(dropped_rounds, "write_held_out", lambda folder, count, world: None)
    monkeypatch.setattr(dropped_rounds, "open_dataset", lambda folder, version: None)
    monkeypatch.setattr(dropped_rounds, "score", share_seen)
    monkeypatch.setattr(dropped_rounds.Work, "clips", lambda self, seed: lambda index: make_clip(seed=index))
    return tmp_path


def test_each_run_is_scored_once_for_each_share(experiment: Path) -> None:
    command = ["--out", str(experiment), "--rows", "none,ftkd", "--shares", "0,0.5"]
    assert dropped_rounds.main(command) == 0
    path = experiment / dropped_rounds.FILE
    entries = json.loads(path.read_text())
    assert {(e["method"], e["share"]) for e in entries} == {
        ("none", 0.0), ("none", 0.5), ("ftkd", 0.0), ("ftkd", 0.5),
    }  # fmt: skip
    assert all(e["mAP"] == 1 if e["share"] == 0 else 0 < e["mAP"] < 1 for e in entries)
    before = (experiment / "dropped" / "none-0-0.5.npz").stat().st_mtime_ns
    assert dropped_rounds.main(command) == 0
    assert (experiment / "dropped" / "none-0-0.5.npz").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (("--shares", "0,much"), "--shares 0,much: expected numbers from 0 to below 1"),
        (("--shares", "1"), "--shares 1: expected numbers from 0 to below 1"),
        (("--rows", "mgd"), "has no run of mgd; train first"),
    ],
)
def test_bad_input_is_one_sentence(
    experiment: Path, extra: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert dropped_rounds.main(["--out", str(experiment), *extra]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_unseen_key_frames_are_not_scored(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tokens = ("a", "b", "c")
    monkeypatch.setattr(scoring, "sample_tokens_of", lambda dataset, split: tokens)
    monkeypatch.setattr(scoring, "sample_pose", lambda dataset, token: np.eye(4))
    np.savez(
        tmp_path / "found.npz", boxes=np.zeros((0, 9)), scores=np.zeros(0), labels=np.zeros(0, dtype=int),
        counts=np.zeros(3, dtype=int), global_from_ego=np.stack([np.eye(4)] * 3), seen=[True, False, True],
    )  # fmt: skip
    found, _ = scoring.devkit_results(tmp_path / "found.npz", None, "any")  # type: ignore[arg-type]
    assert found == ("a", "c")
