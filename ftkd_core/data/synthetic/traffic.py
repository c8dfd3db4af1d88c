# SPDX-License-Identifier: Apache-2.0
"""Random placement of actors in a scene.

An actor is placed only if its footprint meets no other footprint at any time, so actors never collide with
each other or with the ego.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ftkd_core.data.synthetic.actors import Actor
from ftkd_core.data.synthetic.bodies import build_body, sample_size
from ftkd_core.data.synthetic.manoeuvres import place_driving, place_overtaking
from ftkd_core.data.synthetic.paths import Motion, Path2D, SpeedProfile, static_motion, turn_at_crossing
from ftkd_core.data.synthetic.roads import CROSSINGS_X, ROAD_HALF, SIDEWALK, is_on_road
from ftkd_core.data.synthetic.scenery import Fixture
from ftkd_core.data.synthetic.shares import ORDINARY, TRAFFIC, WorldShares
from ftkd_core.errors import UserError

_CHECK_STEP_S: Final = 0.25


@dataclass(frozen=True, kw_only=True)
class WorldConfig:
    """Mean numbers of objects along the drive; `spread_m` is the largest distance from the ego's path;
    `shares` decides how they move."""

    cars: int = 16
    trucks: int = 4
    construction_vehicles: int = 3
    buses: int = 3
    trailers: int = 3
    barrier_rows: int = 4
    cones: int = 14
    motorcycles: int = 5
    bicycles: int = 5
    pedestrians: int = 16
    spread_m: float = 45.0
    shares: WorldShares = ORDINARY


WORLDS: Final = {
    "ordinary": WorldConfig(),
    "traffic": WorldConfig(
        cars=22, trucks=7, construction_vehicles=1, buses=6, trailers=1, barrier_rows=2, cones=4,
        motorcycles=6, bicycles=6, pedestrians=16, shares=TRAFFIC,
    ),
}  # fmt: skip
"""Settings of the synthetic worlds by name."""


def world_config(name: str) -> WorldConfig:
    """Return the settings of a world. Raises UserError for an unknown name."""
    if name not in WORLDS:
        raise UserError(f"unknown world {name!r}; expected one of {', '.join(sorted(WORLDS))}")
    return WORLDS[name]


class TrafficPlacer:
    """Actors placed so far, and the check that a new footprint meets none of them and not the ego, at any
    time."""

    def __init__(self, random: np.random.Generator, ego: Motion, duration_s: float) -> None:
        self.random = random
        self.ego = ego
        self.times = np.arange(-1.0, duration_s + 1.0, _CHECK_STEP_S)
        self.actors: list[Actor] = []
        ego_track = ego.track(self.times)
        ego_track[:, 0] += 1.3 * np.cos(ego_track[:, 2])
        ego_track[:, 1] += 1.3 * np.sin(ego_track[:, 2])
        self.ego_track = ego_track
        self._discs: list[NDArray[np.float64]] = []
        # Centre of the first disc of each object; the array doubles when it is full.
        self._first_discs = np.zeros((64, len(self.times), 2))
        self._add_discs(self._cover(ego_track, 5.2, 2.2, 0.4))

    @staticmethod
    def _cover(track: NDArray[np.float64], length: float, width: float, margin: float) -> NDArray[np.float64]:
        """Return discs (T, D, 3) as x, y, radius that cover a moving footprint."""
        count = max(1, int(np.ceil(length / width)))
        step = length / count
        offsets = (np.arange(count) - (count - 1) / 2) * step
        radius = np.hypot(step / 2, width / 2) + margin
        x = track[:, None, 0] + offsets * np.cos(track[:, None, 2])
        y = track[:, None, 1] + offsets * np.sin(track[:, None, 2])
        return np.stack([x, y, np.full_like(x, radius)], axis=-1)

    def add(self, name: str, motion: Motion, *, rider: bool = False, margin: float = 0.1) -> bool:
        """Place one object; return False if it would meet another."""
        size = sample_size(name, self.random, rider=rider)
        discs = self._cover(motion.track(self.times), size[0], size[1], margin)
        if not self.is_clear(discs):
            return False
        self._add_discs(discs)
        body = build_body(name, size, self.random, rider=rider)
        self.actors.append(Actor(name=name, size=size, motion=motion, body=body, rider=rider))
        return True

    def _add_discs(self, discs: NDArray[np.float64]) -> None:
        count = len(self._discs)
        if count == len(self._first_discs):
            self._first_discs = np.concatenate([self._first_discs, np.zeros_like(self._first_discs)])
        self._first_discs[count] = discs[:, 0, :2]
        self._discs.append(discs)

    def is_clear(self, discs: NDArray[np.float64]) -> bool:
        """Whether discs (T or 1, D, 3) meet no placed object at any time."""
        across = np.abs(discs[:, 0, :2] - self._first_discs[: len(self._discs)])  # (others, T, 2)
        for index in np.flatnonzero(across.max(axis=-1).min(axis=-1) <= 20.0):
            other = self._discs[index]
            gap = np.linalg.norm(discs[:, :, None, :2] - other[:, None, :, :2], axis=-1)
            if np.any(gap < discs[:, :, None, 2] + other[:, None, :, 2]):
                return False
        return True

    def fits_fixture(self, fixture: Fixture) -> bool:
        """Whether a fixture's footprint meets neither an actor nor the ego."""
        length, width, _ = fixture.size
        if length < width:
            length, width = width, length
            turned = fixture.pose[2] + np.pi / 2
        else:
            turned = fixture.pose[2]
        track = np.array([[fixture.pose[0], fixture.pose[1], turned]])
        return self.is_clear(self._cover(track, length, width, 0.0))

    def point_near_ego(self, spread: float) -> tuple[float, float]:
        """Draw a point within `spread` metres of a random point of the ego's path."""
        index = int(self.random.integers(len(self.times)))
        x, y = self.ego_track[index, :2]
        distance, angle = spread * self.random.random() ** 0.5, self.random.uniform(-np.pi, np.pi)
        return float(x + distance * np.cos(angle)), float(y + distance * np.sin(angle))


