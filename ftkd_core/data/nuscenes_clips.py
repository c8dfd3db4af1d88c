# SPDX-License-Identifier: Apache-2.0
"""Clips of a nuScenes data set for training: geometry and ground truth are indexed once, images are read on
use.

The devkit needs minutes and gigabytes to load its tables. The data that training needs is therefore written
to one small file per scene, and training processes read only those files. Symbols: T key frames, N cameras,
H/W network size, M objects of all frames.
"""

import hashlib
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from ftkd_core.config import ImageConfig
from ftkd_core.data.clips import Clip
from ftkd_core.data.nuscenes import (
    CATEGORY_MAP_NAME,
    TABLE_NAMES,
    CameraRecord,
    NuScenes,
    camera_records,
    faults_text,
    find_faults,
    find_tables,
    ground_truth,
    open_dataset,
    read_image,
    sample_pose,
    sample_stamp_ns,
    scene_samples,
    split_scenes,
    sweep_rounds,
)
from ftkd_core.data.targets import ClipObjects
from ftkd_core.errors import UserError
from ftkd_core.geometry import invert_rigid
from ftkd_core.runtime.preprocess import network_intrinsics, resize_and_crop, zoom_and_crop

_VISIBILITY_FRACTION: Final = {"1": 0.2, "2": 0.5, "3": 0.7, "4": 0.9}
"""Centre of each nuScenes visibility bin."""
_INDEX: Final = "nuscenes-index-4"
"""Format version of the index files; raise it with each change of their content or of the hash."""
_NOTES: Final = "notes.txt"
"""File of the index with sentences on annotations that were left out."""
_PER_ROUND: Final = ("paths", "ego_from_camera", "global_from_ego", "times")
"""Arrays of an index with one row per frame."""
_HASHED_TABLES: Final = ("scene", "sample", "calibrated_sensor")
"""Tables whose content enters the hash, about ten megabytes for all of nuScenes; of the other, larger tables
only the size is used."""


