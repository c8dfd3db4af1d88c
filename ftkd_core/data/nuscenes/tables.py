# SPDX-License-Identifier: Apache-2.0
"""Tables of a nuScenes data set: open them, select scenes and key frames, look up poses."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from nuscenes import NuScenes as NuScenes  # noqa: PLC0414  (re-exported: the devkit is imported in few places)
from nuscenes.utils.map_mask import MapMask
from nuscenes.utils.splits import get_scenes_of_split

from ftkd_core.data.nuscenes.categories import read_category_map, rename_categories
from ftkd_core.data.nuscenes.table_checks import Row, check_tables, read_table
from ftkd_core.errors import UserError
from ftkd_core.geometry import make_transform

LIDAR_CHANNEL: Final = "LIDAR_TOP"
TABLE_NAMES: Final[tuple[str, ...]] = (
    "attribute", "calibrated_sensor", "category", "ego_pose", "instance", "log", "map", "sample",
    "sample_annotation", "sample_data", "scene", "sensor", "visibility",
)  # fmt: skip
_TRUTH_TABLES: Final = ("sample_annotation", "instance", "category", "attribute", "visibility", "map")
"""Tables that a data set without ground truth may lack."""
_NAMES_IN_ERRORS: Final = 12


def find_tables(dataroot: str | Path, version: str) -> Path:
    """Return the folder of a data set's tables. Raises UserError if the folder, the version or a required
    table is missing.

    `map` is optional. Without `sample_annotation` and `instance` a data set has no ground truth; `category`,
    `attribute` and `visibility` are then optional too.
    """
    root = Path(dataroot).expanduser()
    if not root.is_dir():
        raise UserError(
            f"data set folder {str(root)!r} does not exist; "
            f"give the folder that holds samples/ and {version}/"
        )
    versions = sorted(path.parent.name for path in root.glob("*/sample.json"))
    if version not in versions:
        found = f"has {list_names(versions)}" if versions else "holds no nuScenes version (no */sample.json)"
        raise UserError(f"version {version!r} not found: data set folder {str(root)!r} {found}")
    missing = [name for name in TABLE_NAMES if not (root / version / f"{name}.json").is_file()]
    without_truth = {"sample_annotation", "instance"} <= set(missing)
    lacking = [name for name in missing if name not in (_TRUTH_TABLES if without_truth else ("map",))]
    if lacking:
        raise UserError(
            f"data set {str(root / version)!r} lacks the tables "
            f"{list_names(f'{name}.json' for name in lacking)}"
        )
    return root / version


def open_dataset(
    dataroot: str | Path, version: str, category_map: Mapping[str, str] | None = None
) -> "Dataset":
    """Load and check the tables of a data set; maps are optional.

    category_map: detection class by category name ("" leaves the category out), for data sets with their own
    categories; default: `category_map.json` next to the tables, if there is one. Raises UserError with table
    and row if something cannot be used.
    """
    folder = find_tables(dataroot, version)
    try:
        return Dataset(folder, read_category_map(folder) if category_map is None else category_map)
    except (AssertionError, KeyError, IndexError, TypeError, AttributeError, OSError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(
            f"data set {str(folder)!r} is incomplete or damaged ({reason}); copy it again"
        ) from error


class Dataset(NuScenes):  # type: ignore[misc]  # the devkit has no types
    """The devkit's tables, checked; notes: sentences on what was left out or assumed."""

    def __init__(self, folder: Path, category_map: Mapping[str, str]) -> None:
        self.notes: list[str] = []
        self._folder = folder
        self._category_map = category_map
        self._maps: list[Row] = []
        super().__init__(version=folder.name, dataroot=str(folder.parent), verbose=False)

    @property
    def has_ground_truth(self) -> bool:
        """Whether the data set has any annotation; v1.0-test has none."""
        return bool(self.sample_annotation)

    def __load_table__(self, table_name: str) -> list[Row]:
        path = self._folder / f"{table_name}.json"
        if not path.is_file() and table_name in _TRUTH_TABLES:
            return []
        rows = read_table(path)
        if table_name == "map":
            self._maps, rows = rows, []  # the devkit opens each map; see __make_reverse_index__
        return rows

    def __make_reverse_index__(self, verbose: bool) -> None:
        if not self.sample or not self.scene:
            raise UserError(
                f"data set {str(self._folder)!r} has no scene or no sample; copy its tables again"
            )
        self._complete_annotations()
        check_tables({name: getattr(self, name) for name in TABLE_NAMES})
        for table in (self.sample, self.sample_data):
            for row in table:
                row["timestamp"] = int(row["timestamp"])
        self.notes += rename_categories(
            self.category, self.instance, self.sample_annotation, self._category_map
        )
        self.map = self._usable_maps()
        super().__make_reverse_index__(verbose)

    def _complete_annotations(self) -> None:
        """Fill in the columns that other data sets omit; without point counts objects count as seen."""
        unseen = 0
        for row in self.sample_annotation:
            if "num_lidar_pts" not in row and "num_radar_pts" not in row:
                unseen += 1
                row["num_lidar_pts"] = 1
            for name, value in (("num_lidar_pts", 0), ("num_radar_pts", 0), ("visibility_token", "")):
                row.setdefault(name, value)
            row.setdefault("attribute_tokens", [])
        if unseen:
            self.notes.append(
                f"{unseen} annotations have neither num_lidar_pts nor num_radar_pts; "
                "they count as seen by one point"
            )

    def _usable_maps(self) -> list[Row]:
        """Return one row per map whose file exists, and one without a file for the logs without a map."""
        root = Path(self.dataroot)
        rows = [row for row in self._maps if (root / str(row.get("filename"))).is_file()]
        rows = [row for row in rows if isinstance(row.get("log_tokens"), list)]
        mapped = {token for row in rows for token in row["log_tokens"]}
        others = [row["token"] for row in self.log if row["token"] not in mapped]
        for row in rows:
            row["mask"] = MapMask(str(Path(self.dataroot, row["filename"])), resolution=0.1)
        if others:
            rows.append(
                {"token": "no map", "log_tokens": others, "filename": "", "category": "", "mask": None}
            )
        return rows