def place_actors(placer: TrafficPlacer, config: WorldConfig) -> None:
    """Place all actors of a scene; rare and large objects come first, so that they find room."""
    counts = {
        "bus": config.buses,
        "trailer": config.trailers,
        "construction_vehicle": config.construction_vehicles,
        "truck": config.trucks,
        "motorcycle": config.motorcycles,
        "bicycle": config.bicycles,
        "car": config.cars,
    }
    random, tries = placer.random, 40 if config.shares.manoeuvring else 12
    for _ in range(config.barrier_rows):
        _place_barrier_row(placer, config.spread_m * 0.5)
    for name, mean in counts.items():
        for _ in range(max(1, round(mean * random.uniform(0.6, 1.4)))):
            _retry(lambda name=name: _place_vehicle(placer, name, config), tries)  # type: ignore[misc]
    for _ in range(round(config.cones * random.uniform(0.7, 1.3))):
        _retry(lambda: _place_cone(placer, config.spread_m * 0.55))
    for _ in range(round(config.pedestrians * random.uniform(0.7, 1.3))):
        _retry(lambda: _place_pedestrian(placer, config.spread_m * 0.8, config.shares))


def _retry(place: Callable[[], bool], tries: int = 12) -> None:
    """Call `place` until it succeeds, at most `tries` times."""
    for _ in range(tries):
        if place():
            return


def _place_vehicle(placer: TrafficPlacer, name: str, config: WorldConfig) -> bool:
    random, shares = placer.random, config.shares
    x, y = placer.point_near_ego(config.spread_m)
    cycle = name in ("motorcycle", "bicycle")
    if random.random() >= getattr(shares.moving, name):
        return _place_parked(placer, name, x, y)
    if name in ("bus", "truck") and shares.overtaking and random.random() < shares.overtaking:
        return place_overtaking(placer, name)
    if shares.manoeuvring and random.random() < shares.manoeuvring:
        return place_driving(placer, name, CROSSINGS_X, along_main=shares.along_main, turning=shares.turning)
    crossing = min(CROSSINGS_X, key=lambda c: abs(c - x))
    along_main = random.random() < shares.along_main
    direction = 1.0 if random.random() < 0.5 else -1.0
    lane = float(random.choice([1.75, 5.25])) if not cycle else float(random.choice([3.5, 6.2]))
    if along_main:
        path = Path2D(x, -direction * lane, 0.0 if direction > 0 else np.pi)
    else:
        path = Path2D(crossing + direction * lane, y, direction * np.pi / 2)
    speed = float(random.uniform(2.0, 6.0) if name == "bicycle" else random.uniform(3.0, 12.0))
    if name != "trailer" and random.random() < shares.turning:
        return _place_turning_vehicle(placer, name, crossing, speed)
    profile = _random_speed_profile(random, speed, placer.times[-1], shares)
    return placer.add(name, Motion(path, profile), rider=cycle, margin=0.3)


