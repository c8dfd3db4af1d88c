# SPDX-License-Identifier: Apache-2.0
"""Sizes and bodies of the ten classes; bodies consist of convex parts, and each class has its own appearance.

Sizes are the nuScenes class means (length, width, height in metres) with about ten percent of spread. The box
of an object is the tight cuboid around its body. Front and rear differ, so that images show the heading.
"""

from collections.abc import Callable
from typing import Final

import numpy as np

from ftkd_core.data.synthetic.mesh import Color, Cut, Lamp, Mesh, Part, block, column, stack

MEAN_SIZES: Final[dict[str, tuple[float, float, float]]] = {
    "car": (4.62, 1.95, 1.73),
    "truck": (6.93, 2.51, 2.84),
    "construction_vehicle": (6.37, 2.85, 3.19),
    "bus": (11.0, 2.94, 3.47),
    "trailer": (12.3, 2.90, 3.87),
    "barrier": (0.50, 2.53, 0.98),
    "motorcycle": (2.11, 0.77, 1.47),
    "bicycle": (1.70, 0.60, 1.28),
    "pedestrian": (0.73, 0.67, 1.77),
    "traffic_cone": (0.41, 0.41, 1.07),
}
_RIDER_HEIGHT: Final = 1.75

_GLASS: Final[Color] = (45, 55, 68)
_TYRE: Final[Color] = (22, 22, 24)
_METAL: Final[Color] = (120, 122, 126)
_HEAD: Final[Color] = (250, 248, 225)
_TAIL: Final[Color] = (205, 20, 22)
_CAR_COLORS: Final[tuple[Color, ...]] = (
    (200, 30, 34), (28, 66, 160), (225, 227, 230), (40, 42, 46), (150, 155, 160),
    (30, 110, 70), (230, 190, 40), (95, 40, 110),
)  # fmt: skip
_CLOTHES: Final[tuple[Color, ...]] = (
    (190, 40, 50), (40, 80, 180), (235, 235, 230), (45, 45, 50), (60, 140, 70), (230, 150, 40),
    (150, 60, 140),
)  # fmt: skip
_SKIN: Final[Color] = (215, 170, 140)


def sample_size(name: str, random: np.random.Generator, *, rider: bool = False) -> tuple[float, float, float]:
    """Draw length, width and height in metres of one object of a class."""
    spread = np.clip(random.normal(1.0, 0.08, 3), 0.8, 1.25)
    if name in ("barrier", "traffic_cone"):
        spread[:2] = np.clip(spread[:2], 0.9, 1.1)
    length, width, height = (float(m * s) for m, s in zip(MEAN_SIZES[name], spread, strict=True))
    return length, width, _RIDER_HEIGHT * float(spread[2]) if rider else height


def build_body(
    name: str, size: tuple[float, float, float], random: np.random.Generator, *, rider: bool = False
) -> Mesh:
    """Build the body of an object in its own frame: x forward, origin on the ground below its centre."""
    if name in ("motorcycle", "bicycle"):
        return Mesh(_cycle(size, random, rider, heavy=name == "motorcycle"))
    builders: dict[str, Callable[[tuple[float, float, float], np.random.Generator], Part | Cut]] = {
        "car": _car,
        "truck": _truck,
        "construction_vehicle": _construction_vehicle,
        "bus": _bus,
        "trailer": _trailer,
        "barrier": _barrier,
        "pedestrian": _pedestrian,
        "traffic_cone": _cone,
    }
    return Mesh(builders[name](size, random))


def _random_color(colors: tuple[Color, ...], random: np.random.Generator) -> Color:
    color = np.asarray(colors[int(random.integers(len(colors)))], dtype=np.float64)
    red, green, blue = np.clip(color * random.uniform(0.85, 1.15) + random.normal(0, 5, 3), 5, 250)
    return float(red), float(green), float(blue)


def _lamps(part: Part, *, low: float, high: float, width: float = 0.22) -> Part:
    for left, right in ((0.03, 0.03 + width), (0.97 - width, 0.97)):
        part.decal("front", left, right, low, high, _HEAD, Lamp.HEAD)
        part.decal("rear", left, right, low, high, _TAIL, Lamp.TAIL)
    return part


def _wheels(part: Part, positions: tuple[float, ...], radius: float) -> Part:
    for x in positions:
        part.disc(x, radius, radius, _TYRE)
        part.disc(x, radius, radius * 0.5, _METAL)
    return part


