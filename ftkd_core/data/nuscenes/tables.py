# SPDX-License-Identifier: Apache-2.0
"""Tables of a nuScenes data set: open them, select scenes and key frames, look up poses."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from nuscenes import NuScenes as NuScenes  # noqa: PLC0414  (re-exported: the devkit is imported in few places)
from nuscenes.utils.splits import get_scenes_of_split

from ftkd_core.errors import UserError
from ftkd_core.geometry import make_transform

LIDAR_CHANNEL: Final = "LIDAR_TOP"
TABLE_NAMES: Final[tuple[str, ...]] = (
    "attribute", "calibrated_sensor", "category", "ego_pose", "instance", "log", "map", "sample",
    "sample_annotation", "sample_data", "scene", "sensor", "visibility",
)  # fmt: skip
_NAMES_IN_ERRORS: Final = 12


def find_tables(dataroot: str | Path, version: str) -> Path:
    """Return the folder of a data set's tables. Raises UserError if the folder, the version or a table is
    missing."""
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
    if missing:
        raise UserError(
            f"data set {str(root / version)!r} lacks the tables "
            f"{list_names(f'{name}.json' for name in missing)}"
        )
    return root / version


def open_dataset(dataroot: str | Path, version: str) -> NuScenes:
    """Load the tables of a data set. Raises UserError if the folder, the version or a table cannot be
    used."""
    root = find_tables(dataroot, version).parent
    try:
        return NuScenes(version=version, dataroot=str(root), verbose=False)
    except json.JSONDecodeError as error:
        raise UserError(
            f"a table of data set {str(root / version)!r} is not valid JSON ({error}); copy it again"
        ) from error
    except (AssertionError, KeyError, IndexError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(
            f"data set {str(root / version)!r} is incomplete or damaged ({reason}); copy it again"
        ) from error


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
    token = str(_scene_record(dataset, scene_name)["first_sample_token"])
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
    """Return global_from_ego (4, 4) of a key frame: the ego pose of its LIDAR_TOP. Raises UserError if it has
    none."""
    data = sample_record(dataset, sample_token)["data"]
    if LIDAR_CHANNEL not in data:
        raise UserError(f"sample {sample_token} has no {LIDAR_CHANNEL}, only {list_names(sorted(data))}")
    return pose_of(dataset.get("ego_pose", dataset.get("sample_data", data[LIDAR_CHANNEL])["ego_pose_token"]))


def _scene_record(dataset: NuScenes, scene_name: str) -> dict[str, Any]:
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
