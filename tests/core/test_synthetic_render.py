# SPDX-License-Identifier: Apache-2.0
"""Synthetic images, lidar and key frames: drawn pixels lie in the boxes, near hides far, all is
reproducible."""

from dataclasses import replace
from functools import lru_cache

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ftkd_core.boxes import box_corners
from ftkd_core.classes import CAMERA_CHANNELS, CLASS_NAMES
from ftkd_core.data.synthetic.actors import Actor
from ftkd_core.data.synthetic.bodies import build_body, sample_size
from ftkd_core.data.synthetic.frame import SceneFrame, render_frame
from ftkd_core.data.synthetic.lidar import lidar_hits, simulate_sweep
from ftkd_core.data.synthetic.ordering import footprints, painting_order
from ftkd_core.data.synthetic.paths import static_motion
from ftkd_core.data.synthetic.render import render_camera
from ftkd_core.data.synthetic.rig import EGO_FROM_LIDAR, LIDAR_OFFSET_S, SurroundRig, nuscenes_rig
from ftkd_core.data.synthetic.world import Scene, make_scene
from ftkd_core.geometry import invert_rigid, is_rigid, transform_points

FRONT = CAMERA_CHANNELS.index("CAM_FRONT")


@lru_cache(maxsize=4)
def scene_of(seed: int) -> Scene:
    return make_scene(seed)


@lru_cache(maxsize=1)
def small_rig() -> SurroundRig:
    return nuscenes_rig().resized(352, 198, crop_top=70)


@lru_cache(maxsize=4)
def frame_of(seed: int) -> SceneFrame:
    return render_frame(scene_of(seed), 5.0, small_rig())


def actor_ahead(name: str, ahead_m: float, left_m: float, turn: float, random: np.random.Generator) -> Actor:
    """Make an actor at rest at a place relative to the ego of scene 0 at time 0."""
    x, y, yaw, _ = scene_of(0).ego.at(0.0)
    place = (
        x + ahead_m * np.cos(yaw) - left_m * np.sin(yaw),
        y + ahead_m * np.sin(yaw) + left_m * np.cos(yaw),
        yaw + turn,
    )
    size = sample_size(name, random)
    return Actor(name=name, size=size, motion=static_motion(*place), body=build_body(name, size, random))


def scene_with(*actors: Actor) -> Scene:
    return replace(scene_of(0), actors=actors, fixtures=(), fog_per_m=0.0)


def test_rig_has_the_channels_poses_and_exposures_of_the_vehicle() -> None:
    rig = nuscenes_rig()
    assert rig.channels == CAMERA_CHANNELS and (rig.width, rig.height) == (1600, 900)
    assert all(is_rigid(pose, 1e-9) for pose in rig.ego_from_camera) and is_rigid(EGO_FROM_LIDAR, 1e-9)
    offsets = dict(zip(rig.channels, rig.exposure_offsets_s, strict=True))
    order = sorted(offsets, key=lambda name: float(offsets[name]))
    assert [name.removeprefix("CAM_") for name in order] == [
        "FRONT_LEFT", "FRONT", "FRONT_RIGHT", "BACK_RIGHT", "BACK", "BACK_LEFT"
    ]  # fmt: skip
    assert rig.exposure_offsets_s.max() < LIDAR_OFFSET_S
    axes = rig.ego_from_camera[:, :3, 2]
    yaws = dict(zip(rig.channels, np.rad2deg(np.arctan2(axes[:, 1], axes[:, 0])), strict=True))
    assert (
        abs(yaws["CAM_FRONT"]) < 1
        and 50 < yaws["CAM_FRONT_LEFT"] < 60
        and -60 < yaws["CAM_FRONT_RIGHT"] < -50
    )
    assert (
        abs(abs(yaws["CAM_BACK"]) - 180) < 1 and yaws["CAM_BACK_LEFT"] > 90 and yaws["CAM_BACK_RIGHT"] < -90
    )


