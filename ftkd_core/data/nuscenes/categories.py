# SPDX-License-Identifier: Apache-2.0
"""Categories of a data set as the ten detection classes, for data sets with categories of their own."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from nuscenes.eval.detection.utils import category_to_detection_name

from ftkd_core.classes import CLASS_NAMES
from ftkd_core.data.nuscenes.table_checks import Row
from ftkd_core.errors import UserError

CATEGORY_MAP_NAME: Final = "category_map.json"
"""File next to the tables: detection class by category name."""
_OFFICIAL_CATEGORY: Final[dict[str, str]] = {
    "car": "vehicle.car",
    "truck": "vehicle.truck",
    "construction_vehicle": "vehicle.construction",
    "bus": "vehicle.bus.rigid",
    "trailer": "vehicle.trailer",
    "barrier": "movable_object.barrier",
    "motorcycle": "vehicle.motorcycle",
    "bicycle": "vehicle.bicycle",
    "pedestrian": "human.pedestrian.adult",
    "traffic_cone": "movable_object.trafficcone",
}
_OFFICIALLY_IGNORED: Final = frozenset(
    (
        "animal", "human.pedestrian.personal_mobility", "human.pedestrian.stroller",
        "human.pedestrian.wheelchair", "movable_object.debris", "movable_object.pushable_pullable",
        "static_object.bicycle_rack", "vehicle.emergency.ambulance", "vehicle.emergency.police",
    )
)  # fmt: skip
"""nuScenes categories that the detection task leaves out."""
_SHOWN: Final = 8


def read_category_map(folder: Path) -> dict[str, str]:
    """Return the category map next to the tables, empty if there is none."""
    path = folder / CATEGORY_MAP_NAME
    return parse_category_map([str(path)]) if path.is_file() else {}


def parse_category_map(entries: Sequence[str]) -> dict[str, str]:
    """Return detection class by category name from entries NAME=CLASS and JSON files.

    An empty class leaves the category out. Raises UserError for an unknown class or an unusable file.
    """
    found: dict[str, str] = {}
    for entry in entries:
        name, separator, detection_class = entry.rpartition("=")
        found |= {name: detection_class} if separator else _read_file(Path(entry))
    for name, detection_class in found.items():
        if detection_class not in ("", *CLASS_NAMES):
            raise UserError(
                f"category map: {name!r} is mapped to {detection_class!r}; "
                f"expected one of {', '.join(CLASS_NAMES)}, or nothing to leave it out"
            )
    return found


def _read_file(path: Path) -> dict[str, str]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"category map {str(path)!r} cannot be read ({error}); expected NAME=CLASS or a JSON file "
            'such as {"van": "car"}'
        ) from error
    if not isinstance(content, dict) or not all(isinstance(value, str) for value in content.values()):
        raise UserError(f'category map {str(path)!r}: expected a dictionary such as {{"van": "car"}}')
    return content


def rename_categories(
    categories: Sequence[Row],
    instances: Sequence[Row],
    annotations: Sequence[Row],
    category_map: Mapping[str, str],
) -> list[str]:
    """Give each mapped category the nuScenes name of its class, so that the devkit scores it.

    A category that is named like a detection class needs no entry in the map. Returns notes on annotations
    that are left out although their category is none of nuScenes. Raises UserError for a map that names a
    category which the data set lacks.
    """
    names = {row["name"] for row in categories}
    unknown = [name for name in category_map if name not in names]
    if unknown:
        raise UserError(
            f"category map: the data set has no category {unknown[0]!r}; it has {', '.join(sorted(names))}"
        )
    left_out: dict[str, str] = {}
    for row in categories:
        name = row["name"]
        own = category_map.get(name, name if name in CLASS_NAMES else None)
        if own:
            row["name"] = _OFFICIAL_CATEGORY[own]
        elif own is None and name not in _OFFICIALLY_IGNORED and category_to_detection_name(name) is None:
            left_out[row["token"]] = name
        elif own == "":
            row["name"] = f"left out: {name}"
    return _notes(left_out, instances, annotations)


def _notes(left_out: Mapping[str, str], instances: Sequence[Row], annotations: Sequence[Row]) -> list[str]:
    name_of = {
        row["token"]: left_out[row["category_token"]]
        for row in instances
        if row["category_token"] in left_out
    }
    counts = Counter(
        name_of[row["instance_token"]] for row in annotations if row["instance_token"] in name_of
    )
    if not counts:
        return []
    shown = ", ".join(f"{name} ({count})" for name, count in counts.most_common(_SHOWN))
    more = f" and {len(counts) - _SHOWN} more" if len(counts) > _SHOWN else ""
    note = (
        f"{sum(counts.values())} of {len(annotations)} annotations are left out, because their category is "
        f"none of the detection classes: {shown}{more}; map them with --category-map NAME=CLASS or with "
        f"{CATEGORY_MAP_NAME} next to the tables"
    )
    return [note]
