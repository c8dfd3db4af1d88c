# SPDX-License-Identifier: Apache-2.0
"""Clips of a real nuScenes data set, for training: geometry and truth are indexed once, images are read when
they are used.

The devkit's tables take gigabytes and minutes to load, so what training needs of a scene is written to a
small file, and training processes open only those. Symbols: T key frames, N cameras, H/W network size, M
objects of all frames.
"""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from ftkd_core.config import ImageConfig
from ftkd_core.data.clips import Clip, ClipObjects
from ftkd_core.data.nuscenes import (
    TABLE_NAMES,
    NuScenes,
    camera_records,
    find_tables,
    ground_truth,
    open_dataset,
    read_image,
    sample_pose,
    sample_stamp_ns,
    scene_samples,
    split_scenes,
)
from ftkd_core.errors import UserError
from ftkd_core.geometry import invert_rigid
from ftkd_core.runtime.preprocess import network_intrinsics, resize_and_crop, zoom_and_crop

_VISIBLE: Final = {"1": 0.2, "2": 0.5, "3": 0.7, "4": 0.9}
"""Middle of each of nuScenes' bins of visibility."""
_INDEX: Final = "nuscenes-index-3"
"""Raised with every change of what an index holds or is found by: 2 since that is the data set's content,
3 since it knows how wide images are."""
_READ_TABLES: Final = ("scene", "sample", "calibrated_sensor")
"""Some ten megabytes of all nuScenes; those that are not read have hundreds each, or say little."""


@dataclass(frozen=True)
class ImageFiles:
    """Images (T, N, H, W, 3) uint8 that are read from their files: `files[frame]` is (N, H, W, 3), RGB at the
    network's size. paths (T, N) below root, widths (N,) of the files' images. half_decode: where a file has
    at least twice the pixels a side that are drawn, only every second is decoded, which is faster; six real
    images then differ by 0.5 to 0.7 grey levels in the mean. The plain twin is without."""

    root: Path
    paths: NDArray[np.str_]
    widths: NDArray[np.int64]
    image: ImageConfig
    half_decode: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """As of an array of all images."""
        return (*self.paths.shape, self.image.height, self.image.width, 3)

    def __getitem__(self, frame: int) -> NDArray[np.uint8]:
        return np.stack([resize_and_crop(image, self.image) for image in self._read(frame, self.image.width)])

    def zoomed(self, frame: int, zoom: float, left: float) -> NDArray[np.uint8]:
        """The frame's images drawn `zoom` times as large, from the files, so that no detail is lost; as
        `preprocess.zoom_and_crop`."""
        images = self._read(frame, round(self.image.width * zoom))
        return np.stack([zoom_and_crop(image, self.image, zoom, left) for image in images])

    def _read(self, frame: int, drawn: int) -> Iterator[NDArray[np.uint8]]:
        """The files' images, to be drawn so wide."""
        for path, width in zip(self.paths[frame], self.widths, strict=True):
            yield read_image(self.root / path, half=self.half_decode and 2 * drawn <= width)


