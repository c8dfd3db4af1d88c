# SPDX-License-Identifier: Apache-2.0
"""Scenes of the synthetic world, deterministic by seed: roads, scenery, actors of the ten classes, and the
ego vehicle.

A scene is built in a local frame (metres, z = 0 is the ground, the main road runs along x) with a random pose
in the global frame. Scene time 0 is the start of the first lidar sweep.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ftkd_core.classes import CLASS_NAMES
from ftkd_core.data.synthetic.actors import Actor, ActorStates
from ftkd_core.data.synthetic.paths import Motion, Path2D, SpeedProfile, turn_at_crossing
from ftkd_core.data.synthetic.roads import CROSSINGS_X, ROAD_HALF, SIDEWALK
from ftkd_core.data.synthetic.scenery import Fixture, make_scenery
from ftkd_core.data.synthetic.traffic import TrafficPlacer, WorldConfig, place_actors
from ftkd_core.geometry import yaw_transform


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One drive: global_from_local (4, 4), ego motion, and actors and fixtures in the local frame.

    night, fog_per_m (fog density) and sun (direction, (3,)) set the light.
    """

    seed: int
    name: str
    description: str
    duration_s: float
    start_time_us: int
    night: bool
    fog_per_m: float
    sun: NDArray[np.float64]
    global_from_local: NDArray[np.float64]
    ego: Motion
    actors: tuple[Actor, ...]
    fixtures: tuple[Fixture, ...]

    def ego_pose(self, time_s: float) -> NDArray[np.float64]:
        """Return global_from_ego (4, 4) at a scene time; ego is base_link, on the ground below the rear
        axle."""
        x, y, yaw, _ = self.ego.at(time_s)
        pose: NDArray[np.float64] = self.global_from_local @ yaw_transform(yaw, (x, y, 0.0))
        return pose

    @cached_property
    def actor_sizes(self) -> NDArray[np.float64]:
        """Length, width, height (M, 3) of all actors."""
        return np.array([actor.size for actor in self.actors], dtype=np.float64).reshape(-1, 3)

    @cached_property
    def fixture_solids(self) -> NDArray[np.float64]:
        """x, y, yaw, length, width, height (K, 6) of all fixtures in the local frame."""
        return np.array([[*f.pose, *f.size] for f in self.fixtures], dtype=np.float64).reshape(-1, 6)

    @cached_property
    def _at_rest(self) -> tuple[NDArray[np.float64], list[int]]:
        """x, y, yaw, speed (M, 4) of all actors at time 0, and the rows of the actors that move."""
        rows = np.array([actor.motion.at(0.0) for actor in self.actors], dtype=np.float64).reshape(-1, 4)
        return rows, [row for row, actor in enumerate(self.actors) if not actor.motion.is_static]

    def _motions_local(self, time_s: float) -> NDArray[np.float64]:
        """Return x, y, yaw, speed (M, 4) of all actors in the local frame."""
        at_rest, moving = self._at_rest
        rows = at_rest.copy()
        for row in moving:
            rows[row] = self.actors[row].motion.at(time_s)
        return rows

    def actor_poses_local(self, time_s: float) -> NDArray[np.float64]:
        """Return x, y, yaw (M, 3) of all actors in the local frame."""
        return self._motions_local(time_s)[:, :3]

    def actor_boxes_local(self, time_s: float) -> NDArray[np.float64]:
        """Return the boxes (M, 9) of all actors in the local frame."""
        x, y, yaw, speed = self._motions_local(time_s).T
        length, width, height = self.actor_sizes.T
        velocity = (speed * np.cos(yaw), speed * np.sin(yaw))
        return np.stack([x, y, height / 2, length, width, height, yaw, *velocity], axis=-1)

    def actors_at(self, time_s: float) -> ActorStates:
        """Return all actors at a scene time in the global frame; the order of rows is constant over time."""
        boxes = self.actor_boxes_local(time_s)
        speeds = np.hypot(boxes[:, 7], boxes[:, 8])
        matrix = self.global_from_local
        boxes[:, :3] = boxes[:, :3] @ matrix[:3, :3].T + matrix[:3, 3]
        turned = boxes[:, 6] + np.arctan2(matrix[1, 0], matrix[0, 0])
        boxes[:, 6] = (turned + np.pi) % (2 * np.pi) - np.pi
        boxes[:, 7:9] = boxes[:, 7:9] @ matrix[:2, :2].T
        return ActorStates(
            instance=np.arange(len(self.actors), dtype=np.int64),
            labels=np.array([CLASS_NAMES.index(actor.name) for actor in self.actors], dtype=np.int64),
            boxes_global=boxes,
            attributes=tuple(actor.attribute(float(s)) for actor, s in zip(self.actors, speeds, strict=True)),
        )


def make_scene(seed: int, duration_s: float = 20.0, config: WorldConfig | None = None) -> Scene:
    """Build the scene of a seed; the same seed gives the same scene, bit for bit."""
    random = np.random.default_rng([seed, 7])
    ego, turn = _ego_motion(random, duration_s)
    night = bool(random.random() < 0.2)
    placer = TrafficPlacer(random, ego, duration_s)
    place_actors(placer, config or WorldConfig())
    azimuth, height = random.uniform(-np.pi, np.pi), random.uniform(0.5, 1.1)
    sun = np.array([np.cos(azimuth) * np.cos(height), np.sin(azimuth) * np.cos(height), np.sin(height)])
    heading = random.uniform(-np.pi, np.pi)
    origin = (float(random.uniform(300, 1500)), float(random.uniform(300, 1500)), 0.0)
    return Scene(
        seed=seed,
        name=f"scene-{1_000_000 + seed}",
        description=f"Synthetic, {'night' if night else 'day'}, ego goes {turn}",
        duration_s=duration_s,
        start_time_us=1_600_000_000_000_000 + seed * 60_000_000,
        night=night,
        fog_per_m=float(random.uniform(0.001, 0.006)),
        sun=sun,
        global_from_local=yaw_transform(float(heading), origin),
        ego=ego,
        actors=tuple(placer.actors),
        fixtures=tuple(
            f for f in make_scenery(random, CROSSINGS_X, ROAD_HALF, SIDEWALK) if placer.fits_fixture(f)
        ),
    )


def _ego_motion(random: np.random.Generator, duration_s: float) -> tuple[Motion, str]:
    """Draw the ego's motion on the right side of the main road towards the crossing at x = 0, straight or
    turning."""
    turn = str(random.choice(["straight", "left", "right"], p=[0.5, 0.25, 0.25]))
    lane = -1.75 if turn == "left" else float(random.choice([-1.75, -5.25])) if turn == "straight" else -5.25
    start_x = float(random.uniform(-85, -40))
    cruise = float(random.uniform(5.0, 11.0))
    pieces: tuple[tuple[float, float], ...] = ()
    knots: list[tuple[float, float]] = [(0.0, cruise)]
    if turn != "straight":
        pieces, slowing = turn_at_crossing(turn, start_x, cruise)
        knots += slowing
    elif random.random() < 0.5:
        stop = float(random.uniform(0.2, 0.5)) * duration_s
        low = float(random.choice([0.0, 3.0]))
        knots += [(stop, cruise), (stop + 3, low), (stop + 6, low), (stop + 9, cruise)]
    return Motion(Path2D(start_x, lane, 0.0, pieces), SpeedProfile(tuple(knots))), turn
