# SPDX-License-Identifier: Apache-2.0
"""Driving vehicles whose motion cannot be predicted from the past: repeated changes of speed and lane, turns
at crossings, overtaking.

A vehicle meets the ego vehicle's path at a random time of the scene, so that traffic surrounds the ego
vehicle from the first to the last frame. Lengths in metres, times in seconds.
"""

import math
from collections.abc import Sequence
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from ftkd_core.data.synthetic.paths import Motion, Path2D, SpeedProfile, turn_at_crossing

INNER_LANE: Final = 1.75
OUTER_LANE: Final = 5.25
_LANE_CHANGE_RADIUS: Final = 40.0
_LANE_CHANGE_ANGLE: Final = math.acos(1 - (OUTER_LANE - INNER_LANE) / (2 * _LANE_CHANGE_RADIUS))
_LANE_CHANGE_ARC: Final = _LANE_CHANGE_RADIUS * _LANE_CHANGE_ANGLE
_LANE_CHANGE_ALONG: Final = 2 * _LANE_CHANGE_RADIUS * math.sin(_LANE_CHANGE_ANGLE)
_CLEARANCE: Final = 15.0
"""Distance between the centres of an overtaken and an overtaking vehicle while the latter changes lane."""
_FASTEST: Final = 15.0

Pieces = list[tuple[float, float]]


class Placer(Protocol):
    """The part of `TrafficPlacer` that is used here: it places actors without collisions."""

    random: np.random.Generator
    times: NDArray[np.float64]
    ego_track: NDArray[np.float64]

    def add(self, name: str, motion: Motion, *, rider: bool = False, margin: float = 0.1) -> bool:
        """Place an actor. Return False if it would collide."""


def change_lane(to_left: bool) -> Pieces:
    """Return path pieces (length, curvature): two arcs that move a vehicle one lane sideways."""
    sign = 1.0 if to_left else -1.0
    curvature = sign / _LANE_CHANGE_RADIUS
    return [(_LANE_CHANGE_ARC, curvature), (_LANE_CHANGE_ARC, -curvature)]


def changing_speed(random: np.random.Generator, cruise: float, end_s: float) -> SpeedProfile:
    """Return a speed that changes every few seconds until end_s: the vehicle brakes, stops or accelerates."""
    time, speed = 0.0, cruise
    knots = [(time, speed)]
    while time < end_s:
        time += float(random.uniform(0.3, 2.0))
        kind = random.random()
        if kind < 0.12:
            goal = 0.0
        elif kind < 0.5:
            goal = cruise * float(random.uniform(0.25, 0.6))
        else:
            goal = min(cruise * float(random.uniform(0.9, 1.5)), _FASTEST)
        rate = float(random.uniform(2.5, 5.0) if goal < speed else random.uniform(1.5, 3.0))
        duration = max(abs(goal - speed) / rate, 0.2)
        knots += [(time, speed), (time + duration, goal)]
        time, speed = time + duration, goal
        if goal == 0.0:
            time += float(random.uniform(0.5, 1.5))
            knots.append((time, 0.0))
    return SpeedProfile(tuple(knots))


def lane_changes(random: np.random.Generator, lane: float, length: float) -> Pieces:
    """Return path pieces of repeated changes between inner and outer lane, starting in `lane`."""
    pieces: Pieces = []
    inner, covered = lane == INNER_LANE, 0.0
    while covered < length:
        straight = float(random.uniform(8.0, 45.0))
        pieces += [(straight, 0.0), *change_lane(to_left=not inner)]
        inner, covered = not inner, covered + straight + 2 * _LANE_CHANGE_ARC
    return pieces