def _place_turning_vehicle(placer: TrafficPlacer, name: str, crossing: float, speed: float) -> bool:
    """Place a vehicle that comes from any of the four sides and turns left or right at the crossing."""
    random = placer.random
    turn = "left" if random.random() < 0.5 else "right"
    heading = float(random.integers(4)) * np.pi / 2
    corner = min(5.0, speed)
    start = -float(random.uniform(45.0, 75.0))
    pieces, slowing = turn_at_crossing(turn, start, speed, corner)
    lane = -1.75 if turn == "left" else -5.25
    cos, sin = np.cos(heading), np.sin(heading)
    path = Path2D(crossing + start * cos - lane * sin, start * sin + lane * cos, heading, pieces)
    motion = Motion(path, SpeedProfile(((0.0, speed), *slowing)))
    return placer.add(name, motion, rider=name in ("motorcycle", "bicycle"), margin=0.3)


def _random_speed_profile(
    random: np.random.Generator, cruise: float, end_s: float, shares: WorldShares
) -> SpeedProfile:
    kind = random.random()
    if kind < shares.steady:
        return SpeedProfile.constant(cruise)
    start = float(random.uniform(0.0, 0.8)) * float(end_s)
    change = cruise / float(random.uniform(1.5, 3.0))
    if kind < shares.steady + shares.braking:  # brakes and stops
        return SpeedProfile(((0.0, cruise), (start, cruise), (start + change, 0.0)))
    return SpeedProfile(((0.0, 0.0), (start, 0.0), (start + change, cruise)))  # waits and starts


def _place_parked(placer: TrafficPlacer, name: str, x: float, y: float) -> bool:
    random = placer.random
    flip = 0.0 if random.random() < 0.5 else np.pi
    if name in ("motorcycle", "bicycle"):
        side = float(random.choice([-1.0, 1.0])) * (ROAD_HALF + float(random.uniform(0.8, 3.0)))
        return placer.add(name, static_motion(x, side, float(random.uniform(-np.pi, np.pi))))
    width = {"car": 1.2, "truck": 1.6}.get(name, 1.9)
    if random.random() < 0.7 or name == "car":  # at the kerb of the main road; otherwise on a parking lot
        side = float(random.choice([-1.0, 1.0])) * (ROAD_HALF + float(random.uniform(0.1, 0.6)) + width * 0.8)
        return placer.add(name, static_motion(x, side, flip + float(random.normal(0, 0.03))))
    if is_on_road(x, y) or abs(y) > 22:
        return False
    return placer.add(name, static_motion(x, y, float(random.uniform(-np.pi, np.pi))))


def _place_barrier_row(placer: TrafficPlacer, spread: float) -> None:
    random = placer.random
    x, y = placer.point_near_ego(spread)
    heading = float(random.choice([0.0, np.pi / 2])) + float(random.normal(0, 0.1))
    side = float(np.sign(y) or 1.0) * (ROAD_HALF + float(random.uniform(-0.5, 3.5)))
    for index in range(int(random.integers(4, 9))):
        along = 2.75 * index
        place = (x + along * np.cos(heading), side + along * np.sin(heading) * float(np.sign(side)))
        placer.add(
            "barrier", static_motion(float(place[0]), float(place[1]), heading + np.pi / 2), margin=-0.25
        )


def _place_cone(placer: TrafficPlacer, spread: float) -> bool:
    random = placer.random
    x, y = placer.point_near_ego(spread)
    if abs(y) > ROAD_HALF + 3:
        y = float(np.sign(y)) * (ROAD_HALF + float(random.uniform(-1.0, 3.0)))
    return placer.add("traffic_cone", static_motion(x, y, float(random.uniform(-np.pi, np.pi))))


def _place_pedestrian(placer: TrafficPlacer, spread: float, shares: WorldShares) -> bool:
    random = placer.random
    x, _y = placer.point_near_ego(spread)
    kind = random.random()
    side = float(random.choice([-1.0, 1.0])) * (ROAD_HALF + float(random.uniform(0.5, SIDEWALK - 0.3)))
    heading = float(random.choice([0.0, np.pi])) + float(random.normal(0, 0.05))
    if kind < shares.standing:
        return placer.add("pedestrian", static_motion(x, side, float(random.uniform(-np.pi, np.pi))))
    speed = SpeedProfile.constant(float(random.uniform(0.7, 1.8)))
    if kind < shares.standing + shares.walking:
        return placer.add("pedestrian", Motion(Path2D(x, side, heading), speed))
    # Crosses the main road, starting at a random time.
    start = float(random.uniform(0, 0.7)) * float(placer.times[-1])
    pace = speed.knots[0][1]
    profile = SpeedProfile(((0.0, 0.0), (start, 0.0), (start + 0.5, pace)))
    return placer.add("pedestrian", Motion(Path2D(x, side, -float(np.sign(side)) * np.pi / 2), profile))
