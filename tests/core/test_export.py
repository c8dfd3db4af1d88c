# SPDX-License-Identifier: Apache-2.0
"""The synthetic data set in the nuScenes devkit: it loads, its lists are consistent, and it can be scored."""

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from nuscenes import NuScenes
from nuscenes.eval.common.config import config_factory
from nuscenes.eval.detection.evaluate import DetectionEval
from nuscenes.eval.detection.utils import category_to_detection_name
from nuscenes.utils.data_classes import LidarPointCloud
from nuscenes.utils.geometry_utils import points_in_box, view_points

from ftkd_core.classes import CAMERA_CHANNELS, CLASS_NAMES
from ftkd_core.data import nuscenes as access
from ftkd_core.data.synthetic import export
from ftkd_core.data.synthetic.export_scene import round_times
from ftkd_core.data.synthetic.export_tables import CATEGORY_OF_CLASS, make_token, visibility_token
from ftkd_core.data.synthetic.frame import render_frame
from ftkd_core.data.synthetic.render import render_camera
from ftkd_core.data.synthetic.rig import nuscenes_rig
from ftkd_core.data.synthetic.rig_presets import preset_rig
from ftkd_core.data.synthetic.varied_rigs import draw_rig
from ftkd_core.data.synthetic.world import Scene, make_scene
from ftkd_core.errors import UserError

VERSION = "v1.0-synth"
SPLIT = "synth_val"
SEEDS = (7, 8)
WIDTH, HEIGHT, DURATION_S = 352, 198, 2.0
SETTINGS: dict[str, Any] = {
    "version": VERSION,
    "split": SPLIT,
    "width": WIDTH,
    "height": HEIGHT,
    "progress": False,
}


@pytest.fixture(scope="module")
def dataroot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("export") / "synth"
    return export.write_dataset(root, SEEDS, duration_s=DURATION_S, **SETTINGS)


@pytest.fixture(scope="module")
def dataset(dataroot: Path) -> NuScenes:
    return access.open_dataset(dataroot, VERSION)


@pytest.fixture(scope="module")
def scene() -> Scene:
    return make_scene(SEEDS[0], DURATION_S)


def test_devkit_loads_all_tables_and_the_split(dataset: NuScenes) -> None:
    assert access.split_scenes(dataset, SPLIT) == access.scene_names(dataset)
    assert len(dataset.scene) == len(dataset.log) == len(dataset.map) == 2
    assert len(dataset.sample) == 8
    assert len(dataset.category) == 23 and len(dataset.attribute) == 8 and len(dataset.visibility) == 4
    assert {sensor["channel"] for sensor in dataset.sensor} == {*CAMERA_CHANNELS, "LIDAR_TOP"}
    assert dataset.sample_annotation
    for sample in dataset.sample:
        assert set(sample["data"]) == {*CAMERA_CHANNELS, "LIDAR_TOP"}
        assert sample["anns"]


@pytest.mark.parametrize("name", CLASS_NAMES)
def test_categories_map_to_the_detection_classes(name: str) -> None:
    assert category_to_detection_name(CATEGORY_OF_CLASS[name]) == name


@pytest.mark.parametrize(
    ("table", "owner"),
    [
        ("sample", "scene_token"),
        ("sample_data", "calibrated_sensor_token"),
        ("sample_annotation", "instance_token"),
    ],
)
def test_linked_lists_are_consistent(dataset: NuScenes, table: str, owner: str) -> None:
    rows = getattr(dataset, table)
    heads = [row for row in rows if row["prev"] == ""]
    assert len(heads) == len({row[owner] for row in rows})
    visited = 0
    for head in heads:
        chain = list(_chain(dataset, table, head))
        visited += len(chain)
        assert {row[owner] for row in chain} == {head[owner]}
        assert [row["prev"] for row in chain[1:]] == [row["token"] for row in chain[:-1]]
        times = [_time_us(dataset, row) for row in chain]
        assert times == sorted(set(times))
    assert visited == len(rows)
    assert len({row["token"] for row in rows}) == len(rows)


