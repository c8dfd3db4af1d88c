# SPDX-License-Identifier: Apache-2.0
"""Point files of nuScenes: lidar sweeps (.pcd.bin) and radar sweeps (binary PCD 0.7)."""

from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ftkd_core.errors import UserError

_LIDAR: Final = np.dtype([(name, "<f4") for name in ("x", "y", "z", "intensity", "ring")])
_TYPES: Final = {"F": "f", "I": "i", "U": "u"}


class CloudFile(NamedTuple):
    """Points as a structured array (P,), one field per column."""

    points: NDArray[Any]


def read_lidar(path: Path) -> CloudFile:
    """Read a lidar sweep of five float32 per point. Raises UserError for a missing or cut-off file."""
    content = _read(path)
    if len(content) % _LIDAR.itemsize:
        raise UserError(f"{str(path)!r} has {len(content)} bytes; expected a multiple of {_LIDAR.itemsize}")
    return CloudFile(np.frombuffer(content, dtype=_LIDAR))


def read_radar(path: Path) -> CloudFile:
    """Read a radar sweep in binary PCD. Raises UserError for a missing file and for another format."""
    content = _read(path)
    head, separator, data = content.partition(b"DATA binary\n")
    lines = dict(
        line.split(" ", 1) for line in head.decode("ascii", "replace").splitlines() if " " in line.strip()
    )
    try:
        names, sizes, kinds = (lines[key].split() for key in ("FIELDS", "SIZE", "TYPE"))
        layout = np.dtype(
            [(name, f"<{_TYPES[kind]}{size}") for name, size, kind in zip(names, sizes, kinds, strict=True)]
        )
        count = int(lines["POINTS"])
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(f"{str(path)!r} is no PCD file ({type(error).__name__}: {error})") from error
    if not separator or len(data) < count * layout.itemsize:
        raise UserError(f"{str(path)!r} is cut off; expected {count} points of {layout.itemsize} bytes")
    return CloudFile(np.frombuffer(data, dtype=layout, count=count))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{str(path)!r} cannot be read ({error.strerror})") from error