class NuScenesClips:
    """`clip = clips(index)` for the scenes of a split, in the data set's order; picklable and small.

    `prepare()` must have run once, in any process, for this cache folder. `name`, which also names what is
    derived from the clips, tells data sets of other content apart (`content_hash`), wherever they lie, and
    images that are read otherwise (half_decode, as `ImageFiles`). Errors: UserError where there is no such
    data set.
    """

    def __init__(
        self, dataroot: Path, version: str, split: str, image: ImageConfig, channels: tuple[str, ...],
        cache: Path, *, half_decode: bool = False,
    ) -> None:  # fmt: skip
        self.root, self.version, self.split = dataroot.expanduser().resolve(), version, split
        self.image, self.channels, self.half_decode = image, channels, half_decode
        tag = re.sub(r"\W+", "-", f"{self.root.name}-{version}-{split}")
        content = content_hash(self.root, version, channels)
        self.folder = cache / f"nuscenes-{tag}-{image.width}x{image.height}-{content}"
        self.name = f"{self.folder.name}-half" if half_decode else self.folder.name

    def __len__(self) -> int:
        return len(self._names())

    def prepare(self) -> None:
        """Index the scenes that are missing. UserError where the data set lacks what training needs."""
        names = self.folder / "scenes.txt"
        if names.exists() and all(self._file(name).exists() for name in self._names()):
            return
        dataset = open_dataset(self.root, self.version)
        wanted = split_scenes(dataset, self.split)
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in tqdm(wanted, desc="index nuScenes", unit="scene"):
            file = self._file(name)
            if not file.exists():
                partial = file.with_name(f"{file.name}.partial.npz")
                np.savez(partial, **index_scene(dataset, name, self.image, self.channels))
                partial.replace(file)
        names.write_text("\n".join(wanted) + "\n", encoding="utf-8")

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
        )

    def _file(self, scene: str) -> Path:
        return self.folder / f"{scene}.npz"

    def _names(self) -> list[str]:
        try:
            return (self.folder / "scenes.txt").read_text(encoding="utf-8").split()
        except OSError:
            raise UserError(f"{str(self.folder)!r} holds no index of nuScenes; prepare it first") from None


def content_hash(root: Path, version: str, channels: tuple[str, ...]) -> str:
    """Eight digits for what an index of these cameras depends on: scenes, samples and calibrations of the
    data set, the sizes of its other tables and the custom splits. The images themselves are not looked at.
    UserError where a table is missing."""
    tables = find_tables(root, version)
    digest = hashlib.sha256(f"{_INDEX}, {channels}".encode())
    for name in TABLE_NAMES:
        table = tables / f"{name}.json"
        digest.update(f"{name}: {table.stat().st_size}".encode())
        if name in _READ_TABLES:
            digest.update(table.read_bytes())
    splits = tables / "splits.json"
    digest.update(splits.read_bytes() if splits.is_file() else b"")
    return digest.hexdigest()[:8]


def index_scene(
    dataset: NuScenes, scene: str, image: ImageConfig, channels: tuple[str, ...]
) -> dict[str, NDArray[Any]]:
    """What training needs of a scene, as arrays: paths (T, N), widths (N,), intrinsics (N, 3, 3) of network
    images, ego_from_camera (T, N, 4, 4) with ego at the key frame's stamp and the camera at its exposure,
    global_from_ego (T, 4, 4), times (T,) seconds from the first, counts (T,), and of the M objects boxes in
    ego, labels, visible and num_points (lidar and radar).

    UserError where a camera lacks a key frame or changes its intrinsics.
    """
    tokens = scene_samples(dataset, scene)
    poses = np.stack([sample_pose(dataset, token) for token in tokens])
    records = []
    for channel in channels:
        by_sample = {r.sample_token: r for r in camera_records(dataset, scene, channel, keyframes_only=True)}
        missing = [token for token in tokens if token not in by_sample]
        if missing:
            raise UserError(
                f"scene {scene}: {channel} has no image of {len(missing)} of {len(tokens)} key frames; "
                "expected one each"
            )
        own = [by_sample[token] for token in tokens]
        if any(not np.allclose(r.intrinsics, own[0].intrinsics) for r in own):
            raise UserError(f"scene {scene}: the intrinsics of {channel} change; expected one camera matrix")
        records.append(own)
    frames = list(zip(*records, strict=True))  # (T, N)
    root = Path(dataset.dataroot).expanduser().resolve()
    stamps = np.array([sample_stamp_ns(dataset, token) for token in tokens])
    return {
        "paths": np.array([[r.path.resolve().relative_to(root).as_posix() for r in row] for row in frames]),
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
        found["visible"].append(np.array([_VISIBLE.get(row["visibility_token"], 0.9) for row in own]))
        found["num_points"].append(
            np.array([row["num_lidar_pts"] + row["num_radar_pts"] for row in own], dtype=np.int64)
        )
        counts.append(len(own))
    return {name: np.concatenate(parts) for name, parts in found.items()} | {"counts": np.array(counts)}
