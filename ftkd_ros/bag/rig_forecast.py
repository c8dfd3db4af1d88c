# SPDX-License-Identifier: Apache-2.0
"""Share of the trained rig's mAP that another rig may expect, interpolated in a table of `benchmarks.rigs`.

What a virtual camera does not correct is the height of a camera and what it does not see. The table has both,
each for all cameras of a rig at once, on the synthetic world: rows "height +0.6 m" and "focal length x 1.25",
whose images are enlarged, so that a part of the virtual image is missing.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from ftkd_core.canonical_cameras import CanonicalCamera
from ftkd_core.config import ImageConfig
from ftkd_core.errors import UserError
from ftkd_core.runtime.virtual_camera import VirtualCameras
from ftkd_core.types import CameraRound, CameraView
from ftkd_core.weights import weights_hash

_HEIGHT: Final = re.compile(r"^height ([+-][\d.]+) m$")
_FOCAL: Final = re.compile(r"^focal length x ([\d.]+)$")
_FOLDER: Final = "benchmarks/results"
_PATTERN: Final = "rigs_*.json"


@dataclass(frozen=True)
class RigForecast:
    """Measured shares of mAP by height difference (m) and by visible part of the virtual cameras (0 to 1),
    ascending."""

    heights: tuple[tuple[float, float], ...]
    visible: tuple[tuple[float, float], ...]

    def share(self, height_m: float, visible: float) -> tuple[float, bool]:
        """Return the expected share for cameras at this height difference that see this part of their virtual
        images, and whether it lies within what was measured (else it is that of the nearest measured rig)."""
        factors, inside = [], True
        for rows, value in ((self.heights, height_m), (self.visible, visible)):
            places, shares = zip(*rows, strict=True)
            factors.append(float(np.interp(value, places, shares)))
            inside = inside and places[0] - 1e-9 <= value <= places[-1] + 1e-9
        return min(1.0, factors[0]) * min(1.0, factors[1]), inside


def read_forecast(
    weights: Path, canonical: Sequence[CanonicalCamera], image: ImageConfig, table: Path | None = None
) -> RigForecast | None:
    """Return the forecast for a weights file; None without a table of these weights. `table`: a file of
    `benchmarks.rigs` (default: the shipped tables). Raises UserError for a table that cannot be read."""
    tables = [table] if table is not None else _shipped_tables()
    digest = weights_hash(weights)
    for path in tables:
        rows = [row for row in _read_rows(path) if _belongs(row, weights.name, digest)]
        forecast = _forecast(rows, canonical, image)
        if forecast is not None:
            return forecast
    return None


def _shipped_tables() -> list[Path]:
    """Return the committed tables, from the repository or the installed package."""
    found = sorted((Path(__file__).resolve().parents[2] / _FOLDER).glob(_PATTERN))
    if found:
        return found
    try:
        from ament_index_python.packages import PackageNotFoundError, get_package_share_directory
    except ImportError:
        return []
    try:
        return sorted(Path(get_package_share_directory("ftkd_ros"), _FOLDER).glob(_PATTERN))
    except PackageNotFoundError:
        return []


def _read_rows(path: Path) -> list[dict[str, Any]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        return [
            row for row in rows if row["camera_model"] == "virtual" and float(row["share_of_trained"]) >= 0
        ]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"rig table {str(path)!r} cannot be read ({error}); write it with benchmarks.rigs"
        ) from None


def _belongs(row: dict[str, Any], name: str, digest: str) -> bool:
    """Return whether a row was measured with a weights file; older rows have only its name."""
    return bool(row["weights_hash"] == digest if "weights_hash" in row else row["weights"] == name)


def _forecast(
    rows: Sequence[dict[str, Any]], canonical: Sequence[CanonicalCamera], image: ImageConfig
) -> RigForecast | None:
    heights, visible = [(0.0, 1.0)], [(1.0, 1.0)]
    for row in rows:
        share = float(row["share_of_trained"])
        if match := _HEIGHT.match(row["rig"]):
            heights.append((float(match[1]), share))
        elif (match := _FOCAL.match(row["rig"])) and float(match[1]) > 1:
            visible.append((_visible_part(canonical, image, float(match[1])), share))
    if len(heights) == 1 or len(visible) == 1:
        return None
    return RigForecast(tuple(sorted(heights)), tuple(sorted(visible)))


def _visible_part(canonical: Sequence[CanonicalCamera], image: ImageConfig, factor: float) -> float:
    """Return the mean visible part of the virtual cameras if all focal lengths are `factor` times as long."""
    cameras = VirtualCameras(
        canonical, image, [camera.channel for camera in canonical], "virtual", log_decisions=False
    )
    views = tuple(
        CameraView(
            image=np.zeros((camera.height, camera.width, 3), dtype=np.uint8),
            intrinsics=camera.intrinsics * np.array([[factor, 1, 1], [1, factor, 1], [1, 1, 1]]),
            ego_from_camera=camera.ego_from_camera, global_from_ego=np.eye(4), stamp_ns=0,
        )
        for camera in canonical
    )  # fmt: skip
    cameras.see(CameraRound(views=views, reference_stamp_ns=0, global_from_ego=np.eye(4)))
    return float(np.mean([seen.share for seen in cameras.seen]))