@settings(max_examples=40, deadline=None)
@given(
    width=st.integers(64, 2000),
    height=st.integers(64, 1200),
    top=st.integers(0, 30),
    bottom=st.integers(0, 30),
)
def test_resized_rig_projects_to_scaled_and_cropped_pixels(
    width: int, height: int, top: int, bottom: int
) -> None:
    full = nuscenes_rig()
    rig = full.resized(width, height, crop_top=top, crop_bottom=bottom)
    assert (rig.width, rig.height) == (width, height - top - bottom)
    point = np.array([0.4, -0.2, 3.0])
    before = (full.intrinsics @ point)[:, :2] / point[2]
    after = (rig.intrinsics @ point)[:, :2] / point[2]
    np.testing.assert_allclose(after, before * [width / 1600, height / 900] - [0, top], atol=1e-9)


@pytest.mark.parametrize(("width", "height", "top"), [(0, 10, 0), (10, 10, 10), (10, 10, -1)])
def test_rig_without_pixels_raises(width: int, height: int, top: int) -> None:
    with pytest.raises(ValueError, match="cannot resize"):
        nuscenes_rig().resized(width, height, crop_top=top)


def test_images_are_reproducible_and_depend_on_seed_and_noise() -> None:
    rig, scene = small_rig(), scene_of(0)
    first = render_camera(scene, 3.0, rig, FRONT).image
    assert first.shape == (rig.height, rig.width, 3) and first.dtype == np.uint8
    again = scene_of.__wrapped__(0)
    np.testing.assert_array_equal(first, render_camera(again, 3.0, rig, FRONT).image)
    noisy = [render_camera(scene, 3.0, rig, FRONT, noise_seed=seed).image for seed in (1, 1, 2)]
    np.testing.assert_array_equal(noisy[0], noisy[1])
    assert (noisy[0] != noisy[2]).mean() > 0.5
    assert np.abs(noisy[0].astype(int) - noisy[2].astype(int)).mean() < 12  # the same scene with other noise
    other = render_camera(scene_of(2), 3.0, rig, FRONT, noise_seed=1).image
    assert np.abs(noisy[0].astype(int) - other.astype(int)).mean() > 12


def test_small_image_equals_the_scaled_large_image_approximately() -> None:
    scene = scene_of(0)
    large = render_camera(scene, 3.0, nuscenes_rig(1408, 792), FRONT).image
    small = render_camera(scene, 3.0, nuscenes_rig(352, 198), FRONT).image
    shrunk = cv2.resize(large, (352, 198), interpolation=cv2.INTER_AREA)
    assert np.abs(shrunk.astype(float) - small).mean() < 8
    shifted = np.roll(small.astype(float), 3, axis=1)
    assert np.abs(shrunk.astype(float) - small).mean() < 0.7 * np.abs(shrunk - shifted).mean()


@pytest.mark.parametrize("name", CLASS_NAMES)
@pytest.mark.parametrize("turn", [0.4, 2.5])
def test_drawn_pixels_fill_the_projected_box(name: str, turn: float) -> None:
    random = np.random.default_rng(3)
    far = 9.0 if name in ("traffic_cone", "barrier", "pedestrian") else 16.0
    scene = scene_with(actor_ahead(name, far, 0.4, turn, random))
    rig = nuscenes_rig(704, 396)
    painted = _difference(scene, scene_with(), rig)
    painted = _without_shadow(painted, scene, rig)
    hull = cv2.convexHull(_project(scene, rig)[0].astype(np.float32))[:, 0]
    inside = np.zeros(painted.shape, np.uint8)
    cv2.fillConvexPoly(inside, np.round((hull - 0.5) * 16).astype(np.int32), 1, cv2.LINE_8, 4)
    allowed = cv2.dilate(inside, np.ones((5, 5), np.uint8)) > 0
    assert painted.sum() > 50
    assert (painted & ~allowed).sum() <= 0.01 * painted.sum()
    rows, columns = np.nonzero(painted)
    extent = np.array([np.ptp(columns) + 1, np.ptp(rows) + 1])
    np.testing.assert_array_less(0.75 * np.ptp(hull, axis=0), extent + 2.0)
    assert painted.sum() > 0.3 * inside.sum()