def test_counts_and_end_tokens_match_the_lists(dataset: NuScenes) -> None:
    for scene in dataset.scene:
        chain = list(_chain(dataset, "sample", dataset.get("sample", scene["first_sample_token"])))
        assert len(chain) == scene["nbr_samples"] and chain[-1]["token"] == scene["last_sample_token"]
    for instance in dataset.instance:
        first = dataset.get("sample_annotation", instance["first_annotation_token"])
        chain = list(_chain(dataset, "sample_annotation", first))
        assert first["prev"] == "" and len(chain) == instance["nbr_annotations"]
        assert chain[-1]["token"] == instance["last_annotation_token"]


def test_capture_times_follow_nuscenes(dataset: NuScenes) -> None:
    """Images at 12 Hz in steps of 50 and 100 ms; at 2 Hz, key frames whose images are the nearest to their
    stamp."""
    for scene in dataset.scene:
        for channel in CAMERA_CHANNELS:
            records = access.camera_records(dataset, scene["name"], channel)
            steps_ms = {
                round((after.stamp_ns - before.stamp_ns) * 1e-6) for before, after in pairwise(records)
            }
            assert steps_ms == {50, 100}
            assert len(records) == 3 * 6 + 1
            for record in records:
                key_ns = access.sample_stamp_ns(dataset, record.sample_token)
                nearest = min(records, key=lambda other: abs(other.stamp_ns - key_ns))
                assert record.is_key_frame == (record is nearest)
                assert record.is_key_frame or record.stamp_ns < key_ns
                assert dataset.get("sample_data", record.token)["filename"].startswith(
                    ("samples/" if record.is_key_frame else "sweeps/") + channel
                )


def test_rounds_are_complete_and_in_order(dataset: NuScenes) -> None:
    name = access.scene_names(dataset)[0]
    rounds = access.sweep_rounds(dataset, name)
    assert len(rounds) == len(round_times(DURATION_S, sweeps=True)) == 19
    assert all(None not in sweep_round.records for sweep_round in rounds)
    assert [sweep_round.sample_token for sweep_round in rounds[::6]] == access.scene_samples(dataset, name)
    stamps = [[record.stamp_ns for record in sweep_round.records if record] for sweep_round in rounds]
    assert all(max(earlier) < max(later) for earlier, later in pairwise(stamps))
    assert all(max(stamp) - min(stamp) < 50_000_000 for stamp in stamps)
    keyed = access.sweep_rounds(dataset, name, keyframes_only=True)
    assert [sweep_round.sample_token for sweep_round in keyed] == access.scene_samples(dataset, name)


def test_camera_round_of_a_key_frame_has_recent_images(dataset: NuScenes, scene: Scene) -> None:
    camera_round = access.camera_round(dataset, access.scene_samples(dataset, scene.name)[2])
    for view in camera_round.views:
        assert view is not None and view.image.shape == (HEIGHT, WIDTH, 3)
        assert view.image.std() > 5
    newest = max(view.stamp_ns for view in camera_round.views if view)
    assert 0 < camera_round.reference_stamp_ns - newest < 10_000_000