def place_driving(
    placer: Placer, name: str, crossings: Sequence[float], *, along_main: float, turning: float
) -> bool:
    """Place a vehicle that changes speed and lane or turns at a crossing. Return False if it does not fit."""
    random = placer.random
    time, x, y = meeting_point(placer)
    cycle = name in ("motorcycle", "bicycle")
    crossing = min(crossings, key=lambda c: abs(c - x))
    cruise = float(random.uniform(2.5, 6.0) if name == "bicycle" else random.uniform(5.0, 12.0))
    if name != "trailer" and random.random() < turning:
        return place_turning(placer, name, crossing, cruise, time)
    on_main = random.random() < along_main
    direction = 1.0 if random.random() < 0.5 else -1.0
    lane = 6.2 if name == "bicycle" else float(random.choice([INNER_LANE, OUTER_LANE]))
    profile = changing_speed(random, cruise, float(placer.times[-1]))
    before = float(random.uniform(0.0, 60.0))
    pieces: Pieces = []
    if name not in ("bicycle", "trailer") and random.random() < 0.7:
        pieces = lane_changes(random, lane, 260.0)
    if on_main:
        path = Path2D(
            x - direction * before, -direction * lane, 0.0 if direction > 0 else math.pi, tuple(pieces)
        )
    else:
        path = Path2D(
            crossing + direction * lane, y - direction * before, direction * math.pi / 2, tuple(pieces)
        )
    motion = Motion(path, profile, before - profile.distance(time))
    return placer.add(name, motion, rider=cycle, margin=0.0)


def place_turning(placer: Placer, name: str, crossing: float, cruise: float, time: float) -> bool:
    """Place a vehicle that comes from one of the four sides and turns left or right at the crossing at about
    `time`. Return False if it does not fit."""
    random = placer.random
    turn = "left" if random.random() < 0.5 else "right"
    heading = float(random.integers(4)) * math.pi / 2
    start = -float(random.uniform(30.0, 60.0))
    pieces, slowing = turn_at_crossing(turn, start, cruise, min(5.0, cruise))
    delay = time - slowing[0][0]
    profile = SpeedProfile(tuple((t + delay, speed) for t, speed in [(0.0, cruise), *slowing]))
    lane = -INNER_LANE if turn == "left" else -OUTER_LANE
    cos, sin = math.cos(heading), math.sin(heading)
    path = Path2D(crossing + start * cos - lane * sin, start * sin + lane * cos, heading, pieces)
    motion = Motion(path, profile, -profile.distance(delay))
    return placer.add(name, motion, rider=name in ("motorcycle", "bicycle"), margin=0.0)


def place_overtaking(placer: Placer, name: str) -> bool:
    """Place a slow vehicle of a class in the outer lane of the main road and a car that overtakes it. Return
    False if the slow vehicle does not fit."""
    random = placer.random
    time, x, _ = meeting_point(placer)
    direction = 1.0 if random.random() < 0.5 else -1.0
    heading = 0.0 if direction > 0 else math.pi
    slow, faster = float(random.uniform(2.5, 5.0)), float(random.uniform(4.0, 6.0))
    fast = slow + faster
    y = -direction * OUTER_LANE
    if not placer.add(
        name, Motion(Path2D(x, y, heading), SpeedProfile.constant(slow), -slow * time), margin=0.0
    ):
        return False
    half = fast * _CLEARANCE / faster  # driven between the end of the change and the meeting
    pieces = (*change_lane(True), (2 * half, 0.0), *change_lane(False))
    path = Path2D(x - direction * (_LANE_CHANGE_ALONG + half), y, heading, pieces)
    arc = 2 * _LANE_CHANGE_ARC + half
    placer.add("car", Motion(path, SpeedProfile.constant(fast), arc - fast * time), margin=0.0)
    return True


def meeting_point(placer: Placer, spread: float = 45.0) -> tuple[float, float, float]:
    """Return a time, and a point x, y at most `spread` metres from the ego vehicle at that time."""
    random = placer.random
    index = int(random.integers(len(placer.times)))
    x, y = placer.ego_track[index, :2]
    distance, angle = spread * random.random() ** 0.5, random.uniform(-math.pi, math.pi)
    return (
        float(placer.times[index]),
        float(x + distance * math.cos(angle)),
        float(y + distance * math.sin(angle)),
    )