@pytest.mark.parametrize("name", ["car", "bus", "barrier"])
def test_near_object_hides_the_object_behind_it(name: str) -> None:
    random = np.random.default_rng(4)
    near = actor_ahead("truck", 9.0, 0.0, 0.0, random)
    far = actor_ahead(name, 30.0, 0.0, 0.0, random)
    aside = actor_ahead(name, 30.0, 13.0, 0.0, random)
    rig = small_rig()
    for order, target in (((near, far, aside), (0, 1, 2)), ((aside, far, near), (2, 1, 0))):
        scene = scene_with(*order)
        rendering = render_camera(scene, 0.0, rig, FRONT)
        fraction = rendering.visible_pixels / np.maximum(rendering.total_pixels, 1e-9)
        assert fraction[target[0]] > 0.95
        assert rendering.total_pixels[target[1]] > 3 and fraction[target[1]] < 0.05
        assert fraction[target[2]] > 0.8
        hits = lidar_hits(scene, 0.0)
        assert hits[target[0]] > 20 and hits[target[1]] < 0.2 * max(hits[target[2]], 1) + 1


def test_front_and_rear_look_different() -> None:
    for name in ("car", "truck", "bus", "trailer", "construction_vehicle", "pedestrian"):
        views = []
        for turn in (0.0, np.pi):
            random = np.random.default_rng(5)
            scene = scene_with(actor_ahead(name, 15.0, 0.0, turn, random))
            views.append(
                render_camera(scene, 0.0, nuscenes_rig(704, 396), FRONT, noise_seed=1).image.astype(float)
            )
        painted = _difference(scene, scene_with(), nuscenes_rig(704, 396))
        assert np.abs(views[0] - views[1])[painted].mean() > 4, name


def test_bodies_next_to_and_behind_the_camera_give_valid_pixel_counts() -> None:
    random = np.random.default_rng(6)
    scene = scene_with(actor_ahead("bus", 4.0, 3.0, 0.0, random), actor_ahead("car", -8.0, 0.0, 0.0, random))
    for camera in range(len(CAMERA_CHANNELS)):
        rendering = render_camera(scene, 0.0, small_rig(), camera)
        pixels = small_rig().width * small_rig().height
        assert np.all(np.isfinite(rendering.total_pixels)) and np.all(rendering.total_pixels <= pixels)
        assert np.all(rendering.visible_pixels >= 0)
    front = render_camera(scene, 0.0, small_rig(), FRONT)
    assert front.total_pixels[1] == 0.0


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), count=st.integers(2, 12))
def test_painting_order_sorts_rows_of_blocks_back_to_front(seed: int, count: int) -> None:
    random = np.random.default_rng(seed)
    # Blocks in a row along x without contact: from the left end, each hides those farther right.
    x = np.cumsum(random.uniform(3.0, 6.0, count))
    poses = np.column_stack([x, random.uniform(-1.0, 1.0, count), random.uniform(-0.1, 0.1, count)])
    sizes = np.column_stack([random.uniform(0.3, 2.4, count), random.uniform(0.3, 6.0, count)])
    shuffled = random.permutation(count)
    order = painting_order(footprints(poses[shuffled], sizes[shuffled]), np.array([-5.0, 0.0]))
    assert sorted(order) == list(range(count))
    assert np.all(np.diff(poses[shuffled][order, 0]) < 0)


@pytest.mark.parametrize("seed", [0, 2])
def test_sweep_points_lie_on_the_boxes_of_their_actors(seed: int) -> None:
    scene = scene_of(seed)
    points, rows = simulate_sweep(scene, 5.0)
    assert points.dtype == np.float32 and points.shape[1] in (4, 5) and len(points) == len(rows) > 5000
    boxes = scene.actors_at(5.0).boxes_global
    global_from_lidar = scene.ego_pose(5.0) @ EGO_FROM_LIDAR
    xyz = transform_points(global_from_lidar, points[:, :3].astype(np.float64))
    assert xyz[:, 2].min() > -0.02
    for row in np.unique(rows[rows >= 0]):
        local = _in_box(xyz[rows == row], boxes[row])
        assert np.all(np.abs(local) <= boxes[row, 3:6] / 2 + 0.02)
    np.testing.assert_array_equal(lidar_hits(scene, 5.0), np.bincount(rows[rows >= 0], minlength=len(boxes)))


