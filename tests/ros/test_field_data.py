# SPDX-License-Identifier: Apache-2.0
"""Bags and data sets as users have them: incomplete, renamed, without lidar, maps or annotations."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from ftkd_core.data import nuscenes
from ftkd_core.data.nuscenes import open_dataset
from ftkd_core.errors import UserError
from ftkd_core.unfinished import UnfinishedFolder
from ftkd_ros.bag.convert import convert_scene
from ftkd_ros.bag.convert_scenes import choose_scenes, convert_scenes
from ftkd_ros.bag.io import BagReader
from tests.ros.driving_scene import SCENE, VERSION, write_drive


@pytest.fixture
def dataroot(tmp_path: Path) -> Path:
    return write_drive(tmp_path / "data", sweeps=13)


def edit(dataroot: Path, table: str, change: Any) -> None:
    path = dataroot / VERSION / f"{table}.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def test_bag_is_read_without_metadata_and_with_an_empty_storage_identifier(
    dataroot: Path, tmp_path: Path
) -> None:
    bag = tmp_path / "drive.bag"
    convert_scene(dataroot, VERSION, SCENE, bag, progress=False)
    with BagReader(bag) as reader:
        expected = [(c.topic, t, bytes(b)) for c, t, b in reader.raw()]
    metadata = bag / "metadata.yaml"
    text = metadata.read_text()
    metadata.write_text(text.replace("storage_identifier: mcap", 'storage_identifier: ""'))
    assert metadata.read_text() != text
    for _ in range(2):
        with BagReader(bag) as reader:
            assert [(c.topic, t, bytes(b)) for c, t, b in reader.raw()] == expected
        metadata.unlink(missing_ok=True)


def test_leftover_of_a_killed_run_is_removed_but_not_that_of_a_running_one(tmp_path: Path) -> None:
    killed, running = UnfinishedFolder(tmp_path / "b"), UnfinishedFolder(tmp_path / "b")
    killed._lock.close()  # as the system does when a process ends
    last = UnfinishedFolder(tmp_path / "b")
    assert not killed.path.exists() and running.path.exists()
    running.discard()
    last.discard()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("table", "field", "value", "message"),
    [
        ("sample_annotation", "rotation", [0, 0, 0, 0], "quaternion"),
        ("sample_annotation", "translation", [float("nan"), 0, 0], "finite"),
        ("sample", "next", "nowhere", "token of sample.json"),
        ("sample", "timestamp", 1.5e18, "microseconds"),
        ("sample_data", "ego_pose_token", "nowhere", "ego_pose.json"),
    ],
)
def test_unusable_row_is_named(dataroot: Path, table: str, field: str, value: Any, message: str) -> None:
    edit(dataroot, table, lambda rows: [{**rows[0], field: value}, *rows[1:]])
    token = json.loads((dataroot / VERSION / f"{table}.json").read_text())[0]["token"]
    with pytest.raises(UserError, match=rf"{table}\.json, row with token '{token}'.*{message}"):
        open_dataset(dataroot, VERSION)


def test_scene_is_converted_without_maps_and_lidar(dataroot: Path, tmp_path: Path) -> None:
    shutil.rmtree(dataroot / "maps", ignore_errors=True)
    sensors = json.loads((dataroot / VERSION / "sensor.json").read_text())
    lidars = {row["token"] for row in sensors if row["modality"] == "lidar"}
    calibrations = json.loads((dataroot / VERSION / "calibrated_sensor.json").read_text())
    gone = {row["token"] for row in calibrations if row["sensor_token"] in lidars}
    edit(dataroot, "sample_data", lambda rows: [r for r in rows if r["calibrated_sensor_token"] not in gone])
    assert gone
    assert convert_scene(dataroot, VERSION, SCENE, tmp_path / "bag", progress=False).images > 0


def test_own_categories_are_mapped_or_named(dataroot: Path) -> None:
    edit(dataroot, "category", lambda rows: [{**row, "name": f"own {i}"} for i, row in enumerate(rows)])
    dataset = open_dataset(dataroot, VERSION)
    assert "annotations are left out" in dataset.notes[0] and "own " in dataset.notes[0]
    names = [row["name"] for row in dataset.category]
    mapped = open_dataset(dataroot, VERSION, dict.fromkeys(names, "car"))
    assert not mapped.notes
    token = nuscenes.scene_samples(mapped, SCENE)[0]
    assert len(nuscenes.ground_truth(mapped, token).boxes)


def test_all_scenes_are_converted_and_kept_by_the_next_run(dataroot: Path, tmp_path: Path) -> None:
    dataset = open_dataset(dataroot, VERSION)
    scenes = choose_scenes(dataset, (), None)
    first = convert_scenes(dataset, scenes, tmp_path / "bags", on_text=lambda _: None)
    second = convert_scenes(dataset, scenes, tmp_path / "bags", on_text=lambda _: None)
    assert first.written == scenes and second.kept == scenes and not second.written


def test_cut_off_and_missing_images_are_named(dataroot: Path) -> None:
    image = next(path for path in sorted(dataroot.rglob("*.jpg")))
    name = image.relative_to(dataroot).as_posix()
    assert nuscenes.find_faults(dataroot, [name]) == {}
    image.write_bytes(image.read_bytes()[: image.stat().st_size // 2])
    assert "cut off" in nuscenes.find_faults(dataroot, [name])[name]
    with pytest.raises(UserError, match="cut off"):
        nuscenes.read_image(image)
    image.unlink()
    assert "missing" in nuscenes.find_faults(dataroot, [name])[name]