def test_ground_truth_velocity_matches_the_world(dataset: NuScenes, scene: Scene) -> None:
    """Finite differences between key frames follow the true velocities, in ego axes."""
    token = access.scene_samples(dataset, scene.name)[1]
    objects = access.ground_truth(dataset, token, min_points=1)
    actors = scene.actors_at((objects.stamp_ns // 1000 - scene.start_time_us) * 1e-6)
    row_of = {make_token("instance", scene.name, int(i)): row for row, i in enumerate(actors.instance)}
    rows = [row_of[instance] for instance in objects.ids]
    np.testing.assert_array_equal(objects.labels, actors.labels[rows])
    np.testing.assert_allclose(objects.boxes[:, 3:6], actors.boxes_global[rows, 3:6])
    known = np.isfinite(objects.boxes[:, 7])
    true_speed = np.linalg.norm(actors.boxes_global[rows, 7:9], axis=1)
    speed = np.linalg.norm(objects.boxes[:, 7:9], axis=1)
    assert known.sum() >= 5
    assert np.median(np.abs(speed - true_speed)[known]) < 0.1
    # The velocity of a driving object points along its heading.
    driving = known & (true_speed > 3) & (objects.labels == CLASS_NAMES.index("car"))
    along = np.cos(np.arctan2(objects.boxes[:, 8], objects.boxes[:, 7]) - objects.boxes[:, 6])
    assert np.all(along[driving] > 0.8)


def test_lidar_returns_lie_in_their_boxes(dataset: NuScenes) -> None:
    checked = 0
    for sample in dataset.sample:
        path, boxes, _ = dataset.get_sample_data(sample["data"]["LIDAR_TOP"])
        cloud = LidarPointCloud.from_file(path)
        assert cloud.points.shape[0] == 4 and cloud.points.shape[1] > 1000
        for box in boxes:
            expected = dataset.get("sample_annotation", box.token)["num_lidar_pts"]
            inside = int(points_in_box(box, cloud.points[:3], wlh_factor=1.1).sum())
            assert inside >= 0.9 * expected
            checked += expected > 0
    assert checked > 20


def test_boxes_lie_on_the_drawn_objects(dataset: NuScenes, scene: Scene) -> None:
    """The pixels that change when a standing object is removed from the world fill the devkit's box of the
    object."""
    rig = nuscenes_rig(WIDTH, HEIGHT)
    rows = {make_token("instance", scene.name, row): row for row in range(len(scene.actors))}
    overlaps = []
    for camera, channel in enumerate(CAMERA_CHANNELS):
        record = access.camera_records(dataset, scene.name, channel, keyframes_only=True)[1]
        time_s = (record.stamp_ns // 1000 - scene.start_time_us) * 1e-6
        image = render_camera(scene, time_s, rig, camera).image.astype(int)
        assert np.abs(access.load_view(record).image - image).mean() < 8, "the file shows another time"
        _, boxes, intrinsics = dataset.get_sample_data(record.token)
        for box in boxes:
            annotation = dataset.get("sample_annotation", box.token)
            row = rows[annotation["instance_token"]]
            corners = box.corners()
            if annotation["visibility_token"] != "4" or scene.actors[row].motion.at(time_s)[3] > 0.5:
                continue
            pixels = view_points(corners, intrinsics, normalize=True)[:2].T
            inside = np.all((pixels > 2) & (pixels < np.array([WIDTH, HEIGHT]) - 2))
            if corners[2].min() < 1 or not inside or np.prod(np.ptp(pixels, axis=0)) < 200:
                continue
            others = replace(scene, actors=scene.actors[:row] + scene.actors[row + 1 :])
            gone = render_camera(others, time_s, rig, camera).image.astype(int)
            changed = np.argwhere(np.abs(image - gone).max(axis=2) > 10)[:, ::-1]
            on_box = _within(changed, pixels)
            # The contact shadow extends up to 15 cm beyond the box.
            box.wlh = box.wlh + np.array([0.3, 0.3, 0.0])
            shaded = view_points(box.corners(), intrinsics, normalize=True)[:2].T
            assert _within(changed, shaded).mean() > 0.9, (channel, scene.actors[row].name)
            painted = changed[on_box]
            overlaps.append(np.prod((np.ptp(painted, axis=0) + 1) / np.ptp(pixels, axis=0)))
    assert len(overlaps) >= 4
    assert np.median(overlaps) > 0.7


def test_only_occlusion_reduces_visibility(dataset: NuScenes, scene: Scene) -> None:
    """Levels equal those of the frame's own pixel counts, and a hidden object is visible if it is the only
    object."""
    rig = nuscenes_rig(WIDTH, HEIGHT)
    sample = dataset.get("sample", access.scene_samples(dataset, scene.name)[2])
    key_time_s = (sample["timestamp"] - scene.start_time_us) * 1e-6
    frame = render_frame(scene, key_time_s, rig)
    rows = {make_token("instance", scene.name, row): row for row in range(len(scene.actors))}
    hidden = []
    for token in sample["anns"]:
        annotation = dataset.get("sample_annotation", token)
        row = rows[annotation["instance_token"]]
        assert annotation["visibility_token"] == visibility_token(float(frame.visible_fraction[row]))
        assert annotation["num_lidar_pts"] == frame.lidar_points[row]
        if annotation["visibility_token"] == "1":
            hidden.append(row)
    assert hidden
    for row in hidden[:3]:
        alone = render_frame(replace(scene, actors=(scene.actors[row],), fixtures=()), key_time_s, rig)
        assert alone.visible_fraction[0] > 0.8


def test_visibility_fractions_map_to_nuscenes_levels() -> None:
    assert [visibility_token(value) for value in (0.0, 0.39, 0.4, 0.59, 0.6, 0.79, 0.8, 1.0)] == list(
        "11223344"
    )


def ground_truth_as_results(dataset: NuScenes) -> dict[str, Any]:
    """Return all annotations with lidar points as a results dictionary of the devkit."""
    results: dict[str, list[dict[str, Any]]] = {sample["token"]: [] for sample in dataset.sample}
    attributes = {row["token"]: row["name"] for row in dataset.attribute}
    for annotation in dataset.sample_annotation:
        name = category_to_detection_name(annotation["category_name"])
        velocity = dataset.box_velocity(annotation["token"])[:2]
        if name is None or annotation["num_lidar_pts"] == 0:
            continue
        results[annotation["sample_token"]].append(
            {
                "sample_token": annotation["sample_token"],
                "translation": annotation["translation"],
                "size": annotation["size"],
                "rotation": annotation["rotation"],
                "velocity": np.nan_to_num(velocity).tolist(),
                "detection_name": name,
                "detection_score": 0.9,
                "attribute_name": attributes[annotation["attribute_tokens"][0]]
                if annotation["attribute_tokens"]
                else "",
            }
        )
    modalities = {
        "use_camera": True,
        "use_lidar": False,
        "use_radar": False,
        "use_map": False,
        "use_external": False,
    }
    return {"meta": modalities, "results": results}


def test_ground_truth_as_detections_scores_perfectly(
    dataset: NuScenes, dataroot: Path, tmp_path: Path
) -> None:
    found = ground_truth_as_results(dataset)
    path = tmp_path / "results.json"
    path.write_text(json.dumps(found))
    scores, _ = DetectionEval(
        dataset,
        config_factory("detection_cvpr_2019"),
        str(path),
        SPLIT,
        str(tmp_path / "eval"),
        verbose=False,
    ).evaluate()
    entries = [entry for sample in found["results"].values() for entry in sample]
    assert {entry["detection_name"] for entry in entries} == set(CLASS_NAMES)
    assert scores.mean_ap > 0.99
    assert scores.nd_score > 0.99


def test_same_seed_gives_the_same_tables(dataroot: Path, tmp_path: Path) -> None:
    """A smaller data set of the same scene has the same tokens and images."""
    again = export.write_dataset(
        tmp_path / "again", SEEDS[:1], duration_s=DURATION_S, sweeps=False, **SETTINGS
    )
    rows = json.loads((again / VERSION / "sample_data.json").read_text())
    originals = {
        row["token"]: row for row in json.loads((dataroot / VERSION / "sample_data.json").read_text())
    }
    assert len(rows) == 4 * 7
    for row in rows:
        original = originals[row["token"]]
        assert original["filename"] == row["filename"]
        if row["fileformat"] == "jpg":
            assert (again / row["filename"]).read_bytes() == (dataroot / row["filename"]).read_bytes()


def test_folder_with_content_is_not_changed(tmp_path: Path) -> None:
    (tmp_path / "existing.txt").write_text("existing content")
    with pytest.raises(UserError, match="not empty"):
        export.write_dataset(tmp_path, SEEDS, **SETTINGS)
    with pytest.raises(UserError, match="is a file"):
        export.write_dataset(tmp_path / "existing.txt", SEEDS, **SETTINGS)
    assert [path.name for path in tmp_path.iterdir()] == ["existing.txt"]


def test_interrupted_run_leaves_no_files(
    tmp_path: Path, scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "make_scene", lambda *_: scene)
    monkeypatch.setattr(export.DatasetTables, "write", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export.write_dataset(tmp_path / "synth", SEEDS[:1], duration_s=DURATION_S, sweeps=False, **SETTINGS)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"split": "val"}, "split 'val'"),
        ({"version": "samples"}, "version 'samples'"),
        ({"version": "a/b"}, "version 'a/b'"),
        ({"width": 3}, "image size 3x198"),
        ({"duration_s": 0.1}, "duration 0.1"),
        ({"duration_s": float("nan")}, "duration nan"),
        ({"jpeg_quality": 0}, "quality 0"),
    ],
)
def test_invalid_arguments_raise_with_name_and_value(
    tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    with pytest.raises(UserError, match=named):
        export.write_dataset(tmp_path / "synth", SEEDS, **{**SETTINGS, **change})
    with pytest.raises(UserError, match="expected at least one"):
        export.write_dataset(tmp_path / "synth", [1, 1], **SETTINGS)
    with pytest.raises(UserError, match="expected 0 to"):
        export.write_dataset(tmp_path / "synth", [10**9], **SETTINGS)
    with pytest.raises(UserError, match="number of scenes 0"):
        export.run_synth(tmp_path / "synth", 0, 1, VERSION, SPLIT, WIDTH, HEIGHT, 20.0)


def _chain(dataset: NuScenes, table: str, head: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield head
    while head["next"]:
        head = dataset.get(table, head["next"])
        yield head


def _within(points: NDArray[Any], corners: NDArray[Any]) -> NDArray[np.bool_]:
    """Whether pixels (P, 2) lie in the bounds of projected corners with a margin of two pixels."""
    low, high = corners.min(axis=0) - 2, corners.max(axis=0) + 2
    inside: NDArray[np.bool_] = np.all((points > low) & (points < high), axis=1)
    return inside


def _time_us(dataset: NuScenes, row: dict[str, Any]) -> int:
    return int(
        row["timestamp"] if "timestamp" in row else dataset.get("sample", row["sample_token"])["timestamp"]
    )


def test_rig_with_lenses_is_written_with_them(tmp_path: Path) -> None:
    root = export.write_dataset(
        tmp_path / "truck", SEEDS[:1], duration_s=0.5, sweeps=False, rig="truck",
        **{**SETTINGS, "width": 96, "height": None},
    )  # fmt: skip
    rig = preset_rig("truck", 96)
    dataset = access.open_dataset(root, VERSION)
    (token,) = access.scene_samples(dataset, access.scene_names(dataset)[0])
    views = access.camera_round(dataset, token, rig.channels).views
    for camera, view in enumerate(views):
        assert view is not None
        assert view.image.shape == (rig.height, 96, 3) and view.name == rig.channels[camera]
        assert view.lens == rig.lens(camera)
        np.testing.assert_allclose(view.intrinsics, rig.intrinsics[camera])
        np.testing.assert_allclose(view.ego_from_camera, rig.ego_from_camera[camera], atol=1e-9)
    start_ns = make_scene(SEEDS[0], 0.5).start_time_us * 1000
    stamps = [view.stamp_ns - start_ns for view in views if view is not None]
    np.testing.assert_allclose(stamps, rig.exposures_s(0.0) * 1e9, atol=600)  # microseconds in the tables


def test_drawn_rig_is_written_as_its_calibration_describes_it(tmp_path: Path) -> None:
    seed = next(s for s in range(100) if len(draw_rig(s).true.channels) == 4)
    root = export.write_dataset(
        tmp_path / "varied", [seed], duration_s=0.5, sweeps=False, rig="varied",
        **{**SETTINGS, "width": 96, "height": None},
    )  # fmt: skip
    dataset = access.open_dataset(root, VERSION)
    driven = draw_rig(seed)
    poses = access.sensor_poses(dataset, access.scene_names(dataset)[0])
    for camera, channel in enumerate(driven.true.channels):
        np.testing.assert_allclose(poses[channel], driven.calibrated.ego_from_camera[camera], atol=1e-9)
        assert not np.allclose(poses[channel], driven.true.ego_from_camera[camera], atol=1e-4)


def test_default_rig_writes_the_columns_of_nuscenes_only(dataroot: Path) -> None:
    rows = json.loads((dataroot / VERSION / "calibrated_sensor.json").read_text())
    assert {frozenset(row) for row in rows} == {
        frozenset({"token", "sensor_token", "rotation", "translation", "camera_intrinsic"})
    }