@pytest.mark.parametrize("seed", [0, 2])
def test_key_frame_combines_images_poses_and_ground_truth(seed: int) -> None:
    scene, frame = scene_of(seed), frame_of(seed)
    rig = small_rig()
    assert frame.images.shape == (6, rig.height, rig.width, 3)
    np.testing.assert_allclose(frame.exposure_s, 5.0 - LIDAR_OFFSET_S + rig.exposure_offsets_s)
    for pose, time in zip(frame.global_from_ego_at_exposure, frame.exposure_s, strict=True):
        np.testing.assert_array_equal(pose, scene.ego_pose(float(time)))
    np.testing.assert_array_equal(frame.global_from_ego, scene.ego_pose(5.0))
    np.testing.assert_array_equal(frame.actors.boxes_global, scene.actors_at(5.0).boxes_global)
    assert np.all(frame.visible_fraction >= 0) and np.all(frame.visible_fraction <= 1)
    assert (frame.lidar_points > 0).sum() >= 8 and (frame.visible_fraction > 0.4).sum() >= 8
    # Some objects must be hidden now, so that other frames add information.
    near = np.linalg.norm(frame.actors.boxes_global[:, :2] - frame.global_from_ego[:2, 3], axis=1) < 50
    assert (frame.visible_fraction[near] < 0.4).any()


def _project(scene: Scene, rig: SurroundRig) -> NDArray[np.float64]:
    """Corners (M, 8, 2) in pixels of the front camera at time 0."""
    camera_from_global = invert_rigid(scene.ego_pose(0.0) @ rig.ego_from_camera[FRONT])
    corners = transform_points(camera_from_global[None], box_corners(scene.actors_at(0.0).boxes_global))
    pixels = corners @ rig.intrinsics[FRONT].T
    return np.asarray(pixels[..., :2] / pixels[..., 2:])


def _difference(scene: Scene, without: Scene, rig: SurroundRig) -> NDArray[np.bool_]:
    images = [render_camera(s, 0.0, rig, FRONT, noise_seed=1).image.astype(int) for s in (scene, without)]
    return np.asarray(np.abs(images[0] - images[1]).max(axis=-1) > 16)


def _without_shadow(painted: NDArray[np.bool_], scene: Scene, rig: SurroundRig) -> NDArray[np.bool_]:
    """Remove the ground around the foot of the (only) box, which holds its contact shadow."""
    box = scene.actors_at(0.0).boxes_global.copy()
    box[:, 3:5] += 0.6
    foot = box_corners(box)[:, [2, 3, 6, 7]]
    camera_from_global = invert_rigid(scene.ego_pose(0.0) @ rig.ego_from_camera[FRONT])
    local = transform_points(camera_from_global[None], foot)[0] @ rig.intrinsics[FRONT].T
    pixels = cv2.convexHull((local[:, :2] / local[:, 2:]).astype(np.float32))[:, 0]
    shadow = np.zeros(painted.shape, np.uint8)
    cv2.fillConvexPoly(shadow, np.round((pixels - 0.5) * 16).astype(np.int32), 1, cv2.LINE_8, 4)
    inside = np.zeros(painted.shape, np.uint8)
    hull = cv2.convexHull(_project(scene, rig)[0].astype(np.float32))[:, 0]
    cv2.fillConvexPoly(inside, np.round((hull - 0.5) * 16).astype(np.int32), 1, cv2.LINE_8, 4)
    return painted & ~((shadow > 0) & (inside == 0))


def _in_box(points: NDArray[np.float64], box: NDArray[np.float64]) -> NDArray[np.float64]:
    """Points (P, 3) in the axes of the box."""
    cos, sin = np.cos(box[6]), np.sin(box[6])
    offset = points - box[:3]
    x, y = cos * offset[:, 0] + sin * offset[:, 1], -sin * offset[:, 0] + cos * offset[:, 1]
    return np.stack([x, y, offset[:, 2]], axis=-1)
