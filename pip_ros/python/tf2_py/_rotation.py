# SPDX-License-Identifier: Apache-2.0
"""Rigid transforms as plain floats: translation (x, y, z) in metres and unit quaternion (x, y, z, w).

`Rigid` values are `parent_from_child`; `compose(a_from_b, b_from_c)` is `a_from_c`.
"""

import math
from typing import NamedTuple

Vector = tuple[float, float, float]
Quaternion = tuple[float, float, float, float]


class Rigid(NamedTuple):
    """A rotation followed by a translation."""

    translation: Vector
    rotation: Quaternion


IDENTITY = Rigid((0.0, 0.0, 0.0), (0.0, 0.0, 0.0, 1.0))


def multiply(left: Quaternion, right: Quaternion) -> Quaternion:
    """Return the rotation `right` followed by `left`."""
    ax, ay, az, aw = left
    bx, by, bz, bw = right
    return (
        aw * bx + ax * bw + ay * bz - az * by,
        aw * by + ay * bw + az * bx - ax * bz,
        aw * bz + az * bw + ax * by - ay * bx,
        aw * bw - ax * bx - ay * by - az * bz,
    )


def conjugate(rotation: Quaternion) -> Quaternion:
    """Return the inverse of a unit quaternion."""
    x, y, z, w = rotation
    return (-x, -y, -z, w)


def rotate(rotation: Quaternion, vector: Vector) -> Vector:
    """Rotate `vector` by a unit quaternion."""
    qx, qy, qz, qw = rotation
    vx, vy, vz = vector
    tx, ty, tz = 2.0 * (qy * vz - qz * vy), 2.0 * (qz * vx - qx * vz), 2.0 * (qx * vy - qy * vx)
    return (
        vx + qw * tx + qy * tz - qz * ty,
        vy + qw * ty + qz * tx - qx * tz,
        vz + qw * tz + qx * ty - qy * tx,
    )


def compose(outer: Rigid, inner: Rigid) -> Rigid:
    """Return `a_from_c` for `a_from_b` and `b_from_c`."""
    x, y, z = rotate(outer.rotation, inner.translation)
    ox, oy, oz = outer.translation
    return Rigid((x + ox, y + oy, z + oz), multiply(outer.rotation, inner.rotation))


def invert(transform: Rigid) -> Rigid:
    """Return `b_from_a` for `a_from_b`."""
    rotation = conjugate(transform.rotation)
    x, y, z = rotate(rotation, transform.translation)
    return Rigid((-x, -y, -z), rotation)


def normalized(rotation: Quaternion) -> Quaternion:
    """Return the unit quaternion of a rotation, with the sign that tf2 reports.

    Length 0 gives NaN. tf2 stores rotations as matrices and extracts the quaternion with w > 0 if |w| > 1/2,
    otherwise the one whose largest of x, y, z is positive.
    """
    length = math.sqrt(sum(component * component for component in rotation))
    if length == 0.0:
        return (math.nan, math.nan, math.nan, math.nan)
    x, y, z, w = (component / length for component in rotation)
    leading = w if abs(w) > 0.5 else max((x, y, z), key=abs)
    return (-x, -y, -z, -w) if leading < 0.0 else (x, y, z, w)


def interpolate(start: Rigid, end: Rigid, ratio: float) -> Rigid:
    """Interpolate translation linearly and rotation along the shorter arc; `ratio` in [0, 1]."""
    sx, sy, sz = start.translation
    ex, ey, ez = end.translation
    keep = 1.0 - ratio
    translation = (sx * keep + ex * ratio, sy * keep + ey * ratio, sz * keep + ez * ratio)
    return Rigid(translation, _slerp(start.rotation, end.rotation, ratio))


def _slerp(start: Quaternion, end: Quaternion, ratio: float) -> Quaternion:
    if sum(a * b for a, b in zip(start, end, strict=True)) < 0.0:
        end = (-end[0], -end[1], -end[2], -end[3])
    # The angle from both chords is exact even for nearly equal rotations, unlike the arc cosine.
    total = math.hypot(*(a + b for a, b in zip(start, end, strict=True)))
    angle = 2.0 * math.atan2(math.dist(start, end), total)
    sine = math.sin(angle)
    if sine == 0.0:
        return start
    from_start, from_end = math.sin((1.0 - ratio) * angle) / sine, math.sin(ratio * angle) / sine
    x, y, z, w = (a * from_start + b * from_end for a, b in zip(start, end, strict=True))
    return (x, y, z, w)
