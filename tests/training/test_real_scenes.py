# SPDX-License-Identifier: Apache-2.0
"""Real tables as data sets: rendered images show the true boxes, and photographs are linked."""

import os
from pathlib import Path

import cv2
import numpy as np
import pytest

from benchmarks.real_scenes import SPLIT, link_photographs, main, render_split
from ftkd_core.classes import CAMERA_CHANNELS
from ftkd_core.data.nuscenes import (
    camera_records,
    ground_truth,
    open_dataset,
    sample_pose,
    scene_names,
    scene_samples,
)
from ftkd_core.data.synthetic.export import write_dataset
from ftkd_core.data.targets import project_boxes
from ftkd_core.geometry import invert_rigid


@pytest.fixture(scope="module")
def dataroot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(
        tmp_path_factory.mktemp("synth") / "data", (900_002,), version="v1.0-synth", split="few", width=160,
        height=90, duration_s=1.0, sweeps=False, progress=False,
    )  # fmt: skip


def test_rendered_images_show_the_boxes_of_the_tables(dataroot: Path, tmp_path: Path) -> None:
    """Pixels inside projected boxes differ from the median of their row more than those of the sky do."""
    assert render_split(dataroot, "v1.0-synth", "few", tmp_path / "full", 320) == 12
    dataset = open_dataset(tmp_path / "full", "v1.0-synth")
    scene = scene_names(dataset)[0]
    token = scene_samples(dataset, scene)[0]
    truth, inside, outside = ground_truth(dataset, token), [], []
    for channel in CAMERA_CHANNELS:
        record = camera_records(dataset, scene, channel, keyframes_only=True)[0]
        image = cv2.imread(str(record.path)).astype(float)
        assert image.shape == (180, 320, 3)
        plain = np.median(image, axis=1, keepdims=True)  # of each row: sky, grass or road
        changed = np.abs(image - plain).max(axis=2)
        camera = invert_rigid(sample_pose(dataset, token)) @ record.global_from_ego @ record.ego_from_camera
        scaled = np.diag([320 / record.width, 180 / record.height, 1.0]) @ record.intrinsics
        boxes, _, depths = project_boxes(truth.boxes, scaled[None], camera[None], (180, 320))
        mask = np.zeros((180, 320), bool)
        for (left, top, right, bottom), depth in zip(boxes[0], depths[0], strict=True):
            if depth > 1.0:
                mask[int(top) : int(bottom) + 1, int(left) : int(right) + 1] = True
        if mask.any():
            inside.append(changed[mask].mean())
            outside.append(changed[:80][~mask[:80]].mean())  # sky
    assert np.mean(inside) > 3 * np.mean(outside)


def test_rendering_resumes(dataroot: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    render_split(dataroot, "v1.0-synth", "few", output, 64)
    images = sorted(output.glob("samples/*/*.jpg"))
    times = {path: path.stat().st_mtime_ns for path in images}
    images[0].unlink()
    render_split(dataroot, "v1.0-synth", "few", output, 64)
    same = [path for path in images if path.stat().st_mtime_ns == times[path]]
    assert images[0].is_file() and len(same) == len(images) - 6  # one key frame again


def test_scenes_without_photographs_are_left_out(
    dataroot: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scenes = link_photographs(dataroot, "v1.0-synth", tmp_path / "linked")
    assert scenes == scene_names(open_dataset(tmp_path / "linked", "v1.0-synth"))
    assert os.path.islink(tmp_path / "linked" / "samples")
    bare = tmp_path / "bare"
    (bare / "v1.0-synth").parent.mkdir()
    (bare / "v1.0-synth").symlink_to(dataroot / "v1.0-synth")
    (bare / "samples").mkdir()
    arguments = ["--tables", str(bare), "--version", "v1.0-synth", "--link"]
    assert main([*arguments, "--output", str(tmp_path / "none")]) == 2
    assert "no scene has the photographs" in capsys.readouterr().err
    assert SPLIT in (tmp_path / "linked" / "v1.0-synth" / "splits.json").read_text()
