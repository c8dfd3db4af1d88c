# SPDX-License-Identifier: Apache-2.0
"""The gate on learned velocities: each figure in constructed cases, and a random model that does not pass."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from ftkd_core.boxes import encode_boxes
from ftkd_core.config import override
from ftkd_core.errors import UserError
from ftkd_core.models.anchors import Anchors
from ftkd_core.models.sparse_bev import SparseBEV, build_sparse_bev
from ftkd_core.presets import sparse_bev_preset
from ftkd_core.weights import save_weights
from tests.core.helpers import make_clip
from training.study import gate, gate_figures
from training.study.gate import Examiner
from training.study.gate_figures import Matched, figures, match_greedily, passes, ridge_r2

SMALL = (
    "image.width=96", "image.height=32", "backbone.base_channels=8", "decoder.channels=32",
    "decoder.num_heads=2", "decoder.num_layers=2", "decoder.ffn_channels=32", "decoder.num_queries=16",
    "num_past=1", "num_future=2",
)  # fmt: skip


def random_model() -> SparseBEV:
    torch.manual_seed(0)
    return build_sparse_bev(override(sparse_bev_preset("sparse_bev_small_offline"), SMALL)).eval()


def constructed(error: float = 0.5, count: int = 40) -> Matched:
    """Moving objects whose predicted velocity is `error` m/s off, the linker's 2 m/s off, all started at 0,
    with velocity in the features; and as many that stand."""
    random = np.random.default_rng(0)
    angle = random.uniform(-np.pi, np.pi, 2 * count)
    speed = np.r_[random.uniform(2, 9, count), np.zeros(count)]
    true = speed[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    shift = np.array([0.6, 0.8])
    features = np.concatenate([true @ random.normal(size=(2, 6)), random.normal(size=(2 * count, 3))], axis=1)
    ahead = np.broadcast_to([1.0, 0.0], true.shape)
    return Matched(true, true + error * shift, np.zeros_like(true), true + 2 * shift, features, ahead)


def test_each_figure_of_a_constructed_case_is_right() -> None:
    found, wrong = constructed(0.5), constructed(0.75)
    values = figures(found, wrong, constructed())
    change = np.linalg.norm(found.predicted[:40], axis=1).mean()
    assert values["velocity_change_moving_m_s"] == pytest.approx(change)
    assert values["ave_moving"] == pytest.approx(0.5)
    assert values["ave_moving_linker"] == pytest.approx(2.0)
    assert values["wrong_future_ave"] == pytest.approx(0.75)
    assert values["probe_r2_velocity"] > 0.99
    assert values["moving"] == 40 and values["objects"] == 80
    assert values["passed"]


def test_velocity_in_the_line_of_sight_is_found_in_the_features() -> None:
    """Features with the velocity along and across the line of sight, as models with image queries have."""

    def seen_from_all_sides(seed: int) -> Matched:
        random = np.random.default_rng(seed)
        angle = random.uniform(-np.pi, np.pi, 200)
        sight = np.stack([np.cos(angle), np.sin(angle)], axis=1)
        found = constructed(count=100)._replace(sight=sight)
        return found._replace(features=found.true_in_view @ np.random.default_rng(9).normal(size=(2, 5)))

    values = figures(seen_from_all_sides(0), None, seen_from_all_sides(1))
    assert values["probe_r2_velocity_view"] > 0.99 > 0.5 > values["probe_r2_velocity_ego"]
    assert values["probe_r2_velocity"] == values["probe_r2_velocity_view"]
    speeds = np.linalg.norm(constructed().true_in_view, axis=1)
    assert np.allclose(speeds, np.linalg.norm(constructed().true, axis=1))


@pytest.mark.parametrize(
    "change",
    [
        {"velocity_change_moving_m_s": 0.002},
        {"ave_moving": 1.8},
        {"probe_r2_velocity": 0.13},
        {"wrong_future_ave": 0.5},
        {"wrong_future_ave": None},
    ],
)
def test_every_figure_can_fail_the_gate(change: dict[str, float | None]) -> None:
    good = {
        "velocity_change_moving_m_s": 4.0, "ave_moving": 0.5, "ave_moving_linker": 2.0,
        "probe_r2_velocity": 0.6, "wrong_future_ave": 0.8,
    }  # fmt: skip
    assert passes(good) and not passes(good | change)


def test_features_without_velocity_have_no_r2() -> None:
    random = np.random.default_rng(1)
    features, velocity = random.normal(size=(200, 8)), random.normal(size=(200, 2))
    others = random.normal(size=(200, 8))
    assert ridge_r2(features, velocity, others, random.normal(size=(200, 2))) < 0.05


def test_matching_is_greedy_by_score_within_class_and_distance() -> None:
    centers = np.array([[0.0, 0.0], [0.5, 0.0], [10.0, 0.0], [20.0, 0.0]])
    scores, labels = np.array([0.5, 0.9, 0.8, 0.05]), np.array([0, 0, 1, 0])
    truth, true_labels = np.array([[0.1, 0.0], [0.4, 0.0], [10.0, 1.9], [20.0, 0.0]]), np.array([0, 0, 0, 0])
    assert match_greedily(centers, scores, labels, truth, true_labels) == [(1, 1), (0, 0)]
    assert match_greedily(centers, scores, labels, truth[:0], true_labels[:0]) == []


def test_too_few_objects_are_an_error() -> None:
    standing = constructed()
    standing = Matched(*(value[40:] for value in standing))
    with pytest.raises(UserError, match="0 moving objects"):
        figures(standing, None, constructed())


def test_the_linker_finds_the_velocity_of_detections_that_move(monkeypatch: pytest.MonkeyPatch) -> None:
    """One car at 4 m/s seen in every frame by a vehicle that turns and drives."""
    model, clip = random_model(), make_clip(frames=4)
    global_velocity, codes = np.array([4.0, 0.0, 0.0]), []
    for frame in range(4):
        ego_from_global = np.linalg.inv(clip.global_from_ego[frame])
        place = np.array([200.0 + 4.0 * clip.times[frame], 5.0, 1.0, 1.0])
        origin = clip.global_from_ego[0] @ np.array([15.0, 0.0, 0.0, 1.0])
        place[:3] += origin[:3] - np.array([200.0, 5.0, 0.0])
        box = torch.tensor([[*(ego_from_global @ place)[:3], 4.5, 1.9, 1.6, 0.0, 0.0, 0.0]])
        codes.append(encode_boxes(box.float()))
    logits = torch.full((1, 10), -8.0)
    logits[0, 0] = 4.0
    detections = [Anchors(code, logits) for code in codes]
    examiner = Examiner(model, lambda _: clip)
    found = examiner._linker(clip, 1, detections)(codes[1], logits)
    expected = (np.linalg.inv(clip.global_from_ego[1])[:3, :3] @ global_velocity)[:2]
    np.testing.assert_allclose(found[0].numpy(), expected, atol=0.6)


def test_a_wrong_future_changes_the_decoder_only_through_the_future() -> None:
    model = random_model()
    clips = [make_clip(seed=seed, frames=5, objects=6) for seed in range(2)]
    examiner = Examiner(model, clips.__getitem__)
    levels = examiner.levels(0)
    pyramid = examiner._pyramid(levels, [1, 2], 5, blind=False)
    wrong = examiner._with_future_of(pyramid, examiner.levels(1), [1, 2])
    for mine, other, strange in zip(pyramid, wrong, examiner.levels(1), strict=True):
        assert torch.equal(mine[:, :2], other[:, :2]) and not torch.equal(mine[:, 2:], other[:, 2:])
        assert torch.equal(other[0, 2], strange[(1 + 2 + 1) % 5])


def test_a_random_model_does_not_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gate_figures, "_MIN_SCORE", 0.0)
    monkeypatch.setattr(gate_figures, "_MATCH_DISTANCE_M", 60.0)
    model = random_model()
    with torch.no_grad():
        model.decoder_layer.classifier[-1].bias[0] = 0.0  # type: ignore[index,operator,union-attr]  # all are cars
    save_weights(tmp_path / "weights.safetensors", model.state_dict(), model.config)
    arguments = ["--weights", str(tmp_path / "weights.safetensors"), "--scenes", "1", "--probe-scenes", "1"]
    arguments += ["--duration", "2", "--clips", str(tmp_path), "--json", str(tmp_path / "gate.json")]
    assert gate.main(arguments) == 1
    values = json.loads((tmp_path / "gate.json").read_text())
    assert not values["passed"] and values["world"] == "traffic"
    names = {"velocity_change_moving_m_s", "ave_moving", "ave_moving_linker", "probe_r2_velocity"}
    assert names | {"wrong_future_ave"} < values.keys()
    assert "passed" in capsys.readouterr().out


def test_bad_input_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gate.main(["--weights", str(tmp_path / "none.safetensors")]) == 2
    assert capsys.readouterr().err.startswith("gate: ")
