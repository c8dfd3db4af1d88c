# SPDX-License-Identifier: Apache-2.0
"""Assignment of cameras to the channels of the weights by yaw; wide cameras take two channels if there are
enough.

Pure functions on angles in radians. Yaw is positive to the left.
"""

from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
from scipy.optimize import linear_sum_assignment

WIDE_RAD: Final = float(np.deg2rad(100.0))
"""A camera with a larger horizontal field is split in two virtual cameras."""
SAME_YAW_RAD: Final = float(np.deg2rad(2.0))
"""Two cameras whose yaws differ by less see the same; the narrower one is masked."""
_WIDER: Final = 1.25
"""A camera whose field exceeds that of its channel by this factor gets the intrinsics of a wider channel."""


class Sight(NamedTuple):
    """Horizontal view of a camera: yaw of its optical axis, and the yaws of its right and left borders, right
    < left."""

    yaw: float
    right: float
    left: float

    @property
    def field(self) -> float:
        """Horizontal field of view."""
        return self.left - self.right


class Placement(NamedTuple):
    """A virtual camera: index of the real camera, channel, its yaw, and the channel whose intrinsics, pitch
    and roll it has."""

    camera: int
    channel: int
    yaw: float
    model: int


def assign(
    sights: Sequence[Sight], channel_yaws: Sequence[float], fields: Sequence[float]
) -> list[Placement]:
    """Return the virtual cameras of the real ones: at most one per channel, with the least total squared
    difference of yaws; of more cameras than channels some are left out.

    fields: horizontal field of each channel. Cameras are split in order of their fields, the widest first,
    while channels are free.
    """
    wide = sorted((i for i, s in enumerate(sights) if s.field > WIDE_RAD), key=lambda i: -sights[i].field)
    split = set(wide[: max(0, len(channel_yaws) - len(sights))])
    wanted: list[tuple[int, float, float]] = []  # camera, yaw, field
    for index, sight in enumerate(sights):
        middle, quarter = (sight.right + sight.left) / 2, sight.field / 4
        if index in split:
            wanted += [(index, middle + quarter, 2 * quarter), (index, middle - quarter, 2 * quarter)]
        else:
            yaw = middle if sight.field > WIDE_RAD else sight.yaw
            wanted.append((index, yaw, sight.field))
    if not wanted:
        return []
    yaws = np.array([yaw for _, yaw, _ in wanted])
    cost = np.square(wrap(yaws[:, None] - np.asarray(channel_yaws)))
    rows, columns = linear_sum_assignment(cost)
    return [
        Placement(wanted[row][0], int(channel), wanted[row][1], _model(int(channel), wanted[row][2], fields))
        for row, channel in zip(rows, columns, strict=True)
    ]


def _model(channel: int, field: float, fields: Sequence[float]) -> int:
    """Return the channel whose intrinsics fit a field of view: its own unless the field is much wider."""
    if field <= _WIDER * fields[channel]:
        return channel
    return int(np.argmin(np.abs(np.log(np.asarray(fields) / field))))


def same_yaw(sights: Sequence[Sight]) -> dict[int, int]:
    """Return the cameras that look where a wider (or equal, earlier) one looks: index of the camera -> that
    of the other."""
    order = sorted(range(len(sights)), key=lambda i: -round(sights[i].field, 3))
    kept: list[int] = []
    repeated: dict[int, int] = {}
    for index in order:
        twins = [k for k in kept if abs(wrap(sights[index].yaw - sights[k].yaw)) < SAME_YAW_RAD]
        if twins:
            repeated[index] = twins[0]
        else:
            kept.append(index)
    return repeated


def wrap(angle: np.ndarray | float) -> np.ndarray:  # type: ignore[type-arg]
    """Return angles in -pi..pi."""
    return np.asarray((np.asarray(angle) + np.pi) % (2 * np.pi) - np.pi)
