# SPDX-License-Identifier: Apache-2.0
"""Static bodies without annotation, which occlude actors: buildings, walls, hedges and trees."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ftkd_core.data.synthetic.mesh import Color, Lamp, Mesh, block, column, stack


@dataclass(frozen=True, kw_only=True)
class Fixture:
    """Static body: size (length, width, height) and pose x, y, yaw in the local frame."""

    size: tuple[float, float, float]
    pose: tuple[float, float, float]
    body: Mesh


def make_scenery(
    random: np.random.Generator, crossings_x: Sequence[float], road_half: float, sidewalk: float
) -> list[Fixture]:
    """Place buildings with gaps behind the sidewalks, and trees along the far side of the kerbs."""
    fixtures: list[Fixture] = []
    edges = [crossings_x[0] - 70.0, *crossings_x, crossings_x[-1] + 70.0]
    setback = road_half + sidewalk
    for left, right in itertools.pairwise(edges):
        start = left + (setback if left in crossings_x else 0.0)
        end = right - (setback if right in crossings_x else 0.0)
        for side in (-1.0, 1.0):
            _main_row(fixtures, random, start, end, side, setback)
    for crossing in crossings_x:
        for side in (-1.0, 1.0):
            for flank in (-1.0, 1.0):
                _side_row(fixtures, random, crossing + flank * setback, flank, side, setback)
    return fixtures


def _main_row(
    fixtures: list[Fixture],
    random: np.random.Generator,
    start: float,
    end: float,
    side: float,
    setback: float,
) -> None:
    """Place buildings, walls and hedges along the main road between two crossings."""
    x = start
    while x < end - 6:
        length = float(min(random.uniform(9, 24), end - x))
        kind = random.random()
        depth = float(random.uniform(9, 13))
        near = setback + float(random.uniform(0.5, 9.0) if kind < 0.5 else random.uniform(0.5, 2.0))
        if kind < 0.62:
            fixtures.append(_building(random, x + length / 2, side * (near + depth / 2), length - 0.5, depth))
        elif kind < 0.78:
            fixtures.append(
                _wall_or_hedge(
                    random, x + length / 2, side * near, length - 0.6, 0.5, hedge=random.random() < 0.6
                )
            )
        _trees(fixtures, random, x, length, side, setback)
        x += length + float(random.uniform(0, 7))


def _trees(
    fixtures: list[Fixture], random: np.random.Generator, x: float, length: float, side: float, setback: float
) -> None:
    if random.random() < 0.5:
        fixtures.append(_tree(random, x + float(random.uniform(0.2, 0.8)) * length, side * (setback - 0.25)))


def _side_row(
    fixtures: list[Fixture],
    random: np.random.Generator,
    edge: float,
    flank: float,
    side: float,
    setback: float,
) -> None:
    """Place buildings along a crossing road, behind the rows of the main road."""
    y = setback + 26.0
    while y < 90:
        length, depth = float(random.uniform(10, 22)), float(random.uniform(9, 14))
        if random.random() < 0.75:
            gap = float(random.uniform(0.5, 4.0))
            x = edge + flank * (gap + depth / 2)
            fixtures.append(_building(random, x, side * (y + length / 2), depth, length - 0.5))
        y += length + float(random.uniform(0, 8))


def _building(random: np.random.Generator, x: float, y: float, length: float, width: float) -> Fixture:
    height = float(random.uniform(5, 16))
    walls: tuple[Color, ...] = (
        (165, 120, 95),
        (190, 180, 160),
        (140, 140, 145),
        (200, 195, 190),
        (120, 95, 85),
        (175, 160, 120),
    )
    base = np.asarray(walls[int(random.integers(len(walls)))]) * random.uniform(0.8, 1.1)
    color = (float(base[0]), float(base[1]), float(base[2]))
    body = block(
        (-length / 2, length / 2), (-width / 2, width / 2), (0.0, height), color, top_color=(95, 92, 90)
    )
    floors = max(1, int(height // 3.2))
    for name, extent in (("front", width), ("rear", width), ("left", length), ("right", length)):
        columns = max(1, int(extent // 3.5))
        for floor in range(floors):
            for number in range(columns):
                left = (number + 0.25) / columns
                low = (floor + 0.3) / floors
                lit = Lamp.WINDOW if random.random() < 0.3 else Lamp.NONE
                body.decal(name, left, left + 0.5 / columns, low, low + 0.5 / floors, (70, 82, 96), lit)
    return Fixture(size=(length, width, height), pose=(x, y, 0.0), body=Mesh(body))


def _wall_or_hedge(
    random: np.random.Generator, x: float, y: float, length: float, width: float, *, hedge: bool
) -> Fixture:
    height = float(random.uniform(0.9, 2.0))
    color: Color = (58, 92, 48) if hedge else (150, 142, 132)
    body = block((-length / 2, length / 2), (-width / 2, width / 2), (0.0, height), color)
    return Fixture(size=(length, width, height), pose=(x, y, 0.0), body=Mesh(body))


def _tree(random: np.random.Generator, x: float, y: float) -> Fixture:
    height, radius = float(random.uniform(4.5, 8.0)), float(random.uniform(1.2, 2.0))
    trunk_top = 0.4 * height
    green = float(random.uniform(80, 115))
    trunk = column((0.16, 0.13), (0.0, trunk_top), (92, 70, 52), sides=6)
    lower = column((0.5 * radius, radius), (trunk_top, 0.62 * height), (50, green * 0.85, 42), bottom=True)
    upper = column((radius, 0.25 * radius), (0.62 * height, height), (58, green, 48))
    body = Mesh(stack(trunk, lower, upper, axis=2, at=(trunk_top, 0.62 * height)))
    # Only the trunk occupies the ground; the crown is above it.
    return Fixture(size=(0.5, 0.5, height), pose=(x, y, 0.0), body=body)
