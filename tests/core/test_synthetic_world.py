# SPDX-License-Identifier: Apache-2.0
"""The synthetic world: reproducible, physically consistent, with all classes."""

import pickle
from functools import lru_cache

import numpy as np
import pytest

from ftkd_core.boxes import box_corners
from ftkd_core.classes import CLASS_NAMES, CLASS_RANGES
from ftkd_core.data.synthetic.bodies import MEAN_SIZES
from ftkd_core.data.synthetic.paths import Motion, Path2D, SpeedProfile, turn_at_crossing
from ftkd_core.data.synthetic.world import Scene, make_scene
from ftkd_core.geometry import invert_rigid, is_rigid, transform_points

SEEDS = (0, 2, 3)
ATTRIBUTE_KINDS = {
    "barrier": "",
    "traffic_cone": "",
    "pedestrian": "pedestrian",
    "motorcycle": "cycle",
    "bicycle": "cycle",
}
TIMES = np.arange(-0.5, 20.5, 0.7)


@lru_cache(maxsize=8)
def scene_of(seed: int) -> Scene:
    return make_scene(seed)


def test_scene_is_determined_by_its_seed() -> None:
    first, again, other = make_scene(4), make_scene(4), scene_of(0)
    assert first.name == again.name != other.name
    assert first.description == again.description and first.start_time_us == again.start_time_us
    for time in (0.0, 7.3):
        np.testing.assert_array_equal(first.ego_pose(time), again.ego_pose(time))
        np.testing.assert_array_equal(first.actors_at(time).boxes_global, again.actors_at(time).boxes_global)
    assert not np.allclose(first.ego_pose(0.0), other.ego_pose(0.0))


def test_a_scene_survives_pickling() -> None:
    scene = scene_of(0)
    copy = pickle.loads(pickle.dumps(scene))
    np.testing.assert_array_equal(copy.ego_pose(3.0), scene.ego_pose(3.0))
    np.testing.assert_array_equal(copy.actors_at(3.0).boxes_global, scene.actors_at(3.0).boxes_global)


@pytest.mark.parametrize("seed", SEEDS)
def test_velocity_is_the_derivative_of_position(seed: int) -> None:
    scene, step = scene_of(seed), 1e-4
    for time in TIMES:
        before, now, after = (scene.actors_at(float(time) + d).boxes_global for d in (-step, 0.0, step))
        measured = (after[:, :2] - before[:, :2]) / (2 * step)
        # Speeds are piecewise linear; a knot within the step causes an error of acceleration times step.
        np.testing.assert_allclose(now[:, 7:9], measured, atol=5e-3)


@pytest.mark.parametrize("seed", SEEDS)
def test_ego_moves_smoothly_on_the_ground_at_urban_speed(seed: int) -> None:
    scene = scene_of(seed)
    poses = np.stack([scene.ego_pose(float(t)) for t in np.arange(-0.5, 20.5, 0.1)])
    assert all(is_rigid(pose, 1e-9) for pose in poses)
    np.testing.assert_allclose(poses[:, 2, 3], 0.0, atol=1e-9)
    np.testing.assert_allclose(poses[:, 2, 2], 1.0, atol=1e-9)
    motion = np.diff(poses[:, :2, 3], axis=0)
    speed = np.linalg.norm(motion, axis=1) / 0.1
    assert speed.max() <= 12.5
    assert np.abs(np.diff(speed)).max() <= 0.5  # at most 5 m/s^2
    sideways = np.einsum("td,td->t", motion, np.stack([-poses[:-1, 1, 0], poses[:-1, 0, 0]], axis=-1))
    assert np.abs(sideways).max() < 0.12


@pytest.mark.parametrize("seed", SEEDS)
def test_boxes_stand_on_the_ground_with_sizes_of_their_class(seed: int) -> None:
    states = scene_of(seed).actors_at(5.0)
    boxes = states.boxes_global
    np.testing.assert_allclose(boxes[:, 2], boxes[:, 5] / 2, atol=1e-9)
    for label, box in zip(states.labels, boxes, strict=True):
        mean = np.array(MEAN_SIZES[CLASS_NAMES[label]])
        assert np.all(box[3:6] > 0.6 * mean) and np.all(box[3:6] < 1.8 * mean)
    assert len(np.unique(states.instance)) == len(boxes)


@pytest.mark.parametrize("seed", SEEDS)
def test_footprints_never_overlap(seed: int) -> None:
    scene = scene_of(seed)
    for time in TIMES:
        boxes = scene.actors_at(float(time)).boxes_global
        labels = scene.actors_at(float(time)).labels
        overlaps = _overlapping_pairs(boxes, slack_m=0.05)
        # The boards of one row of barriers touch, as on real roads.
        barrier = CLASS_NAMES.index("barrier")
        met = [(i, j) for i, j in overlaps if not labels[i] == labels[j] == barrier]
        assert not met, (
            f"at {time:.1f} s: {[(CLASS_NAMES[labels[i]], CLASS_NAMES[labels[j]]) for i, j in met]}"
        )


