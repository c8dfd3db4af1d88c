# SPDX-License-Identifier: Apache-2.0
"""Optional topics of a converted scene, and what happens if they are absent or damaged."""

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from ftkd_core.data import nuscenes
from ftkd_ros.bag.convert import ConversionSummary, convert_scene
from ftkd_ros.bag.convert_extras import Extras
from ftkd_ros.bag.io import BagReader
from ftkd_ros.cli import main
from ftkd_ros.convert.from_ros import cloud_columns, stamp_to_ns
from tests.ros.driving_scene import SCENE, START_US, VERSION, write_drive

ALL = Extras(lidar=True, radar=True, map=True, can=True)
POINTS = np.arange(20, dtype=np.float32).reshape(4, 5)
RADAR = """# .PCD v0.7 - Point Cloud Data file format
VERSION 0.7
FIELDS x y z dyn_prop rcs
SIZE 4 4 4 1 4
TYPE F F F I F
COUNT 1 1 1 1 1
WIDTH 2
HEIGHT 1
VIEWPOINT 0 0 0 1 0 0 0
POINTS 2
DATA binary
"""


def edit(root: Path, table: str, change: Any) -> None:
    path = root / VERSION / f"{table}.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


@pytest.fixture
def dataroot(tmp_path: Path) -> Path:
    """A drive with lidar files, one radar, a map mask of 100 m x 200 m and two files of the CAN bus."""
    root = write_drive(tmp_path / "data", sweeps=7)
    layout = np.dtype([("x", "<f4"), ("y", "<f4"), ("z", "<f4"), ("dyn_prop", "i1"), ("rcs", "<f4")])
    points = np.array([(1, 2, 3, -1, 5.5), (4, 5, 6, 7, 8)], dtype=layout)
    (root / "samples/RADAR_FRONT").mkdir(parents=True)

    def with_files(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        for row in [row for row in rows if row["token"].startswith("LIDAR_TOP")]:
            row["filename"] = f"samples/LIDAR_TOP/{row['timestamp']}.pcd.bin"
            (root / row["filename"]).write_bytes(POINTS.tobytes())
            name = f"samples/RADAR_FRONT/{row['timestamp']}.pcd"
            (root / name).write_bytes(RADAR.encode() + points.tobytes())
            radar = {key: str(value).replace("LIDAR_TOP", "RADAR_FRONT") for key, value in row.items()}
            same = ("ego_pose_token", "timestamp", "is_key_frame", "width", "height")
            rows.append({**radar, "filename": name, **{key: row[key] for key in same}})
        return rows

    edit(root, "sample_data", with_files)
    edit(
        root,
        "sensor",
        lambda r: [*r, {"token": "RADAR_FRONT", "channel": "RADAR_FRONT", "modality": "radar"}],
    )
    edit(
        root,
        "calibrated_sensor",
        lambda rows: [*rows, {**rows[-1], "token": "cs-RADAR_FRONT", "sensor_token": "RADAR_FRONT"}],
    )
    mask = np.zeros((20_000, 10_000), dtype=np.uint8)
    mask[20_000 - 16_100 : 20_000 - 15_900, 5_000:7_000] = 255  # y 1590 .. 1610 m, x 500 .. 700 m
    cv2.imwrite(str(root / "maps" / "blank.png"), mask)
    (root / "can_bus").mkdir()
    pose = {
        "utime": START_US,
        "pos": [1, 2, 3],
        "orientation": [1, 0, 0, 0],
        "vel": [8, 0, 0],
        "rotation_rate": [0, 0, 0.2],
    }
    (root / "can_bus" / f"{SCENE}_pose.json").write_text(json.dumps([pose]))
    (root / "can_bus" / f"{SCENE}_zoesensors.json").write_text(
        json.dumps([{"utime": START_US, "brake": 0.25}])
    )
    return root


def convert(root: Path, output: Path, **options: Any) -> tuple[ConversionSummary, dict[str, list[Any]]]:
    summary = convert_scene(root, VERSION, SCENE, output, progress=False, **options)
    found: dict[str, list[Any]] = {}
    with BagReader(output) as reader:
        for topic, _, message in reader.messages(sorted(reader.topics)):
            found.setdefault(topic, []).append(message)
    return summary, found


def test_lidar_radar_map_and_can_bus_are_written(dataroot: Path, tmp_path: Path) -> None:
    summary, found = convert(dataroot, tmp_path / "bag", extras=ALL)
    assert summary.notes == ()
    clouds = found["/lidar_top/points"]
    assert len(clouds) == 7 and clouds[0].header.frame_id == "lidar_top"
    np.testing.assert_array_equal(cloud_columns(clouds[0], ("x", "y", "z", "intensity", "ring")), POINTS)
    (radar, *_) = found["/radar_front/points"]
    np.testing.assert_array_equal(cloud_columns(radar, ("x", "rcs")), [[1, 5.5], [4, 8]])
    assert [field.datatype for field in radar.fields] == [7, 7, 7, 1, 7]
    (grid,) = found["/map"]
    cells = grid.data.reshape(grid.info.height, grid.info.width)
    assert (grid.header.frame_id, grid.info.resolution) == ("map", 0.5)
    row, column = (
        (np.array([1600.0, 600.0]) - [grid.info.origin.position.y, grid.info.origin.position.x]) / 0.5
    ).astype(int)
    assert cells[row, column] == 0 and cells[row + 40, column] == 100
    (odometry,) = found["/can/odometry"]
    assert (odometry.pose.pose.position.y, odometry.twist.twist.angular.z) == (2.0, 0.2)
    assert json.loads(found["/can/zoesensors"][0].data)["brake"] == 0.25


def test_key_frames_only_have_the_lidar_of_key_frames(dataroot: Path, tmp_path: Path) -> None:
    _, found = convert(dataroot, tmp_path / "bag", extras=Extras(lidar=True), sweeps=False)
    assert len(found["/lidar_top/points"]) == 2
    assert not {"/radar_front/points", "/map", "/can/odometry"} & set(found)


def test_absent_parts_are_notes_and_never_errors(tmp_path: Path) -> None:
    root = write_drive(tmp_path / "data", sweeps=2)
    edit(root, "sample_data", lambda rows: rows)
    summary, found = convert(root, tmp_path / "bag", extras=ALL)
    text = "\n".join(summary.notes)
    assert len(summary.notes) == 4
    assert "2 of 2 sweeps of LIDAR_TOP left out; first: " in text
    for reason in ("has no radar data", "does not cover the drive", "no CAN bus messages"):
        assert reason in text
    assert "/lidar_top/points" not in found


def test_damaged_files_are_left_out_by_name(dataroot: Path, tmp_path: Path) -> None:
    lidar = sorted((dataroot / "samples/LIDAR_TOP").iterdir())
    lidar[0].write_bytes(b"\0" * 21)
    radar = sorted((dataroot / "samples/RADAR_FRONT").iterdir())
    radar[0].write_bytes(radar[0].read_bytes()[:-1])
    radar[1].write_bytes(b"<html>404</html>")
    (dataroot / "can_bus" / f"{SCENE}_pose.json").write_text("[{}]")
    (dataroot / "can_bus" / f"{SCENE}_ms_imu.json").write_text(json.dumps([{"utime": 1, "q": [1, 0]}]))
    summary, found = convert(dataroot, tmp_path / "bag", extras=ALL)
    text = "\n".join(summary.notes)
    assert "1 of 7 sweeps of LIDAR_TOP" in text and f"{lidar[0].name}' has 21 bytes" in text
    assert "2 of 7 sweeps of RADAR_FRONT" in text and "is cut off" in text
    assert "pose.json: KeyError" in text and "ms_imu left out" in text
    assert len(found["/lidar_top/points"]) == 6 and len(found["/radar_front/points"]) == 5
    assert "/can/odometry" not in found and "/can/zoesensors" in found


def test_markers_annotations_and_scene_are_in_every_bag(dataroot: Path, tmp_path: Path) -> None:
    _, found = convert(dataroot, tmp_path / "bag")
    truths, markers = found["/ground_truth/detections"], found["/ground_truth/markers"]
    assert [stamp_to_ns(array.markers[0].header.stamp) for array in markers] == [
        stamp_to_ns(truth.header.stamp) for truth in truths
    ]
    assert markers[0].markers[0].action == 3 and {m.ns for m in markers[0].markers[1:]} >= {"boxes", "labels"}
    facts = json.loads(found["/ground_truth/annotations"][0].data)["objects"]
    assert facts == [
        {
            "id": "car1",
            "category": "vehicle.car",
            "attribute": "vehicle.moving",
            "visibility": 4,
            "num_lidar_pts": 9,
            "num_radar_pts": 0,
        }
    ]
    scene = json.loads(found["/scene"][0].data)
    assert scene["name"] == SCENE and scene == nuscenes.scene_facts(
        nuscenes.open_dataset(dataroot, VERSION), SCENE
    )


def test_command_prints_the_notes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_drive(tmp_path / "data", sweeps=2)
    data = ["--dataroot", str(root), "--version", VERSION]
    assert (
        main(["convert", *data, "--scene", SCENE, "--output", str(tmp_path / "bag"), "--can", "--map"]) == 0
    )
    printed = capsys.readouterr().out
    assert printed.count("note: ") == 2 and "MB/s" in printed
    assert main(["convert", *data, "--output", str(tmp_path / "bags"), "--radar"]) == 0
    assert "note: " in capsys.readouterr().out
    assert main(["convert", *data, "--output", str(tmp_path / "bags"), "--radar"]) == 0
    assert "1 kept" in capsys.readouterr().out
