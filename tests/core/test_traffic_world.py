# SPDX-License-Identifier: Apache-2.0
"""The ordinary world stays bit-identical; traffic moves in ways that the past does not determine."""

import hashlib

import numpy as np
import pytest

from ftkd_core.config import ImageConfig
from ftkd_core.data.synthetic.manoeuvres import Placer, change_lane, changing_speed, place_overtaking
from ftkd_core.data.synthetic.paths import Motion, Path2D
from ftkd_core.data.synthetic.shares import WorldShares
from ftkd_core.data.synthetic.traffic import world_config
from ftkd_core.data.synthetic.world import Scene, make_scene
from ftkd_core.data.synthetic_clips import SyntheticClips, render_clip
from ftkd_core.errors import UserError

_HASH_OF_SEED_0 = "467a161d3c63659b"


def scene_hash(scene: Scene) -> str:
    digest = hashlib.sha256()
    for time in (0.0, 3.3, 11.0, 19.9):
        actors = scene.actors_at(time)
        for values in (actors.boxes_global, actors.labels, scene.ego_pose(time)):
            digest.update(values.tobytes())
    digest.update(scene.fixture_solids.tobytes())
    digest.update(np.float64(scene.fog_per_m).tobytes())
    return digest.hexdigest()[:16]


def moving_and_error(world: str, ahead_s: float) -> tuple[float, float]:
    """Share of moving objects within 60 m, and their mean error if they kept their velocity."""
    moving, errors = [], []
    for seed in (900_100, 900_101, 900_102):
        scene = make_scene(seed, 20.0, world_config(world))
        for time in np.arange(1.0, 18.0, 3.0):
            now, later = scene.actors_at(time), scene.actors_at(time + ahead_s)
            near = np.abs(now.boxes_global[:, :2] - scene.ego_pose(time)[:2, 3]).max(axis=1) < 60
            velocity = now.boxes_global[:, 7:9]
            chosen = near & (np.linalg.norm(velocity, axis=1) > 0.5)
            moved = now.boxes_global[:, :2] + ahead_s * velocity - later.boxes_global[:, :2]
            moving.append(chosen[near])
            errors.append(np.linalg.norm(moved, axis=1)[chosen])
    return float(np.concatenate(moving).mean()), float(np.concatenate(errors).mean())


def test_the_ordinary_world_is_unchanged() -> None:
    assert scene_hash(make_scene(0)) == _HASH_OF_SEED_0
    assert scene_hash(make_scene(0, 20.0, world_config("ordinary"))) == _HASH_OF_SEED_0


def test_in_traffic_half_of_the_objects_move_and_constant_velocity_fails() -> None:
    moving, error = moving_and_error("traffic", 2.0)
    ordinary_moving, ordinary_error = moving_and_error("ordinary", 2.0)
    assert moving > 0.45 > 2 * ordinary_moving
    assert error > 1.0 and error > 1.5 * ordinary_error


def test_traffic_is_deterministic() -> None:
    first, again = (make_scene(5, 20.0, world_config("traffic")) for _ in range(2))
    assert scene_hash(first) == scene_hash(again)


def test_an_unknown_world_is_an_error() -> None:
    with pytest.raises(UserError, match="unknown world 'rural'; expected one of ordinary, traffic"):
        world_config("rural")
    with pytest.raises(UserError, match=r"share turning 1\.5"):
        WorldShares(turning=1.5)


def test_a_lane_change_moves_a_vehicle_one_lane_to_its_left() -> None:
    path = Path2D(0.0, 0.0, 0.0, tuple(change_lane(to_left=True)))
    end = path.at(sum(length for length, _ in path.pieces))
    assert end.y == pytest.approx(3.5) and end.yaw == pytest.approx(0.0)


def test_speed_changes_within_limits() -> None:
    profile = changing_speed(np.random.default_rng(0), 8.0, 20.0)
    times, speeds = np.array(profile.knots).T
    assert np.all(np.diff(times) > 0) and times[-1] >= 20.0
    assert speeds.min() >= 0 and speeds.max() <= 15.0
    assert np.abs(np.diff(speeds) / np.diff(times)).max() < 5.1


class _Road:
    """Placer that accepts everything."""

    def __init__(self) -> None:
        self.random = np.random.default_rng(1)
        self.times = np.arange(0.0, 20.0, 0.25)
        self.ego_track = np.zeros((len(self.times), 3))
        self.motions: list[Motion] = []

    def add(self, name: str, motion: Motion, *, rider: bool = False, margin: float = 0.1) -> bool:
        self.motions.append(motion)
        return True


def test_the_overtaking_car_passes_in_the_other_lane() -> None:
    road: Placer = _Road()
    assert place_overtaking(road, "bus")
    slow, fast = road.motions  # type: ignore[attr-defined]
    times = np.arange(-10.0, 30.0, 0.1)
    behind = (fast.track(times)[:, 0] - slow.track(times)[:, 0]) * np.cos(slow.path.yaw)
    apart = np.abs(fast.track(times)[:, 1] - slow.track(times)[:, 1])
    assert behind[0] < 0 < behind[-1]
    assert apart[np.abs(behind) < 12.0].min() > 3.0
    assert apart[0] < 0.1 and apart[-1] < 0.1


def test_clips_of_worlds_are_kept_apart(tmp_path) -> None:  # type: ignore[no-untyped-def]
    image = ImageConfig(width=64, height=32)
    ordinary, traffic = (SyntheticClips(0, image, tmp_path, world=name) for name in ("ordinary", "traffic"))
    assert traffic.cache.name == f"{ordinary.cache.name}-traffic" and traffic.name != ordinary.name
    clip = render_clip(0, image, 1.0, world="traffic")
    expected = make_scene(0, 1.0, world_config("traffic"))
    assert len(clip.objects[0].labels) == len(expected.actors)
