# SPDX-License-Identifier: Apache-2.0
"""Access to nuScenes compared with the devkit's own functions on one real key frame."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from nuscenes import NuScenes
from nuscenes.eval.detection.utils import category_to_detection_name
from nuscenes.utils.data_classes import Box
from nuscenes.utils.geometry_utils import BoxVisibility
from pyquaternion import Quaternion

from ftkd_core.boxes import box_corners
from ftkd_core.classes import CAMERA_CHANNELS, CLASS_NAMES
from ftkd_core.data import nuscenes as access
from ftkd_core.errors import UserError
from ftkd_core.geometry import invert_rigid, is_rigid, transform_points

REPOSITORY = Path(__file__).resolve().parents[2]
SAMPLE_ROOT = Path(
    os.environ.get("FTKD_NUSCENES_SAMPLE", REPOSITORY.parent / "shared/data/nuscenes_one_sample")
)
VERSION = "v1.0-mini"
SCENE = "scene-0061"

needs_sample = pytest.mark.skipif(
    not (SAMPLE_ROOT / VERSION).is_dir(),
    reason=f"the real nuScenes key frame is not at {SAMPLE_ROOT} (its licence does not allow it in the "
    "repository); set FTKD_NUSCENES_SAMPLE to a folder that holds one",
)


@pytest.fixture(scope="module")
def dataset() -> NuScenes:
    return access.open_dataset(SAMPLE_ROOT, VERSION)


@pytest.fixture(scope="module")
def sample_token(dataset: NuScenes) -> str:
    (token,) = access.scene_samples(dataset, SCENE)
    return token


@needs_sample
def test_camera_round_holds_six_real_images(dataset: NuScenes, sample_token: str) -> None:
    camera_round = access.camera_round(dataset, sample_token)
    assert camera_round.reference_stamp_ns == 1532402927647951000
    assert len(camera_round.views) == 6
    for view in camera_round.views:
        assert view is not None
        assert view.image.shape == (900, 1600, 3) and view.image.dtype == np.uint8
        assert is_rigid(view.ego_from_camera) and is_rigid(view.global_from_ego)
        # Cameras are exposed during the lidar rotation, at most 50 ms before the sweep's stamp.
        assert 0 <= camera_round.reference_stamp_ns - view.stamp_ns < 50_000_000
        # The sky is blue in RGB; it would be brown with swapped channels.
        sky = view.image[:100].reshape(-1, 3).mean(axis=0)
        assert sky[2] >= sky[0]


@needs_sample
def test_missing_camera_is_none_and_order_is_kept(dataset: NuScenes, sample_token: str) -> None:
    sample = dataset.get("sample", sample_token)
    token = sample["data"].pop("CAM_BACK")
    try:
        camera_round = access.camera_round(dataset, sample_token, ["CAM_BACK", "CAM_FRONT"])
    finally:
        sample["data"]["CAM_BACK"] = token
    assert camera_round.views[0] is None
    front = access.camera_records(dataset, SCENE, "CAM_FRONT")[0]
    assert camera_round.views[1] is not None and camera_round.views[1].stamp_ns == front.stamp_ns


@needs_sample
def test_ground_truth_agrees_with_devkit_boxes(dataset: NuScenes, sample_token: str) -> None:
    objects = access.ground_truth(dataset, sample_token)
    annotations = [
        dataset.get("sample_annotation", token) for token in dataset.get("sample", sample_token)["anns"]
    ]
    by_instance = {annotation["instance_token"]: annotation for annotation in annotations}
    assert len(objects.boxes) == 68 and len(set(objects.ids)) == 68
    lidar = dataset.get("sample_data", dataset.get("sample", sample_token)["data"]["LIDAR_TOP"])
    ego_pose = dataset.get("ego_pose", lidar["ego_pose_token"])
    for box, label, instance in zip(objects.boxes, objects.labels, objects.ids, strict=True):
        expected: Box = dataset.get_box(by_instance[instance]["token"])
        expected.translate(-np.array(ego_pose["translation"]))
        expected.rotate(Quaternion(ego_pose["rotation"]).inverse)
        np.testing.assert_allclose(box[:3], expected.center, atol=1e-6)
        np.testing.assert_allclose(box[[4, 3, 5]], expected.wlh)
        # Our boxes are upright; the devkit's tilt with the road by half a degree, or a few centimetres.
        ours = box_corners(box[None])[0]
        devkit_corners = expected.corners().T
        worst = max(np.linalg.norm(devkit_corners - corner, axis=1).min() for corner in ours)
        assert worst < 0.05 + 0.03 * box[3:6].max()
        assert CLASS_NAMES[label] == category_to_detection_name(expected.name)
    assert np.all(np.isnan(objects.boxes[:, 7:9])), "one key frame has no velocity"


@needs_sample
def test_min_points_drops_objects_the_metrics_ignore(dataset: NuScenes, sample_token: str) -> None:
    annotations = [
        dataset.get("sample_annotation", token) for token in dataset.get("sample", sample_token)["anns"]
    ]
    hit = [item for item in annotations if item["num_lidar_pts"] + item["num_radar_pts"] > 0]
    assert 0 < len(hit) < len(annotations)
    objects = access.ground_truth(dataset, sample_token, min_points=1)
    assert set(objects.ids) == {item["instance_token"] for item in hit}


@needs_sample
def test_projection_matches_devkit_rendering(dataset: NuScenes, sample_token: str) -> None:
    """Global corners projected with our matrices agree with the devkit's transforms in every camera."""
    for record in (access.camera_records(dataset, SCENE, channel)[0] for channel in CAMERA_CHANNELS):
        camera_from_global = invert_rigid(record.global_from_ego @ record.ego_from_camera)
        _, boxes, intrinsics = dataset.get_sample_data(record.token, box_vis_level=BoxVisibility.ANY)
        np.testing.assert_allclose(intrinsics, record.intrinsics)
        assert boxes
        for box in boxes:
            global_center = np.array(dataset.get("sample_annotation", box.token)["translation"])
            np.testing.assert_allclose(
                transform_points(camera_from_global, global_center[None])[0], box.center, atol=1e-6
            )


