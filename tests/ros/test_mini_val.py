# SPDX-License-Identifier: Apache-2.0
"""Bag -> evaluate on the real tables of mini_val: ground truth written as detections is perfect."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ftkd_core.errors import UserError
from ftkd_core.evaluation.requirements import parse_requirement
from ftkd_ros.bag.convert import convert_scene
from ftkd_ros.bag.evaluate import EvaluationOptions, evaluate_recordings
from ftkd_ros.bag.io import BagReader
from ftkd_ros.cli import main
from ftkd_ros.convert.from_ros import stamp_to_ns
from tests.ros.rewritten_bags import Message, rewrite

REPOSITORY = Path(__file__).resolve().parents[2]
TABLES = Path(
    os.environ.get("FTKD_NUSCENES_TABLES", REPOSITORY.parent / "shared/data/nuscenes_mini_val_tables")
)
VERSION, SCENES = "v1.0-mini", ("scene-0103", "scene-0916")
ERRORS = ("ATE", "ASE", "AOE", "AVE")  # these tables have no attributes, so AAE is 1 by convention

pytestmark = pytest.mark.skipif(
    not (TABLES / VERSION).is_dir(),
    reason=f"the tables of mini_val are not at {TABLES} (their licence keeps them out of the repository); "
    "set FTKD_NUSCENES_TABLES to a folder that contains them",
)


def write_as_detections(bag: Path, target: Path) -> Path:
    """Write the ground truth of a bag to the topics of the detector.

    Without objects that no sensor saw: the devkit scores them as false alarms if they are detected.
    """
    with BagReader(bag) as reader:
        facts = [json.loads(m.data) for _, _, m in reader.messages(["/ground_truth/annotations"])]
    seen = {
        entry["stamp_ns"]: np.array(
            [o["num_lidar_pts"] + o["num_radar_pts"] > 0 for o in entry["objects"]], dtype=bool
        )
        for entry in facts
    }

    def change(item: Message) -> Iterator[Message]:
        topic, msgtype, message = item
        if topic == "/ground_truth/detections":
            keep = seen[stamp_to_ns(message.header.stamp)]
            message.detections = [d for d, kept in zip(message.detections, keep, strict=True) if kept]
            yield "/detections", msgtype, message
        elif topic == "/ground_truth/velocities":
            keep = seen[stamp_to_ns(message.header.stamp)]
            message.data = message.data.reshape(len(keep), -1)[keep].reshape(-1)
            message.width = int(keep.sum())
            yield "/detections/velocities", msgtype, message
        elif topic == "/ground_truth/annotations":
            content = json.loads(message.data)
            keep = seen[content["stamp_ns"]]
            content["objects"] = [o for o, kept in zip(content["objects"], keep, strict=True) if kept]
            message.data = json.dumps(content)
            yield "/detections/annotations", msgtype, message

    return rewrite(bag, target, change)


@pytest.fixture(scope="module")
def dataroot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tables, with one small JPEG at the place of each image."""
    root = tmp_path_factory.mktemp("mini_val") / "data"
    root.mkdir()
    for name in (VERSION, "maps"):
        (root / name).symlink_to(TABLES / name)
    pixel = root / "pixel.jpg"
    pixel.write_bytes(b"\xff\xd8\xff\xd9")
    for row in json.loads((root / VERSION / "sample_data.json").read_text()):
        if row["fileformat"] == "jpg":
            path = root / row["filename"]
            path.parent.mkdir(parents=True, exist_ok=True)
            os.link(pixel, path)
    return root


@pytest.fixture(scope="module")
def pairs(dataroot: Path) -> list[tuple[Path, Path]]:
    made = []
    for scene in SCENES:
        bag = dataroot.parent / scene
        convert_scene(dataroot, VERSION, scene, bag, sweeps=False, progress=False)
        made.append((write_as_detections(bag, dataroot.parent / f"{scene}-found"), bag))
    return made


def test_ground_truth_as_detections_is_perfect_on_the_whole_split(
    dataroot: Path, pairs: list[tuple[Path, Path]], tmp_path: Path
) -> None:
    require = [
        "mAP_present>=0.999", "car.AP@30m>=0.999", "pedestrian.AP@30-50m>=0.99", "car.ATE<=0.001",
        "coverage.share==1",
    ]  # fmt: skip
    options = EvaluationOptions(split="mini_val", requirements=[parse_requirement(text) for text in require])
    metrics, verdicts = evaluate_recordings(
        pairs, dataroot=dataroot, version=VERSION, output=tmp_path / "out", options=options
    )
    present = {name: values for name, values in metrics["classes"].items() if values["truths"]}
    assert len(present) >= 7 and sum(values["truths"] for values in present.values()) > 2000
    for name, values in present.items():
        assert values["AP"] == pytest.approx(1.0, abs=1e-6), name
        for error in ERRORS:
            assert values[error] is None or values[error] < 5e-3, (name, error)
    assert metrics["coverage"]["key_frames"] == 81 and metrics["coverage"]["unmatched_tokens"] == []
    assert metrics["coverage"]["offset_ms"] == {"mean": 0.0, "max": 0.0}
    assert all(verdict.passed for verdict in verdicts)
    written = json.loads((tmp_path / "out" / "criteria.json").read_text())
    assert written["passed"] is True and len(written["requirements"]) == len(require)


def test_one_bag_of_a_split_leaves_the_rest_empty(
    dataroot: Path, pairs: list[tuple[Path, Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (found, bag), _ = pairs
    data: list[Any] = ["--dataroot", dataroot, "--version", VERSION, "--split", "mini_val"]
    arguments = ["evaluate", *data, "--detections", found, "--bag", bag, "--output", tmp_path / "out"]
    criteria = tmp_path / "criteria.yaml"
    criteria.write_text("require: ['coverage.share>=0.95', 'bus.AP>=2']\n")
    arguments += ["--require", "car.AP>=0.2", "--criteria", criteria]
    assert main([str(argument) for argument in arguments]) == 1
    printed = capsys.readouterr().out
    assert "41 of 81 key frames of split mini_val are in no bag; they count as empty." in printed
    assert "pass  car.AP>=0.2" in printed and "FAIL  coverage.share>=0.95  0.4938" in printed
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert len(metrics["coverage"]["unmatched_tokens"]) == 41
    assert 0.2 < metrics["classes"]["car"]["AP"] < 1


def test_bags_that_do_not_fit_are_refused(
    dataroot: Path, pairs: list[tuple[Path, Path]], tmp_path: Path
) -> None:
    data: dict[str, Any] = {"dataroot": dataroot, "version": VERSION, "output": tmp_path / "out"}
    with pytest.raises(UserError, match="give each scene once"):
        evaluate_recordings([pairs[0], pairs[0]], **data)
    with pytest.raises(UserError, match="mini_train"):
        evaluate_recordings(pairs, **data, options=EvaluationOptions(split="mini_train"))
    misspelt = EvaluationOptions(requirements=[parse_requirement("mAPP>=1")])
    with pytest.raises(UserError, match="no metric 'mAPP'"):
        evaluate_recordings(pairs[:1], **data, options=misspelt)
    assert not (tmp_path / "out").exists()