def _car(size: tuple[float, float, float], random: np.random.Generator) -> Part | Cut:
    length, width, height = size
    half, side = length / 2, width / 2
    color = _random_color(_CAR_COLORS, random)
    waist = 0.55 * height
    body = block((-half, half), (-side, side), (0.0, waist), color)
    body.decal("front", 0.0, 1.0, 0.0, 0.25, _TYRE).decal("rear", 0.0, 1.0, 0.0, 0.25, _TYRE)
    for name in ("left", "right"):
        body.decal(name, 0.0, 1.0, 0.0, 0.16, _TYRE)
    _lamps(body, low=0.62, high=0.86)
    body.decal("front", 0.3, 0.7, 0.4, 0.62, _GLASS)
    body.decal("rear", 0.38, 0.62, 0.45, 0.6, (235, 235, 235))
    _wheels(body, (-0.3 * length, 0.3 * length), 0.19 * height)
    back = float(random.uniform(0.8, 0.97))  # varies the rear from notchback to estate car
    cabin = block(
        (-back * half, 0.42 * half), (-0.94 * side, 0.94 * side), (waist, height), color,
        top_x=(-0.78 * back * half, 0.08 * half), top_y=(-0.8 * side, 0.8 * side),
    )  # fmt: skip
    cabin.decal("front", 0.06, 0.94, 0.06, 0.92, _GLASS).decal("rear", 0.1, 0.9, 0.2, 0.88, (62, 70, 80))
    for name in ("left", "right"):
        cabin.decal(name, 0.08, 0.47, 0.1, 0.86, _GLASS).decal(name, 0.53, 0.92, 0.1, 0.86, _GLASS)
    return stack(body, cabin, axis=2, at=(waist,))


def _truck(size: tuple[float, float, float], random: np.random.Generator) -> Part | Cut:
    length, width, height = size
    half, side = length / 2, width / 2
    cut = half - 0.27 * length
    cab = block(
        (cut, half), (-0.96 * side, 0.96 * side), (0.0, 0.82 * height), _random_color(_CAR_COLORS, random)
    )
    cab.decal("front", 0.06, 0.94, 0.52, 0.9, _GLASS)
    cab.decal("front", 0.0, 1.0, 0.0, 0.16, _TYRE)
    cab.decal("left", 0.1, 0.7, 0.55, 0.88, _GLASS).decal("right", 0.3, 0.9, 0.55, 0.88, _GLASS)
    for left, right in ((0.03, 0.22), (0.78, 0.97)):
        cab.decal("front", left, right, 0.2, 0.32, _HEAD, Lamp.HEAD)
    _wheels(cab, (cut + 0.14 * length,), 0.17 * height)
    cargo = block(
        (-half, cut),
        (-side, side),
        (0.12 * height, height),
        _random_color(((235, 235, 232), (225, 222, 210), (120, 160, 200), (190, 60, 50)), random),
        bottom=True,
    )
    cargo.decal("rear", 0.48, 0.52, 0.05, 0.95, _METAL)
    cargo.decal("left", 0.15, 0.85, 0.4, 0.6, _random_color(_CLOTHES, random)).decal(
        "right", 0.15, 0.85, 0.4, 0.6, _random_color(_CLOTHES, random)
    )
    for left, right in ((0.02, 0.18), (0.82, 0.98)):
        cargo.decal("rear", left, right, 0.02, 0.1, _TAIL, Lamp.TAIL)
    floor = block((-half, cut), (-0.9 * side, 0.9 * side), (0.0, 0.12 * height), (40, 40, 42))
    _wheels(floor, (-0.3 * length,), 0.06 * height)
    return stack(stack(floor, cargo, axis=2, at=(0.12 * height,)), cab, axis=0, at=(cut,))