@needs_sample
def test_records_rounds_and_poses_of_a_scene(dataset: NuScenes, sample_token: str) -> None:
    (sweep_round,) = access.sweep_rounds(dataset, SCENE)
    assert sweep_round.sample_token == sample_token
    assert sweep_round.newest.channel == "CAM_BACK_LEFT"
    assert [record.channel for record in sweep_round.records if record] == list(CAMERA_CHANNELS)
    loaded = access.load_sweep_round(sweep_round)
    assert loaded.reference_stamp_ns == sweep_round.newest.stamp_ns
    poses = access.ego_poses(dataset, SCENE)
    assert len(poses) == 7 and poses == sorted(poses, key=lambda item: item[0])
    assert poses[-1][0] == access.sample_stamp_ns(dataset, sample_token)
    sensors = access.sensor_poses(dataset, SCENE)
    assert set(sensors) == {*CAMERA_CHANNELS, "LIDAR_TOP"}
    assert all(is_rigid(pose) for pose in sensors.values())


@needs_sample
def test_official_split_is_limited_to_present_scenes(dataset: NuScenes) -> None:
    assert access.split_scenes(dataset, "mini_train") == [SCENE]
    with pytest.raises(UserError, match="no scene of split 'mini_val'.*scene-0061"):
        access.split_scenes(dataset, "mini_val")
    with pytest.raises(UserError, match="split 'nonsense'"):
        access.split_scenes(dataset, "nonsense")


@needs_sample
def test_unknown_name_raises_with_existing_names(dataset: NuScenes) -> None:
    with pytest.raises(UserError, match="scene-9999.*scene-0061"):
        access.scene_samples(dataset, "scene-9999")
    with pytest.raises(UserError, match="CAM_FORNT.*CAM_FRONT"):
        access.camera_records(dataset, SCENE, "CAM_FORNT")
    with pytest.raises(UserError, match="sample 'abc' is not in"):
        access.ground_truth(dataset, "abc")
    with pytest.raises(UserError, match="v1.0-trainval.*v1.0-mini"):
        access.open_dataset(SAMPLE_ROOT, "v1.0-trainval")


@needs_sample
@pytest.mark.parametrize("damage", ["missing", "truncated", "resized"])
def test_damaged_image_raises_with_its_path(dataset: NuScenes, tmp_path: Path, damage: str) -> None:
    record = access.camera_records(dataset, SCENE, "CAM_FRONT")[0]
    path = tmp_path / "image.jpg"
    shutil.copyfile(record.path, path)
    broken = access.CameraRecord(**{**vars(record), "path": path})
    match damage:
        case "missing":
            path.unlink()
        case "truncated":
            path.write_bytes(path.read_bytes()[:200])
        case "resized":
            broken = access.CameraRecord(**{**vars(broken), "width": 800, "height": 450})
    with pytest.raises(UserError, match="image.jpg"):
        access.load_view(broken)


def test_open_dataset_raises_with_the_cause(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        access.open_dataset(tmp_path / "nowhere", VERSION)
    with pytest.raises(UserError, match="holds no nuScenes version"):
        access.open_dataset(tmp_path, VERSION)
    tables = tmp_path / VERSION
    tables.mkdir()
    (tables / "sample.json").write_text("[]")
    with pytest.raises(UserError, match=r"lacks the tables calibrated_sensor\.json"):
        access.open_dataset(tmp_path, VERSION)
    for name in access.TABLE_NAMES:
        (tables / f"{name}.json").write_text("[]")
    with pytest.raises(UserError, match="has no scene or no sample"):
        access.open_dataset(tmp_path, VERSION)
    (tables / "scene.json").write_text(json.dumps([{"token": "x"}])[:-3])
    with pytest.raises(UserError, match="not valid JSON"):
        access.open_dataset(tmp_path, VERSION)