@dataclass(frozen=True)
class ImageFiles:
    """Images (T, N, H, W, 3) uint8 read from files; `files[frame]` is (N, H, W, 3), RGB at the network's
    size.

    paths (T, N) relative to root; widths (N,) of the image files. half_decode: decode at half resolution if
    the file has at least twice the needed width and height, which is faster; on six real images the mean
    difference is 0.5 to 0.7 grey levels. The plain twin decodes at full resolution.
    """

    root: Path
    paths: NDArray[np.str_]
    widths: NDArray[np.int64]
    image: ImageConfig
    half_decode: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape (T, N, H, W, 3)."""
        return (*self.paths.shape, self.image.height, self.image.width, 3)

    def __getitem__(self, frame: int) -> NDArray[np.uint8]:
        return np.stack([resize_and_crop(image, self.image) for image in self._read(frame, self.image.width)])

    def zoomed(self, frame: int, zoom: float, left: float) -> NDArray[np.uint8]:
        """Read the images of a frame and zoom from full resolution, as in `preprocess.zoom_and_crop`."""
        images = self._read(frame, round(self.image.width * zoom))
        return np.stack([zoom_and_crop(image, self.image, zoom, left) for image in images])

    def _read(self, frame: int, drawn: int) -> Iterator[NDArray[np.uint8]]:
        """Read the images of a frame; `drawn` is the width at which they are used."""
        for path, width in zip(self.paths[frame], self.widths, strict=True):
            yield read_image(self.root / path, half=self.half_decode and 2 * drawn <= width)


class NuScenesClips:
    """Clips of the scenes of a split, in the order of the data set; picklable and small.

    With `sweeps`, the frames of a clip are all complete camera rounds (12 Hz), and `Clip.keys` are its key
    frames. Call `prepare()` once, in any process, for each cache folder. `name` identifies the clips in
    caches derived from them: it changes with the content of the data set (`content_hash`), with sweeps and
    with half_decode (see `ImageFiles`), but not with its location. UserError if the data set does not exist.
    """

    def __init__(
        self, dataroot: Path, version: str, split: str, image: ImageConfig, channels: tuple[str, ...],
        cache: Path, *, half_decode: bool = False, sweeps: bool = False,
    ) -> None:  # fmt: skip
        self.root, self.version, self.split = dataroot.expanduser().resolve(), version, split
        self.image, self.channels, self.half_decode, self.sweeps = image, channels, half_decode, sweeps
        tag = re.sub(r"\W+", "-", f"{self.root.name}-{version}-{split}")
        content = content_hash(self.root, version, channels)
        frames = "-sweeps" if sweeps else ""
        self.folder = cache / f"nuscenes-{tag}{frames}-{image.width}x{image.height}-{content}"
        self.name = f"{self.folder.name}-half" if half_decode else self.folder.name

    def __len__(self) -> int:
        return len(self._names())

    def prepare(self) -> None:
        """Index the scenes that are missing from the cache and check images and annotations.

        Notes on what was left out go to stderr. Raises UserError if the data set lacks required data: for
        images that are missing or cut off, by name, and if no annotation is of a detection class.
        """
        names = self.folder / "scenes.txt"
        if not (names.exists() and all(self._file(name).exists() for name in self._names())):
            self._index()
        for note in (self.folder / _NOTES).read_text(encoding="utf-8").splitlines():
            print(f"note: {note}", file=sys.stderr)
        self._check()

    def _index(self) -> None:
        dataset = open_dataset(self.root, self.version)
        wanted = split_scenes(dataset, self.split)
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in tqdm(wanted, desc="index nuScenes", unit="scene"):
            file = self._file(name)
            if not file.exists():
                partial = file.with_name(f"{file.name}.partial.npz")
                index = index_sweeps if self.sweeps else index_scene
                np.savez(partial, **index(dataset, name, self.image, self.channels))
                partial.replace(file)
        for name, lines in ((_NOTES, dataset.notes), ("scenes.txt", wanted)):
            partial = self.folder / f"{name}.partial"
            partial.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
            partial.replace(self.folder / name)

    def _check(self) -> None:
        """Raise UserError for unusable images or a split without objects. The content of the images is
        checked once, their existence each time."""
        objects, paths = 0, []
        for name in self._names():
            with np.load(self._file(name), allow_pickle=False) as found:
                objects += int(found["counts"].sum())
                paths += [str(path) for path in found["paths"].ravel()]
        checked = self.folder / "images_checked"
        faults = find_faults(self.root, paths, existence_only=checked.exists())
        if faults:
            raise UserError(
                f"data set {str(self.root)!r}: {faults_text(faults, len(paths))}; copy them again, or train "
                "on a split of complete scenes (`ftkd check-data` lists all)"
            )
        checked.touch()
        if not objects:
            raise UserError(
                f"split {self.split!r} of data set {str(self.root)!r} has no object of a detection class; "
                "there is nothing to learn (are its categories mapped? see category_map.json)"
            )

    def __call__(self, index: int) -> Clip:
        name = self._names()[index]
        with np.load(self._file(name), allow_pickle=False) as found:
            values = {key: found[key] for key in found.files}
        splits = np.cumsum(values["counts"])[:-1]
        columns = [np.split(values[key], splits) for key in ("boxes", "labels", "visible", "num_points")]
        objects = tuple(
            ClipObjects(boxes=boxes, labels=labels, visible=visible, num_points=points)
            for boxes, labels, visible, points in zip(*columns, strict=True)
        )
        return Clip(
            name=name,
            images=ImageFiles(self.root, values["paths"], values["widths"], self.image, self.half_decode),
            intrinsics=values["intrinsics"],
            ego_from_camera=values["ego_from_camera"],
            global_from_ego=values["global_from_ego"],
            times=values["times"],
            objects=objects,
            keys=values.get("keys"),
        )

    def _file(self, scene: str) -> Path:
        return self.folder / f"{scene}.npz"

    def _names(self) -> list[str]:
        try:
            return (self.folder / "scenes.txt").read_text(encoding="utf-8").split()
        except OSError:
            raise UserError(
                f"{str(self.folder)!r} holds no index of nuScenes; call prepare() first"
            ) from None


def content_hash(root: Path, version: str, channels: tuple[str, ...]) -> str:
    """Return eight hexadecimal digits that identify the data an index of these cameras depends on: scenes,
    samples and calibrations, the sizes of the other tables, and the custom splits. Image files do not enter
    the hash. UserError if a table is missing."""
    tables = find_tables(root, version)
    digest = hashlib.sha256(f"{_INDEX}, {channels}".encode())
    for name in TABLE_NAMES:
        table = tables / f"{name}.json"
        if not table.is_file():
            continue
        digest.update(f"{name}: {table.stat().st_size}".encode())
        if name in _HASHED_TABLES:
            digest.update(table.read_bytes())
    for name in ("splits.json", CATEGORY_MAP_NAME):
        digest.update((tables / name).read_bytes() if (tables / name).is_file() else b"")
    return digest.hexdigest()[:8]


def index_scene(
    dataset: NuScenes, scene: str, image: ImageConfig, channels: tuple[str, ...]
) -> dict[str, NDArray[Any]]:
    """Index a scene as arrays.

    paths (T, N); widths (N,); intrinsics (N, 3, 3) of network images; ego_from_camera (T, N, 4, 4) from the
    camera at its exposure to ego at the key frame's stamp; global_from_ego (T, 4, 4); times (T,) seconds from
    the first key frame; counts (T,) of objects; for all M objects boxes in ego, labels, visible and
    num_points (lidar and radar).

    UserError if a camera lacks a key frame or changes its intrinsics.
    """
    tokens = scene_samples(dataset, scene)
    poses = np.stack([sample_pose(dataset, token) for token in tokens])
    frames = _key_frame_records(dataset, scene, tokens, channels)
    stamps = np.array([sample_stamp_ns(dataset, token) for token in tokens])
    return {
        "paths": np.array([[_relative(dataset, record) for record in row] for row in frames]),
        "widths": np.array([r.width for r in frames[0]]),
        "intrinsics": np.stack(
            [network_intrinsics(r.intrinsics, image, r.width, r.height) for r in frames[0]]
        ),
        "ego_from_camera": np.stack(
            [
                [invert_rigid(pose) @ r.global_from_ego @ r.ego_from_camera for r in row]
                for pose, row in zip(poses, frames, strict=True)
            ]
        ),
        "global_from_ego": poses,
        "times": (stamps - stamps[0]) * 1e-9,
        **_objects(dataset, tokens),
    }


def index_sweeps(
    dataset: NuScenes, scene: str, image: ImageConfig, channels: tuple[str, ...]
) -> dict[str, NDArray[Any]]:
    """Index all complete camera rounds of a scene as arrays, as `index_scene` does for key frames; keys are
    the indices of the key frames.

    The ego frame of another round is that of its newest exposure. UserError as `index_scene`, and if a scene
    has no images between its key frames.
    """
    found = index_scene(dataset, scene, image, channels)
    tokens, keys = scene_samples(dataset, scene), found["paths"].shape[0]
    start_ns = sample_stamp_ns(dataset, tokens[0])
    columns: dict[str, list[Any]] = {name: list(found[name]) for name in _PER_ROUND}
    for sweep in sweep_rounds(dataset, scene, channels):
        records = [record for record in sweep.records if record is not None]
        if len(records) < len(channels) or any(record.is_key_frame for record in records):
            continue
        newest = max(records, key=lambda record: record.stamp_ns)
        columns["times"].append((newest.stamp_ns - start_ns) * 1e-9)
        columns["global_from_ego"].append(newest.global_from_ego)
        columns["paths"].append([_relative(dataset, record) for record in records])
        columns["ego_from_camera"].append(
            [invert_rigid(newest.global_from_ego) @ r.global_from_ego @ r.ego_from_camera for r in records]
        )
    if len(columns["times"]) == keys:
        raise UserError(
            f"scene {scene}: no images between its {keys} key frames; copy the folder sweeps, or set "
            "data.sweeps=[0, 0] to train on key frames"
        )
    order = np.argsort(np.array(columns["times"]), kind="stable")
    counts = np.zeros(len(order), dtype=np.int64)
    counts[:keys] = found["counts"]
    rounds = {name: np.array(values)[order] for name, values in columns.items()}
    return {**found, **rounds, "counts": counts[order], "keys": np.flatnonzero(order < keys)}


def _relative(dataset: NuScenes, record: CameraRecord) -> str:
    """Return the path of an image in the data set, whose folders may be links to other disks."""
    return record.path.relative_to(Path(dataset.dataroot)).as_posix()


def _key_frame_records(
    dataset: NuScenes, scene: str, tokens: list[str], channels: tuple[str, ...]
) -> list[tuple[CameraRecord, ...]]:
    """Return the records (T, N) of all cameras at all key frames; UserError as in `index_scene`."""
    records = []
    for channel in channels:
        by_sample = {r.sample_token: r for r in camera_records(dataset, scene, channel, keyframes_only=True)}
        missing = [token for token in tokens if token not in by_sample]
        if missing:
            raise UserError(
                f"scene {scene}: {channel} has no image of {len(missing)} of {len(tokens)} key frames; "
                "expected one image per key frame"
            )
        own = [by_sample[token] for token in tokens]
        if any(not np.allclose(r.intrinsics, own[0].intrinsics) for r in own):
            raise UserError(f"scene {scene}: the intrinsics of {channel} change; expected one camera matrix")
        records.append(own)
    return list(zip(*records, strict=True))


def _objects(dataset: NuScenes, tokens: list[str]) -> dict[str, NDArray[Any]]:
    found: dict[str, list[NDArray[Any]]] = {"boxes": [], "labels": [], "visible": [], "num_points": []}
    counts = []
    for token in tokens:
        objects = ground_truth(dataset, token)
        annotations = {
            row["instance_token"]: row
            for row in (dataset.get("sample_annotation", a) for a in dataset.get("sample", token)["anns"])
        }
        own = [annotations[instance] for instance in objects.ids]
        found["boxes"].append(objects.boxes)
        found["labels"].append(objects.labels)
        found["visible"].append(
            np.array([_VISIBILITY_FRACTION.get(row["visibility_token"], 0.9) for row in own])
        )
        found["num_points"].append(
            np.array([row["num_lidar_pts"] + row["num_radar_pts"] for row in own], dtype=np.int64)
        )
        counts.append(len(own))
    return {name: np.concatenate(parts) for name, parts in found.items()} | {"counts": np.array(counts)}
