# SPDX-License-Identifier: Apache-2.0
"""Bags of rigs with lenses, other camera names and free-running cameras: conversion, rounds and detection."""

from pathlib import Path

import numpy as np
import pytest

from ftkd_core.data.nuscenes import open_dataset, scene_names
from ftkd_core.data.synthetic.export import write_dataset
from ftkd_core.data.synthetic.rig_presets import preset_rig
from ftkd_ros.bag.convert import convert_scene
from ftkd_ros.bag.detect import detect_bag
from ftkd_ros.bag.evaluate import evaluate_recording
from ftkd_ros.bag.io import BagReader
from ftkd_ros.bag.replay_rounds import Drive, with_bag_cameras
from ftkd_ros.bag.report import report_results
from ftkd_ros.node.parameters import DetectorParameters
from tests.ros.recorded_drive import GroundTruthDetector

VERSION = "v1.0-rigs"


@pytest.fixture(scope="module")
def dataroots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A short drive of each rig: data set and bag `bag` in one folder."""
    roots = {}
    for name in ("shuttle_fisheye", "truck"):
        root = tmp_path_factory.mktemp(name) / "data"
        write_dataset(
            root, [900_004], version=VERSION, split="held_out", width=96, height=None, duration_s=1.5,
            sweeps=name == "truck", progress=False, rig=name,
        )  # fmt: skip
        scene = scene_names(open_dataset(root, VERSION))[0]
        convert_scene(root, VERSION, scene, root / "bag", progress=False)
        roots[name] = root
    return roots


@pytest.mark.parametrize("name", ["shuttle_fisheye", "truck"])
def test_rounds_of_a_bag_have_the_lenses_and_mounts_of_the_rig(name: str, dataroots: dict[str, Path]) -> None:
    rig = preset_rig(name, 96)
    with BagReader(dataroots[name] / "bag") as bag:
        drive = Drive(bag)
        rounds = [found for found, _ in drive.rounds()]
    assert set(drive.cameras) >= {channel.lower() for channel in rig.channels}
    assert not drive.faults and len(rounds) == (13 if name == "truck" else 3)
    places = [drive.cameras.index(channel.lower()) for channel in rig.channels]
    for camera, place in enumerate(places):
        view = rounds[0].views[place]
        assert view is not None
        assert view.lens == rig.lens(camera)
        np.testing.assert_allclose(view.intrinsics, rig.intrinsics[camera])
        np.testing.assert_allclose(view.ego_from_camera, rig.ego_from_camera[camera], atol=1e-9)


def test_default_cameras_give_way_to_those_of_the_bag(dataroots: dict[str, Path]) -> None:
    usual = DetectorParameters()
    with BagReader(dataroots["truck"] / "bag") as truck:
        assert with_bag_cameras(truck, usual) is usual
    with BagReader(dataroots["shuttle_fisheye"] / "bag") as four:
        found = with_bag_cameras(four, usual).cameras
        assert found == ("cam_front", "cam_back", "cam_left", "cam_right")
        for own in (
            DetectorParameters(cameras=("cam_front",)),
            DetectorParameters(image_topic="/{camera}/raw"),
        ):
            assert with_bag_cameras(four, own) is own


def test_all_cameras_of_another_rig_are_detected_scored_and_drawn(
    dataroots: dict[str, Path], tmp_path: Path
) -> None:
    root = dataroots["shuttle_fisheye"]
    detector = GroundTruthDetector(root / "bag")
    summary = detect_bag(root / "bag", tmp_path / "out", factory=lambda *_: detector, progress=False)
    assert summary.rounds_detected == 3
    names = [[view.name for view in found.views if view is not None] for found in detector.rounds]
    assert names == [["cam_front", "cam_back", "cam_left", "cam_right"]] * 3
    metrics = evaluate_recording(
        tmp_path / "out", root / "bag", dataroot=root, version=VERSION, output=tmp_path / "results"
    )
    assert metrics["NDS"] > 0
    page = report_results(tmp_path / "results", tmp_path / "out", root / "bag")
    assert page.is_file()


def test_detector_that_needs_the_usual_names_gets_only_those(
    dataroots: dict[str, Path], tmp_path: Path
) -> None:
    root = dataroots["shuttle_fisheye"]
    detector = GroundTruthDetector(root / "bag")
    detector.assigns_by_yaw = False
    parameters = DetectorParameters(min_cameras=1)
    detect_bag(
        root / "bag", tmp_path / "out", parameters=parameters, factory=lambda *_: detector, progress=False
    )
    names = {view.name for found in detector.rounds for view in found.views if view is not None}
    assert names == {"cam_front", "cam_back"}