def test_overlap_check_distinguishes_overlap_and_gap() -> None:
    box = [0.0, 0.0, 1.0, 4.0, 2.0, 2.0, 0.0, 0.0, 0.0]
    crossing = [1.5, 1.0, 1.0, 4.0, 2.0, 2.0, np.pi / 3, 0.0, 0.0]
    apart = [0.0, 2.5, 1.0, 4.0, 2.0, 2.0, 0.0, 0.0, 0.0]
    assert _overlapping_pairs(np.array([box, crossing]), slack_m=0.05) == [(0, 1)]
    assert _overlapping_pairs(np.array([box, apart]), slack_m=0.05) == []


def test_attributes_fit_class_and_motion() -> None:
    for seed in SEEDS:
        states = scene_of(seed).actors_at(6.0)
        for label, box, attribute in zip(states.labels, states.boxes_global, states.attributes, strict=True):
            name, speed = CLASS_NAMES[label], float(np.hypot(box[7], box[8]))
            assert attribute.split(".")[0] == ATTRIBUTE_KINDS.get(name, "vehicle")
            if attribute.endswith(".moving"):
                assert speed > 0
            if attribute in ("vehicle.parked", "cycle.without_rider"):
                assert speed == 0.0


def test_every_class_occurs_within_its_evaluation_range() -> None:
    ranges = np.array([CLASS_RANGES[name] for name in CLASS_NAMES])
    counts, frames = np.zeros(len(CLASS_NAMES)), 0
    for seed in SEEDS:
        for time in (2.0, 10.0, 18.0):
            scene = scene_of(seed)
            states = scene.actors_at(time)
            distance = np.linalg.norm(states.boxes_global[:, :2] - scene.ego_pose(time)[:2, 3], axis=1)
            counts += np.bincount(states.labels[distance < ranges[states.labels]], minlength=len(CLASS_NAMES))
            frames += 1
    mean = counts / frames
    assert np.all(mean > 0.3), dict(zip(CLASS_NAMES, mean, strict=True))
    assert 15 < mean.sum() < 70


def test_scenes_have_varying_global_poses() -> None:
    poses = np.stack([scene_of(seed).ego_pose(0.0) for seed in SEEDS])
    assert np.linalg.norm(poses[0, :2, 3] - poses[1, :2, 3]) > 10
    yaws = np.arctan2(poses[:, 1, 0], poses[:, 0, 0])
    assert np.ptp(yaws) > 0.2
    boxes = scene_of(0).actors_at(0.0).boxes_global
    boxes_ego = transform_points(invert_rigid(poses[0]), boxes[:, :3])
    assert np.linalg.norm(boxes_ego[:, :2], axis=1).min() < 30


def _overlapping_pairs(boxes: np.ndarray, slack_m: float) -> list[tuple[int, int]]:
    """Pairs whose footprints, shrunk by the slack, overlap (separating-axis test)."""
    shrunk = boxes.copy()
    shrunk[:, 3:5] -= slack_m
    corners = box_corners(shrunk)[:, [0, 1, 5, 4], :2]
    reach = np.hypot(shrunk[:, 3], shrunk[:, 4]) / 2
    centers = boxes[:, :2]
    close = np.linalg.norm(centers[:, None] - centers[None], axis=-1) < reach[:, None] + reach[None]
    candidates = zip(*np.nonzero(np.triu(close, k=1)), strict=True)
    return [(int(i), int(j)) for i, j in candidates if not _separate(corners[i], corners[j])]


def _separate(first: np.ndarray, second: np.ndarray) -> bool:
    for polygon in (first, second):
        for axis in (polygon[1] - polygon[0], polygon[2] - polygon[1]):
            a, b = first @ axis, second @ axis
            if a.max() <= b.min() or b.max() <= a.min():
                return True
    return False


@pytest.mark.parametrize("turn", ["left", "right"])
@pytest.mark.parametrize(("start", "cruise"), [(-50.0, 5.0), (-75.0, 12.0)])
def test_turn_ends_in_the_lane_of_the_crossing_road_at_corner_speed(
    turn: str, start: float, cruise: float
) -> None:
    pieces, knots = turn_at_crossing(turn, start, cruise)
    lane, side = (-1.75, 1.0) if turn == "left" else (-5.25, -1.0)
    motion = Motion(Path2D(start, lane, 0.0, pieces), SpeedProfile(((0.0, cruise), *knots)))
    straight, arc = (length for length, _ in pieces)
    end = motion.path.at(straight + arc)
    assert (end.x, end.yaw) == pytest.approx((side * 5.25, side * np.pi / 2))
    for time in np.arange(0.0, 30.0, 0.1):
        if straight + 0.5 < motion.speed.distance(float(time)) < straight + arc - 0.5:
            assert motion.speed.speed(float(time)) <= 5.6  # 0.46 g on the tighter bend


def test_some_vehicles_turn_at_crossings_and_none_moves_backwards() -> None:
    """Some of the moving vehicles turn by a right angle and always move forward along their heading."""
    turned = 0
    for seed in range(6):
        for actor in make_scene(seed).actors:
            if actor.motion.is_static or actor.name == "pedestrian":
                continue
            track = actor.motion.track(np.arange(0.0, 20.0, 0.25))
            angle = abs(track[-1, 2] - track[0, 2])
            assert angle <= np.pi / 2 + 1e-6
            turned += angle > np.pi / 4
            moved = np.diff(track[:, :2], axis=0)
            heading = np.stack([np.cos(track[:-1, 2]), np.sin(track[:-1, 2])], axis=-1)
            assert (np.sum(moved * heading, axis=1) >= -1e-6).all()
    assert turned >= 10