def _construction_vehicle(size: tuple[float, float, float], random: np.random.Generator) -> Part | Cut:
    length, width, height = size
    half, side = length / 2, width / 2
    yellow = _random_color(((240, 170, 15), (245, 150, 20), (235, 185, 30)), random)
    dark: Color = (38, 38, 40)
    track_top, cut = 0.28 * height, 0.12 * length
    tracks = block((-half, cut + 0.12 * length), (-side, side), (0.0, track_top), dark)
    for name in ("left", "right"):
        tracks.decal(name, 0.05, 0.95, 0.25, 0.75, (75, 72, 70))
    body = block((-half, 0.0), (-0.95 * side, 0.95 * side), (track_top, 0.62 * height), yellow)
    body.decal("rear", 0.1, 0.9, 0.3, 0.7, dark)
    for left, right in ((0.02, 0.16), (0.84, 0.98)):
        body.decal("rear", left, right, 0.1, 0.3, _TAIL, Lamp.TAIL)
    cabin = block((-0.22 * length, 0.0), (-0.1 * side, 0.9 * side), (0.62 * height, height), yellow)
    for name in ("front", "left", "right", "rear"):
        cabin.decal(name, 0.1, 0.9, 0.15, 0.85, _GLASS)
    arm = block(
        (0.0, 0.38 * length),
        (-0.28 * side, 0.1 * side),
        (track_top, 0.8 * height),
        yellow,
        top_x=(0.1 * length, 0.32 * length),
    )
    bucket = block(
        (0.38 * length, half),
        (-0.7 * side, 0.7 * side),
        (0.0, 0.4 * height),
        (90, 86, 80),
        top_x=(0.38 * length, 0.46 * length),
    )
    rear = stack(body, cabin, axis=2, at=(0.62 * height,))
    upper = stack(rear, arm, axis=0, at=(0.0,))
    return stack(stack(tracks, upper, axis=2, at=(track_top,)), bucket, axis=0, at=(0.38 * length,))


def _bus(size: tuple[float, float, float], random: np.random.Generator) -> Part | Cut:
    length, width, height = size
    half, side = length / 2, width / 2
    color = _random_color(((40, 150, 75), (205, 45, 40), (240, 240, 240), (30, 110, 190)), random)
    body = block((-half, half), (-side, side), (0.0, height), color, top_color=(225, 225, 222))
    for name in ("left", "right"):
        body.decal(name, 0.0, 1.0, 0.0, 0.1, _TYRE)
        for index in range(8):
            body.decal(name, 0.03 + 0.118 * index, 0.13 + 0.118 * index, 0.45, 0.82, _GLASS, Lamp.WINDOW)
    body.decal("front", 0.04, 0.96, 0.35, 0.85, _GLASS).decal(
        "front", 0.2, 0.8, 0.88, 0.97, (250, 180, 40), Lamp.WINDOW
    )
    body.decal("rear", 0.15, 0.85, 0.55, 0.82, (62, 70, 80))
    _lamps(body, low=0.12, high=0.22)
    return _wheels(body, (-0.28 * length, 0.32 * length), 0.15 * height)


def _trailer(size: tuple[float, float, float], random: np.random.Generator) -> Part | Cut:
    length, width, height = size
    half, side = length / 2, width / 2
    bed = 0.3 * height
    box = block(
        (-half, half),
        (-side, side),
        (bed, height),
        _random_color(((170, 175, 185), (90, 120, 160), (165, 90, 60)), random),
        bottom=True,
    )
    for name in ("left", "right"):
        for index in range(9):
            box.decal(name, 0.05 + 0.105 * index, 0.07 + 0.105 * index, 0.03, 0.97, (100, 102, 108))
    box.decal("rear", 0.47, 0.53, 0.02, 0.98, (70, 70, 74)).decal("front", 0.1, 0.9, 0.1, 0.3, (70, 70, 74))
    for index in range(5):
        box.decal("rear", 0.2 * index, 0.2 * index + 0.1, 0.0, 0.07, _TAIL, Lamp.TAIL)
    chassis = block((-half, 0.0), (-0.85 * side, 0.85 * side), (0.0, bed), (34, 34, 36))
    _wheels(chassis, (-0.42 * length, -0.32 * length, -0.22 * length), 0.13 * height)
    leg = block((0.0, 0.32 * length), (-0.15 * side, 0.15 * side), (0.0, bed), (60, 60, 64))
    return stack(stack(chassis, leg, axis=0, at=(0.0,)), box, axis=2, at=(bed,))


def _barrier(size: tuple[float, float, float], random: np.random.Generator) -> Part | Cut:
    length, width, height = size
    half, side = length / 2, width / 2
    foot = block((-half, half), (-side, side), (0.0, 0.25 * height), (205, 205, 200))
    board = block((-0.4 * half, 0.4 * half), (-side, side), (0.25 * height, height), (238, 238, 234))
    for name in ("front", "rear"):
        for index in range(4):
            board.decal(name, 0.25 * index, 0.25 * index + 0.13, 0.05, 0.95, (215, 35, 30), Lamp.REFLECTOR)
    for name in ("left", "right"):
        board.decal(name, 0.0, 1.0, 0.0, 1.0, (215, 35, 30))
    return stack(foot, board, axis=2, at=(0.25 * height,))


