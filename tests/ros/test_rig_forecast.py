# SPDX-License-Identifier: Apache-2.0
"""The share of mAP that another rig may expect: interpolation in a table of the rigs benchmark."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.rig_cases import all_cases
from ftkd_core.config import ImageConfig
from ftkd_core.data.nuscenes import open_dataset, scene_names
from ftkd_core.data.synthetic.export import write_dataset
from ftkd_core.data.synthetic.rig import canonical_cameras, nuscenes_rig
from ftkd_core.errors import UserError
from ftkd_core.weights import SHIPPED, weights_hash
from ftkd_ros.bag.check_rig import check_rig
from ftkd_ros.bag.convert import convert_scene
from ftkd_ros.bag.rig_forecast import RigForecast, read_forecast

CANONICAL = canonical_cameras(nuscenes_rig())
IMAGE = ImageConfig(width=192, height=64)
SHARES = {"height -0.5 m": 0.2, "height +0.5 m": 0.6, "height +1.5 m": 0.1, "focal length x 1.25": 0.9}


def rows(**changes: Any) -> list[dict[str, Any]]:
    """Rows of a table with the shares above."""
    common = {"camera_model": "virtual", "weights": SHIPPED.name, "mAP": 0.3, "NDS": 0.3, "mAVE": 1.0}
    return [common | {"rig": rig, "share_of_trained": share} | changes for rig, share in SHARES.items()]


def written(tmp_path: Path, content: Any) -> Path:
    path = tmp_path / "rigs_other.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_measured_rigs_have_their_measured_share_and_others_lie_between(tmp_path: Path) -> None:
    forecast = read_forecast(SHIPPED, CANONICAL, IMAGE, written(tmp_path, rows()))
    assert forecast is not None
    assert forecast.share(0.0, 1.0) == (1.0, True)
    assert forecast.share(0.5, 1.0) == (pytest.approx(0.6), True)
    assert forecast.share(0.25, 1.0) == (pytest.approx(0.8), True)
    assert forecast.share(2.5, 1.0) == (pytest.approx(0.1), False)  # beyond what was measured
    part, share = forecast.visible[0]
    assert 0.3 < part < 0.95 and share == 0.9
    assert forecast.share(0.5, part) == (pytest.approx(0.6 * 0.9), True)
    assert forecast.share(0.0, 0.05)[1] is False


@settings(max_examples=40, deadline=None)
@given(st.floats(-1, 3), st.floats(0, 1))
def test_share_never_exceeds_the_trained_rig_or_falls_below_zero(height: float, visible: float) -> None:
    forecast = RigForecast(((-0.5, 0.3), (0.0, 1.0), (0.2, 1.02), (1.5, 0.1)), ((0.6, 0.7), (1.0, 1.0)))
    share, _ = forecast.share(height, visible)
    assert 0.1 * 0.7 <= share <= 1.0


def test_table_of_other_weights_gives_no_forecast(tmp_path: Path) -> None:
    for changes in ({"weights": "other.safetensors"}, {"weights_hash": "0"}, {"camera_model": "as_is"}):
        assert read_forecast(SHIPPED, CANONICAL, IMAGE, written(tmp_path, rows(**changes))) is None
    own = rows(weights="renamed.safetensors", weights_hash=weights_hash(SHIPPED))
    assert read_forecast(SHIPPED, CANONICAL, IMAGE, written(tmp_path, own)) is not None


def test_shipped_table_fits_the_shipped_weights() -> None:
    forecast = read_forecast(SHIPPED, CANONICAL, IMAGE)
    assert forecast is not None and forecast.share(0.0, 1.0)[0] == 1.0
    assert forecast.heights[0][0] < 0 < forecast.heights[-1][0]


def test_benchmark_has_the_rows_that_a_forecast_needs(tmp_path: Path) -> None:
    names = [case.name for case in all_cases()]
    content = [rows()[0] | {"rig": name, "share_of_trained": 0.5} for name in names]
    forecast = read_forecast(SHIPPED, CANONICAL, IMAGE, written(tmp_path, content))
    assert forecast is not None and len(forecast.heights) == 7 and len(forecast.visible) == 3


@pytest.mark.parametrize("content", ["{", "[1]", '[{"rig": "x"}]', "3"])
def test_damaged_table_is_refused_with_its_path(tmp_path: Path, content: str) -> None:
    with pytest.raises(UserError, match=r"rig table '.*rigs_other.json' cannot be read"):
        read_forecast(SHIPPED, CANONICAL, IMAGE, written(tmp_path, content))


@pytest.mark.parametrize(("rig", "share"), [("nuscenes", 1.0), ("truck", 0.3)])
def test_check_rig_forecasts_trained_and_foreign_rigs(rig: str, share: float, tmp_path: Path) -> None:
    root = write_dataset(
        tmp_path / "data", [900_003], version="v1.0-rigs", split="held_out", width=96, height=None,
        duration_s=0.5, sweeps=False, progress=False, rig=rig,
    )  # fmt: skip
    scene = scene_names(open_dataset(root, "v1.0-rigs"))[0]
    convert_scene(root, "v1.0-rigs", scene, tmp_path / "bag", progress=False)
    result = check_rig(tmp_path / "bag", tmp_path / "out", table=written(tmp_path, rows()))
    lines = [
        line
        for camera in result["cameras"]
        for line in camera["lines"]
        if line["check"].startswith("expected mAP")
    ]
    assert len(lines) == 6
    found = np.array([int(line["value"].split("%")[0].split()[-1]) for line in lines]) / 100
    assert (found > 0.85).all() == (rig == "nuscenes")
    np.testing.assert_allclose(found, share, atol=0.2)
    assert {line["ok"] for line in lines} == {rig == "nuscenes"}
    against = [x for c in result["cameras"] for x in c["lines"] if x["check"].startswith("against")]
    assert {x["value"] == "as in training" for x in against} == {rig == "nuscenes"}


def test_lost_edges_are_named(tmp_path: Path) -> None:
    root = write_dataset(
        tmp_path / "data", [8], version="v1.0-rigs", split="held_out", width=96, height=None,
        duration_s=0.5, sweeps=False, progress=False, rig="varied",
    )  # fmt: skip
    scene = scene_names(open_dataset(root, "v1.0-rigs"))[0]
    convert_scene(root, "v1.0-rigs", scene, tmp_path / "bag", progress=False)
    result = check_rig(tmp_path / "bag", tmp_path / "out")
    values = [
        line["value"]
        for camera in result["cameras"]
        for line in camera["lines"]
        if line["check"].startswith("visible part")
    ]
    assert any("% lost at the left" in value and "% lost at the right" in value for value in values), values
