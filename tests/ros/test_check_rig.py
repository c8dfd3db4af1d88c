# SPDX-License-Identifier: Apache-2.0
"""`ftkd check-rig` on a recorded drive: verdicts, page, and errors."""

import json
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from ftkd_core.errors import UserError
from ftkd_core.geometry import invert_rigid
from ftkd_core.lens import Lens
from ftkd_core.types import CameraView
from ftkd_ros.bag.check_rig import check_rig, draw_ground_grid
from ftkd_ros.bag.io import BagReader
from ftkd_ros.bag.record_rig import record_rig
from ftkd_ros.cli import main
from tests.ros.fakes import FakeRig
from tests.ros.recorded_drive import record_drive


@pytest.fixture(scope="module")
def bag(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return record_drive(tmp_path_factory.mktemp("rig")).sweeps


def test_page_and_json_have_a_verdict_per_line(
    bag: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check-rig", "--bag", str(bag), "--output", str(tmp_path / "out")]) == 0
    result = json.loads((tmp_path / "out" / "rig.json").read_text())
    assert len(result["cameras"]) == 6
    checks = {line["check"] for camera in result["cameras"] for line in camera["lines"]}
    assert {
        "rate",
        "time offset",
        "intrinsics",
        "distortion",
        "mounting",
        "height against training",
        "expected mAP, share of the trained rig's",
    } <= checks
    page = (tmp_path / "out" / "rig.html").read_text()
    assert page.count("data:image/jpeg;base64") == 6
    for camera in result["cameras"]:
        assert f"<h2>{camera['camera']}</h2>" in page
    printed = capsys.readouterr().out
    assert all(camera["camera"] in printed for camera in result["cameras"])


def test_outputs_that_exist_and_bags_without_cameras_are_refused(bag: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="out"):
        check_rig(bag, tmp_path / "out")
    with pytest.raises(UserError, match="image_geometry: 'flat'"):
        check_rig(bag, tmp_path / "new", image_geometry="flat")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("lens", [None, Lens("plumb_bob", (-0.2, 0.05, 0.0, 0.0))])
def test_grid_lies_on_the_ground(lens: Lens | None) -> None:
    """The point of the ground 20 m in front lies on a grid line; the sky stays empty."""
    pose = np.eye(4)
    pose[:3, :3] = [[0, 0, 1], [-1, 0, 0], [0, -1, 0]]
    pose[:3, 3] = (1.5, 0, 1.6)
    k = np.array([[400.0, 0, 320], [0, 400, 180], [0, 0, 1]])
    view = CameraView(
        image=np.zeros((360, 640, 3), dtype=np.uint8), intrinsics=k, ego_from_camera=pose,
        global_from_ego=np.eye(4), stamp_ns=0, lens=lens,
    )  # fmt: skip
    drawn = draw_ground_grid(view).any(axis=2)
    x, y, z = (invert_rigid(pose) @ [20.0, 0.0, 0.0, 1.0])[:3]
    point = np.array([x / z, y / z])
    if lens is not None:
        point = lens.project(np.array([[x, y, z]]))[0][0]
    column, row = np.round(point * 400 + (320, 180)).astype(int)
    assert drawn[row - 1 : row + 2, column - 1 : column + 2].any()
    assert not drawn[:175].any() and drawn[185:].any()


@pytest.mark.ros
def test_running_cameras_are_recorded_without_a_bag(tmp_path: Path) -> None:
    rig = FakeRig()
    stopped = threading.Event()

    def publish() -> None:
        while not stopped.wait(0.05):
            rig.send_round(time.time_ns())
            rig.executor.spin_once(timeout_sec=0)

    thread = threading.Thread(target=publish)
    thread.start()
    try:
        assert "recorded" in record_rig(tmp_path / "bag", 1.5)
    finally:
        stopped.set()
        thread.join(10)
        rig.close()
    with BagReader(tmp_path / "bag") as bag:
        assert {"/tf", "/tf_static", "/cam_back/camera_info", "/cam_back/image/compressed"} <= set(bag.topics)
        assert not any(topic.startswith("/detections") for topic in bag.topics)


@pytest.mark.ros
def test_without_cameras_the_topics_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ftkd_ros.bag.record_rig._DISCOVERY_S", 0.2)
    with pytest.raises(UserError, match=r"no topic CAMERA/image .* there are .*/rosout.*check ROS_DOMAIN_ID"):
        record_rig(tmp_path / "bag", 1.0)
    with pytest.raises(UserError, match="--seconds 0; expected 0.5 to 600"):
        record_rig(tmp_path / "bag", 0.0)