def scene_names(dataset: NuScenes) -> list[str]:
    """Return the names of all scenes in the order of the data set."""
    return [str(scene["name"]) for scene in dataset.scene]


def split_scenes(dataset: NuScenes, split: str) -> list[str]:
    """Return the names of the scenes of an official or custom (`splits.json`) split that this data set
    contains.

    Raises UserError for an unknown split or a split without a scene in this data set.
    """
    try:
        wanted = set(get_scenes_of_split(split, dataset))
    except (ValueError, AssertionError) as error:
        raise UserError(
            f"split {split!r} is neither an official nuScenes split nor one of "
            f"{list_names(_custom_splits(dataset))}, "
            f"the custom splits of data set {dataset.dataroot!r} {dataset.version}"
        ) from error
    names = [name for name in scene_names(dataset) if name in wanted]
    if not names:
        raise UserError(
            f"no scene of split {split!r} is in data set {dataset.dataroot!r} {dataset.version}, "
            f"which has {list_names(scene_names(dataset))}"
        )
    return names


def scene_samples(dataset: NuScenes, scene_name: str) -> list[str]:
    """Return the sample (key frame) tokens of a scene in time order. Raises UserError with the existing scene
    names."""
    token = str(scene_record(dataset, scene_name)["first_sample_token"])
    tokens = []
    while token:
        tokens.append(token)
        token = str(dataset.get("sample", token)["next"])
    return tokens


def sample_stamp_ns(dataset: NuScenes, sample_token: str) -> int:
    """Return the stamp of a key frame in nanoseconds: the end of its lidar sweep, the time of its
    annotations."""
    return int(sample_record(dataset, sample_token)["timestamp"]) * 1000


def sample_pose(dataset: NuScenes, sample_token: str) -> NDArray[np.float64]:
    """Return global_from_ego (4, 4) of a key frame: the ego pose of its LIDAR_TOP; without a lidar, that of
    the sensor nearest in time. Raises UserError if the key frame has no sensor data."""
    sample = sample_record(dataset, sample_token)
    data = sample["data"]
    if not data:
        raise UserError(f"sample {sample_token} has no sensor data; check that the data set is complete")
    rows = [dataset.get("sample_data", token) for token in data.values()]
    nearest = min(rows, key=lambda row: (abs(row["timestamp"] - sample["timestamp"]), row["channel"]))
    row = dataset.get("sample_data", data[LIDAR_CHANNEL]) if LIDAR_CHANNEL in data else nearest
    return pose_of(dataset.get("ego_pose", row["ego_pose_token"]))


def scene_record(dataset: NuScenes, scene_name: str) -> dict[str, Any]:
    for scene in dataset.scene:
        if scene["name"] == scene_name:
            record: dict[str, Any] = scene
            return record
    raise UserError(
        f"scene {scene_name!r} not found: data set {dataset.dataroot!r} {dataset.version} has "
        f"{list_names(scene_names(dataset))}"
    )


def sample_record(dataset: NuScenes, sample_token: str) -> dict[str, Any]:
    """Return the row of a key frame. Raises UserError for an unknown token."""
    try:
        record: dict[str, Any] = dataset.get("sample", sample_token)
    except KeyError as error:
        raise UserError(
            f"sample {sample_token!r} is not in data set {dataset.dataroot!r} {dataset.version}; "
            "check that the token belongs to this data set and version"
        ) from error
    return record


def pose_of(record: dict[str, Any]) -> NDArray[np.float64]:
    """Return the transform (4, 4) of a row with `rotation` and `translation`."""
    pose: NDArray[np.float64] = make_transform(record["rotation"], record["translation"])
    return pose


def _custom_splits(dataset: NuScenes) -> list[str]:
    path = Path(dataset.table_root, "splits.json")
    return sorted(json.loads(path.read_text())) if path.is_file() else []


def list_names(names: Iterable[str]) -> str:
    """Join names for an error message; long lists are shortened."""
    listed = list(names)
    shown = ", ".join(listed[:_NAMES_IN_ERRORS])
    return (
        f"{shown} and {len(listed) - _NAMES_IN_ERRORS} more"
        if len(listed) > _NAMES_IN_ERRORS
        else shown or "none"
    )
