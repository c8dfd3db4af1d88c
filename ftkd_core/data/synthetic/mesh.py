# SPDX-License-Identifier: Apache-2.0
"""Solid bodies of convex parts and the drawing order of their faces.

A body has its own frame: x forward, y left, z up, origin on the ground below its centre. Its parts are leaves
of a tree of axis-aligned cuts; the side of each cut on which the camera lies gives the exact back-to-front
order. Faces of one part do not hide each other once back faces are dropped. Decals (windows, lamps, stripes)
follow the face they lie on.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

Color: TypeAlias = tuple[float, float, float]
Point: TypeAlias = tuple[float, float, float]

MAX_FACE_POINTS: Final = 8


class Lamp(IntEnum):
    """Light source of a face: none, white headlight, red tail light, lit window or sign, reflector."""

    NONE = 0
    HEAD = 1
    TAIL = 2
    WINDOW = 3
    REFLECTOR = 4


class Face(NamedTuple):
    """Flat convex polygon, counter-clockwise from outside; points (3..8) in the frame of the body."""

    points: tuple[Point, ...]
    color: Color
    lamp: Lamp


@dataclass
class Part:
    """Convex solid: its faces with decals, and its sides by name ("front", "rear", "left", "right", "top",
    "bottom" of a block)."""

    faces: list[Face]
    sides: dict[str, NDArray[np.float64]] = field(default_factory=dict)

    def decal(
        self,
        side: str,
        left: float,
        right: float,
        low: float,
        high: float,
        color: Color,
        lamp: Lamp = Lamp.NONE,
    ) -> "Part":
        """Paint a patch on a side and return the part; edges are fractions (0..1) of the side as seen from
        outside."""
        corners = self.sides[side]
        u, v = np.array([[left, right, right, left], [low, low, high, high]])[..., None]
        self.faces.append(Face(_points(_bilinear(corners, u, v)), color, lamp))
        return self

    def disc(
        self, x: float, z: float, radius: float, color: Color, sides: Sequence[str] = ("left", "right")
    ) -> "Part":
        """Paint a wheel, an octagon at (x, z), on the upright left and right sides and return the part."""
        angles = np.arange(8) * np.pi / 4 + np.pi / 8
        reach = radius / np.cos(np.pi / 8)
        for side in sides:
            y, turn = float(self.sides[side][0, 1]), (-1 if side == "left" else 1)
            points = tuple((x + turn * reach * np.cos(a), y, z + reach * np.sin(a)) for a in angles)
            self.faces.append(Face(tuple(_point(p) for p in points), color, Lamp.NONE))
        return self


class Cut(NamedTuple):
    """Plane `coordinate[axis] = value` with the parts below and above it."""

    axis: int
    value: float
    low: "Part | Cut"
    high: "Part | Cut"


def stack(*parts: "Part | Cut", axis: int, at: Sequence[float]) -> "Part | Cut":
    """Combine parts in ascending order along an axis, separated by cuts at the given values (one fewer than
    parts)."""
    tree = parts[-1]
    for part, value in zip(reversed(parts[:-1]), reversed(at), strict=True):
        tree = Cut(axis, value, part, tree)
    return tree


def block(
    x: tuple[float, float],
    y: tuple[float, float],
    z: tuple[float, float],
    color: Color,
    *,
    top_x: tuple[float, float] | None = None,
    top_y: tuple[float, float] | None = None,
    top_color: Color | None = None,
    bottom: bool = False,
) -> Part:
    """Build a box, or a frustum if the top rectangle differs; `bottom` adds a face that is visible from
    below."""
    (x0, x1), (y0, y1), (z0, z1) = x, y, z
    a0, a1 = top_x or x
    b0, b1 = top_y or y
    sides = {
        "front": [(x1, y0, z0), (x1, y1, z0), (a1, b1, z1), (a1, b0, z1)],
        "rear": [(x0, y1, z0), (x0, y0, z0), (a0, b0, z1), (a0, b1, z1)],
        "left": [(x1, y1, z0), (x0, y1, z0), (a0, b1, z1), (a1, b1, z1)],
        "right": [(x0, y0, z0), (x1, y0, z0), (a1, b0, z1), (a0, b0, z1)],
        "top": [(a0, b0, z1), (a1, b0, z1), (a1, b1, z1), (a0, b1, z1)],
    }
    if bottom:
        sides["bottom"] = [(x0, y1, z0), (x1, y1, z0), (x1, y0, z0), (x0, y0, z0)]
    faces = [
        Face(tuple(points), top_color if top_color and name == "top" else color, Lamp.NONE)
        for name, points in sides.items()
    ]
    return Part(faces, {name: np.array(points) for name, points in sides.items()})


def column(
    radii: tuple[float, float], z: tuple[float, float], color: Color, *, sides: int = 8, bottom: bool = False
) -> Part:
    """Build an upright regular prism or truncated cone about the z axis with the given bottom and top
    radii."""
    angles = (np.arange(sides) + 0.5) * 2 * np.pi / sides
    ring = np.stack([np.cos(angles), np.sin(angles)], axis=-1)
    low = [_point((*(radii[0] * p), z[0])) for p in ring]
    high = [_point((*(radii[1] * p), z[1])) for p in ring]
    faces = [
        Face((low[i], low[(i + 1) % sides], high[(i + 1) % sides], high[i]), color, Lamp.NONE)
        for i in range(sides)
    ]
    faces.append(Face(tuple(high), color, Lamp.NONE))
    if bottom:
        faces.append(Face(tuple(reversed(low)), color, Lamp.NONE))
    return Part(faces)


def slab(profile: Sequence[tuple[float, float]], y: tuple[float, float], color: Color) -> Part:
    """Extrude a convex outline (x, z), counter-clockwise seen from the right side, from y[0] to y[1]."""
    right = [(px, y[0], pz) for px, pz in profile]
    left = [(px, y[1], pz) for px, pz in profile]
    count = len(profile)
    faces = [Face(tuple(right), color, Lamp.NONE), Face(tuple(reversed(left)), color, Lamp.NONE)]
    for i in range(count):
        j = (i + 1) % count
        faces.append(Face((right[j], right[i], left[i], left[j]), color, Lamp.NONE))
    return Part(faces)


class Mesh:
    """Faces of a body as arrays, and their drawing order for any camera.

    points (F, 8, 3) float32, padded with the last point of the face; counts (F,); normals (F, 3); colors (F,
    3) float32 0..255; lamps (F,).
    """

    def __init__(self, tree: "Part | Cut") -> None:
        parts: list[Part] = []
        self._cuts: list[tuple[int, float]] = []
        self._tree = self._number(tree, parts)
        faces = [face for part in parts for face in part.faces]
        bounds = np.cumsum([0, *(len(part.faces) for part in parts)])
        self._ranges = [np.arange(a, b) for a, b in itertools.pairwise(bounds)]
        self._orders: dict[int, NDArray[np.int64]] = {}
        padded = [face.points + (face.points[-1],) * (MAX_FACE_POINTS - len(face.points)) for face in faces]
        self.points: NDArray[np.float32] = np.array(padded, dtype=np.float32)
        self.counts = np.array([len(face.points) for face in faces], dtype=np.int64)
        first = self.points[:, 0]
        normals = np.cross(self.points[:, 1] - first, self.points[:, 2] - first)
        self.normals: NDArray[np.float32] = normals / np.maximum(
            np.linalg.norm(normals, axis=-1, keepdims=True), 1e-9
        )
        self.colors: NDArray[np.float32] = np.array([face.color for face in faces], dtype=np.float32)
        self.lamps = np.array([face.lamp for face in faces], dtype=np.int64)

    def painting_order(self, camera: NDArray[np.floating[Any]]) -> NDArray[np.int64]:
        """Return the indices of all faces, back to front, as seen by a camera (3,) in the frame of the
        body."""
        key = 0
        for bit, (axis, value) in enumerate(self._cuts):
            key |= (camera[axis] > value) << bit
        order = self._orders.get(key)
        if order is None:
            order = self._orders[key] = np.concatenate(
                [self._ranges[part] for part in self._walk(self._tree, key)]
            )
        return order

    def _number(self, tree: "Part | Cut", parts: list[Part]) -> Any:
        """Return the tree with parts and cuts replaced by their numbers."""
        if isinstance(tree, Part):
            parts.append(tree)
            return len(parts) - 1
        self._cuts.append((tree.axis, tree.value))
        number = len(self._cuts) - 1
        return number, self._number(tree.low, parts), self._number(tree.high, parts)

    def _walk(self, tree: Any, key: int) -> list[int]:
        """List the parts of a subtree back to front; bit i of `key` is 1 if the camera lies above cut i."""
        if isinstance(tree, int):
            return [tree]
        number, low, high = tree
        far, near = (low, high) if key >> number & 1 else (high, low)
        return self._walk(far, key) + self._walk(near, key)


def _point(values: Sequence[float] | NDArray[np.float64]) -> Point:
    x, y, z = (float(v) for v in values)
    return x, y, z


def _points(rows: NDArray[np.float64]) -> tuple[Point, ...]:
    return tuple((x, y, z) for x, y, z in rows.tolist())


def _bilinear(
    corners: NDArray[np.float64], u: NDArray[np.float64], v: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Interpolate points (P, 3) at fractions u, v (P, 1) of a quadrilateral (4, 3)."""
    points: NDArray[np.float64] = (
        corners[0] * (1 - u) * (1 - v)
        + corners[1] * u * (1 - v)
        + corners[2] * u * v
        + corners[3] * (1 - u) * v
    )
    return points
