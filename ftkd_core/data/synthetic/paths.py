# SPDX-License-Identifier: Apache-2.0
"""Motion of objects: paths of lines and arcs with piecewise linear speed, both integrated exactly."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Pose2D(NamedTuple):
    """x, y in metres, yaw in radians, and the curvature (1/m) of the path at this point."""

    x: float
    y: float
    yaw: float
    curvature: float


@dataclass(frozen=True)
class Path2D:
    """Path from (x, y, yaw) through pieces (length m, curvature 1/m); it continues straight before its start
    and after its end."""

    x: float
    y: float
    yaw: float
    pieces: tuple[tuple[float, float], ...] = ()

    def at(self, distance: float) -> Pose2D:
        """Return the pose at an arc length in metres."""
        x, y, yaw = self.x, self.y, self.yaw
        if distance < 0:
            return Pose2D(x + distance * math.cos(yaw), y + distance * math.sin(yaw), yaw, 0.0)
        for length, curvature in self.pieces:
            step = min(distance, length)
            x, y, yaw = _advance(x, y, yaw, step, curvature)
            distance -= step
            if distance <= 0:
                return Pose2D(x, y, yaw, curvature)
        return Pose2D(x + distance * math.cos(yaw), y + distance * math.sin(yaw), yaw, 0.0)


def _advance(x: float, y: float, yaw: float, length: float, curvature: float) -> tuple[float, float, float]:
    if curvature == 0.0:
        return x + length * math.cos(yaw), y + length * math.sin(yaw), yaw
    turned = yaw + length * curvature
    radius = 1.0 / curvature
    x += radius * (math.sin(turned) - math.sin(yaw))
    y -= radius * (math.cos(turned) - math.cos(yaw))
    return x, y, turned


@dataclass(frozen=True)
class SpeedProfile:
    """Speed over time, linear between (time s, speed m/s) knots and constant outside; distance is 0 at time
    0."""

    knots: tuple[tuple[float, float], ...]

    @staticmethod
    def constant(speed: float) -> "SpeedProfile":
        """Return a profile of constant speed."""
        return SpeedProfile(((0.0, speed),))

    def speed(self, time_s: float) -> float:
        """Return the speed in m/s."""
        previous_time, previous_speed = self.knots[0]
        if time_s <= previous_time:
            return previous_speed
        for time, speed in self.knots[1:]:
            if time_s < time:
                return previous_speed + (speed - previous_speed) * (time_s - previous_time) / (
                    time - previous_time
                )
            previous_time, previous_speed = time, speed
        return previous_speed

    def distances(self, times_s: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the metres travelled since time 0 (negative before it) at each of the times."""
        times, speeds = (np.array(column, dtype=np.float64) for column in zip(*self.knots, strict=True))
        until = np.concatenate([[0.0], np.cumsum(np.diff(times) * (speeds[1:] + speeds[:-1]) / 2)])

        def integral(t: NDArray[np.float64]) -> NDArray[np.float64]:
            knot = np.clip(np.searchsorted(times, t, side="right") - 1, 0, len(times) - 1)
            result: NDArray[np.float64] = (
                until[knot] + (t - times[knot]) * (speeds[knot] + np.interp(t, times, speeds)) / 2
            )
            return result

        travelled: NDArray[np.float64] = integral(np.asarray(times_s)) - integral(np.zeros(1))
        return travelled

    def distance(self, time_s: float) -> float:
        """Return the metres travelled since time 0 (negative before it); scalar twin of `distances` without
        its overhead."""
        if len(self.knots) == 1:
            return self.knots[0][1] * time_s
        low, high = min(0.0, time_s), max(0.0, time_s)
        times = [low, *(t for t, _ in self.knots if low < t < high), high]
        speeds = [self.speed(t) for t in times]
        area = sum(
            (b - a) * (v + w) / 2
            for a, b, v, w in zip(times[:-1], times[1:], speeds[:-1], speeds[1:], strict=True)
        )
        return area if time_s >= 0 else -area


@dataclass(frozen=True)
class Motion:
    """Motion along a path with a speed profile; the arc length is `start` at time 0."""

    path: Path2D
    speed: SpeedProfile
    start: float = 0.0

    @property
    def is_static(self) -> bool:
        """Whether the object never moves."""
        return self.speed.knots == ((0.0, 0.0),)

    def at(self, time_s: float) -> tuple[float, float, float, float]:
        """Return x, y, yaw and speed at a time."""
        if self.is_static:
            return self.path.x, self.path.y, self.path.yaw, 0.0
        pose = self.path.at(self.start + self.speed.distance(time_s))
        return pose.x, pose.y, pose.yaw, self.speed.speed(time_s)

    def track(self, times_s: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return x, y, yaw (T, 3) at each of the times."""
        distances = self.start + self.speed.distances(times_s)
        if not self.path.pieces:
            x = self.path.x + distances * np.cos(self.path.yaw)
            y = self.path.y + distances * np.sin(self.path.yaw)
            return np.stack([x, y, np.full_like(x, self.path.yaw)], axis=-1)
        return np.array([self.path.at(float(d))[:3] for d in distances])


def static_motion(x: float, y: float, yaw: float) -> Motion:
    """Return the motion of an object at rest."""
    return Motion(Path2D(x, y, yaw), SpeedProfile.constant(0.0))


def turn_at_crossing(
    turn: str, start_x: float, cruise: float, corner: float = 5.0
) -> tuple[tuple[tuple[float, float], ...], list[tuple[float, float]]]:
    """Return path pieces and speed knots of a turn at a crossing at x = 0 for a start at start_x < 0.

    A left turn starts on the inner lane and a right turn on the outer one; both end on the outer lane of the
    crossing road. The speed drops from `cruise` to `corner` m/s over the last 12 m before the turn and rises
    again after it.
    """
    radius, sign, into = (10.5, 1.0, 5.25) if turn == "left" else (7.0, -1.0, -5.25)
    straight, arc = into - radius - start_x, radius * math.pi / 2
    arrive = max(1.0, (straight - 12) / cruise)
    slow = 2 * 12 / (cruise + corner)
    after = arrive + slow + arc / corner
    knots = [(arrive, cruise), (arrive + slow, corner), (after, corner), (after + 3, cruise)]
    return ((straight, 0.0), (arc, sign / radius)), knots