def _pedestrian(size: tuple[float, float, float], random: np.random.Generator) -> Part | Cut:
    length, width, height = size
    half, side = length / 2, width / 2
    legs_top, shoulders = 0.47 * height, 0.84 * height
    legs = block(
        (-half, half),
        (-0.6 * side, 0.6 * side),
        (0.0, legs_top),
        _random_color(((40, 44, 60), (60, 50, 42), (80, 84, 92)), random),
        top_x=(-0.45 * half, 0.45 * half),
    )
    color = _random_color(_CLOTHES, random)
    torso = block(
        (-0.5 * half, 0.5 * half),
        (-side, side),
        (legs_top, shoulders),
        color,
        top_y=(-0.85 * side, 0.85 * side),
    )
    if random.random() < 0.4:
        torso.decal("rear", 0.2, 0.8, 0.2, 0.9, (50, 60, 60))  # backpack
    head = block(
        (-0.35 * half, 0.35 * half),
        (-0.32 * side, 0.32 * side),
        (shoulders, height),
        _SKIN,
        top_color=(50, 38, 30),
    )
    head.decal("rear", 0.0, 1.0, 0.3, 1.0, (50, 38, 30))
    return stack(legs, torso, head, axis=2, at=(legs_top, shoulders))


def _cone(size: tuple[float, float, float], random: np.random.Generator) -> Part | Cut:
    length, width, height = size
    base = block((-length / 2, length / 2), (-width / 2, width / 2), (0.0, 0.06 * height), (235, 80, 20))
    radius = 0.42 * min(length, width)
    tiers = [(0.06, 0.42, (245, 90, 20)), (0.42, 0.68, (245, 245, 240)), (0.68, 1.0, (245, 90, 20))]
    parts: list[Part | Cut] = [base]
    for low, high, color in tiers:
        widths = (radius * (1.08 - low), radius * (1.08 - high))
        parts.append(
            column(
                widths,
                (low * height, high * height),
                (float(color[0]), float(color[1]), float(color[2])),
                sides=6,
            )
        )
    return stack(*parts, axis=2, at=tuple(low * height for low, _, _ in tiers))


def _cycle(
    size: tuple[float, float, float], random: np.random.Generator, rider: bool, *, heavy: bool
) -> Part | Cut:
    length, width, height = size
    half, side = length / 2, width / 2
    machine_top = 0.55 * height if rider else 0.8 * height
    thin = (0.45 if heavy else 0.14) * side
    color = _random_color(_CAR_COLORS if heavy else ((40, 170, 190), (120, 200, 60), (230, 230, 235)), random)
    radius = min(0.32 * machine_top if heavy else 0.44 * machine_top, 0.24 * length)
    machine = block((-half, half), (-thin, thin), (0.0, machine_top), color, top_x=(-0.7 * half, 0.55 * half))
    if not heavy:  # a bicycle's frame is mostly open; a dark patch stands for the gaps
        for name in ("left", "right"):
            machine.decal(name, 0.0, 1.0, 0.0, 0.45, (105, 105, 108))
    for x in (-half + radius, half - radius):
        machine.disc(x, radius, radius, _TYRE)
        machine.disc(x, radius, 0.62 * radius, (150, 150, 152) if heavy else (170, 172, 175))
    machine.decal("front", 0.1, 0.9, 0.6, 0.9, _HEAD, Lamp.HEAD).decal(
        "rear", 0.1, 0.9, 0.6, 0.85, _TAIL, Lamp.TAIL
    )
    bar_low, bar_high = machine_top, height
    if not rider:
        bar = block((0.25 * half, 0.45 * half), (-side, side), (bar_low, bar_high), _METAL)
        return stack(machine, bar, axis=2, at=(machine_top,))
    torso_top = 0.84 * height
    torso = block(
        (-0.4 * half, 0.3 * half),
        (-side, side),
        (machine_top, torso_top),
        _random_color(_CLOTHES, random),
        top_y=(-0.8 * side, 0.8 * side),
    )
    head = block(
        (-0.05 * half, 0.3 * half),
        (-0.38 * side, 0.38 * side),
        (torso_top, height),
        (40, 40, 44) if heavy else _SKIN,
    )
    return stack(machine, torso, head, axis=2, at=(machine_top, torso_top))
