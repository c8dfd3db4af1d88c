# SPDX-License-Identifier: Apache-2.0
"""The benchmark of rigs: its cases, rounds at other rates, resuming, and bad input."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import remap, rigs
from benchmarks.rig_cases import TRAINED, RigCase, all_cases, fisheye_case
from ftkd_core.config import ImageConfig
from ftkd_core.data.synthetic.rig import nuscenes_rig
from ftkd_core.data.synthetic.world import make_scene
from ftkd_core.runtime.preprocess import stack_images

SMALL = nuscenes_rig(64, 36)


def test_cases_have_unique_names_and_the_trained_rig_is_first() -> None:
    cases = all_cases()
    names = [case.name for case in cases]
    assert names[0] == TRAINED and len(set(names)) == len(names)
    assert len({case.content_hash for case in cases}) == len(cases)
    wanted = {"height -0.5 m", "height +1.5 m", "2880x1860 images", "truck", "shuttle_fisheye", "20 Hz"}
    assert wanted <= set(names)
    assert fisheye_case().content_hash == fisheye_case().content_hash


@pytest.mark.parametrize(("rate", "count", "key_frames"), [(2, 2, [0, 1]), (5, 5, [0]), (12, 12, [0, 1])])
def test_rounds_at_any_rate_contain_the_key_frames(rate: int, count: int, key_frames: list[int]) -> None:
    scene = make_scene(900_000, 1.0)
    found = list(rigs.rounds(scene, RigCase(name="x", rig=SMALL, rate_hz=rate)))
    assert len(found) == count
    assert [key for _, key in found if key is not None] == key_frames
    stamps = [camera_round.reference_stamp_ns for camera_round, _ in found]
    np.testing.assert_allclose(np.diff(stamps), 1e9 / rate, atol=1)
    for camera_round, key in found:
        if key is not None:
            assert camera_round.reference_stamp_ns == round((0.5 * key + 0.0431) * 1e9)


def test_wrong_extrinsics_are_given_to_the_detector_only() -> None:
    scene = make_scene(900_000, 0.5)
    (right, _), (wrong, _) = (
        next(rigs.rounds(scene, RigCase(name="x", rig=SMALL, extrinsics_error_deg=error)))
        for error in (0.0, 1.0)
    )
    for a, b in zip(right.views, wrong.views, strict=True):
        assert a is not None and b is not None
        np.testing.assert_array_equal(a.image, b.image)
        turn = a.ego_from_camera[:3, :3].T @ b.ego_from_camera[:3, :3]
        assert np.rad2deg(np.arccos((np.trace(turn) - 1) / 2)) == pytest.approx(1.0, abs=1e-4)


def run_counted(monkeypatch: pytest.MonkeyPatch, arguments: list[str], case_map: float = 0.4) -> list[str]:
    """Run the benchmark with a stand-in for `run_case`; return the rigs that it computed."""
    computed: list[str] = []

    def stand_in(case: RigCase, scenes: Any, _dataset: Any, _weights: Any) -> list[dict[str, Any]]:
        computed.append(case.name)
        row = {
            "rig": case.name,
            "weights": "w",
            "mAP": case_map,
            "NDS": 0.1,
            "mAVE": 1.0,
            "scenes": len(scenes),
        }
        return [row | {"camera_model": model} for model in rigs.MODELS]

    monkeypatch.setattr(rigs, "run_case", stand_in)
    assert rigs.main(["--scenes", "1", "--duration", "0.5", *arguments]) == 0
    return computed


def test_interrupted_run_is_resumed_and_other_rows_are_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "rigs.json"
    cases = [replace(case, rig=SMALL) for case in all_cases()[:4]]
    monkeypatch.setattr(rigs, "all_cases", lambda: cases)
    first = run_counted(monkeypatch, ["--json", str(path), "--rigs", cases[1].name])
    assert first == [TRAINED, cases[1].name]
    assert run_counted(monkeypatch, ["--json", str(path)], 0.2) == [case.name for case in cases[2:]]
    rows = json.loads(path.read_text())
    assert [row["rig"] for row in rows[::2]] == [case.name for case in cases]
    contract = {"rig", "camera_model", "weights", "mAP", "NDS", "mAVE", "scenes", "share_of_trained"}
    assert all(contract <= set(row) for row in rows)
    assert {row["share_of_trained"] for row in rows} == {1.0, 0.5}
    cases[1] = replace(cases[1], extrinsics_error_deg=0.1)
    assert run_counted(monkeypatch, ["--json", str(path)]) == [cases[1].name]  # another rig of this name
    assert len(run_counted(monkeypatch, ["--json", str(path), "--duration", "1"])) == 4  # other scenes


def test_bad_input_is_refused_in_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert rigs.main(["--rigs", "spaceship"]) == 2
    assert "expected at least 1, and part of as trained, pitch +1 degrees" in capsys.readouterr().err
    assert rigs.main(["--weights", str(tmp_path / "none.safetensors")]) == 2
    assert "none.safetensors" in capsys.readouterr().err
    for content in ("{", "[1, 2]", '{"rig": 3}'):
        (tmp_path / "other.json").write_text(content)
        assert rigs.main(["--json", str(tmp_path / "other.json")]) == 2
        assert "is no table of this benchmark" in capsys.readouterr().err


def test_cost_of_virtual_cameras_is_measured_in_turn(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(remap, "SIZES", ((192, 64),))
    assert remap.main(["--repeats", "1", "--json", str(tmp_path / "cost.json")]) == 0
    figures = json.loads((tmp_path / "cost.json").read_text())["network_images"]["192x64"]
    names = {"scaled_ms", "virtual_ms", "virtual_lens_ms", "virtual_extra_ms", "virtual_lens_extra_ms"}
    assert set(figures) == names and figures["scaled_ms"] > 0
    difference = figures["virtual_ms"] - figures["scaled_ms"]
    assert figures["virtual_extra_ms"] == pytest.approx(difference, abs=1e-3)
    capsys.readouterr()
    assert remap.main(["--repeats", "0"]) == 2
    assert "--repeats 0 --threads 2: expected at least 1 each" in capsys.readouterr().err


def test_measured_steps_differ_only_by_the_virtual_cameras() -> None:
    image = ImageConfig(width=192, height=64)
    trained = remap.camera_round(nuscenes_rig(), None, 0)
    found = remap.image_step(trained, image, torch.device("cpu"))()
    np.testing.assert_array_equal(found, stack_images(trained.views, image))
