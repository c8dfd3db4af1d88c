# SPDX-License-Identifier: Apache-2.0
"""Bags -> a data set in the nuScenes layout, to label, train and score a user's own drives.

A bag becomes a scene: images unchanged (raw messages as PNG; distorted images are rectified to a pinhole with
the same focal length), calibration and ego pose of each exposure, and objects as annotations: the ground
truth of the bag, or detections as pre-labels. Stamps are rounded to microseconds.
"""

import shutil
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import cv2
import numpy as np
from numpy.typing import NDArray

from ftkd_core.errors import UserError
from ftkd_core.lens import Lens, project_pixels
from ftkd_core.types import ObjectList
from ftkd_ros.bag.detect import DETECTIONS_TOPIC, VELOCITIES_TOPIC
from ftkd_ros.bag.export_objects import SceneObjects, add_annotations, read_facts
from ftkd_ros.bag.io import BagReader, check_new
from ftkd_ros.bag.nuscenes_rows import NuscenesRows, Row, link, to_us, token_of
from ftkd_ros.bag.replay_rounds import Drive, KeyFrame, fault_kind, nearest, read_key_frames, read_objects
from ftkd_ros.convert.calibration import CameraGeometry
from ftkd_ros.convert.images import byte_view, image_to_rgb
from ftkd_ros.node.parameters import DetectorParameters
from ftkd_ros.sync.matcher import MatchedRound

DEFAULT_VERSION: Final = "v1.0-bag"
DEFAULT_SPLIT: Final = "exported"
LIDAR_FRAME: Final = "lidar_top"
_KEY_FRAME_WITHIN_NS: Final = 60_000_000
_JOIN_WITHIN_NS: Final = 25_000_000
_SUFFIXES: Final = {b"\xff\xd8\xff": "jpg", b"\x89PNG": "png"}

Matrix = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """key_interval_s: time between key frames of a bag without /sample_token; min_score: of detections that
    become annotations."""

    version: str = DEFAULT_VERSION
    split: str = DEFAULT_SPLIT
    key_interval_s: float = 0.5
    min_score: float = 0.3
    parameters: DetectorParameters = field(default_factory=DetectorParameters)

    def __post_init__(self) -> None:
        if self.key_interval_s <= 0 or not 0 <= self.min_score <= 1:
            raise UserError(
                f"key frame interval {self.key_interval_s:g} s, minimum score {self.min_score:g}; expected "
                "an interval above 0 and a score of 0 to 1"
            )
        if (
            not self.version
            or Path(self.version).name != self.version
            or self.version in ("samples", "sweeps")
        ):
            raise UserError(
                f"version {self.version!r} cannot name a folder of tables; try {DEFAULT_VERSION!r}"
            )


@dataclass
class ExportSummary:
    """What was written; faults: images that were left out, by reason."""

    output: Path
    scenes: list[str] = field(default_factory=list)
    key_frames: int = 0
    images: int = 0
    annotations: int = 0
    faults: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        return (
            f"{self.output}: {len(self.scenes)} scenes, {self.key_frames} key frames, {self.images} images, "
            f"{self.annotations} annotations"
        )


def export_bags(
    bags: Sequence[Path],
    output: Path,
    *,
    detections: Sequence[Path] = (),
    options: ExportOptions | None = None,
) -> ExportSummary:
    """Write bags as the scenes of a new data set; detections: none, or one bag of detections per bag.

    Raises UserError for a bag without usable images, transforms or key frames, and for an output that exists.
    A failed export leaves no folder.
    """
    options = options or ExportOptions()
    check_new(output)
    if detections and len(detections) != len(bags):
        raise UserError(
            f"{len(detections)} bags of detections for {len(bags)} bags; give one for each, or none"
        )
    partial = output.with_name(f".{output.name}-{uuid.uuid4().hex[:8]}")
    rows, summary = NuscenesRows(), ExportSummary(output)
    try:
        partial.mkdir(parents=True)
        for index, bag in enumerate(bags):
            found = detections[index] if detections else None
            _Scene(bag, found, partial, rows, summary, options).write()
        rows.write(partial / options.version, {options.split: summary.scenes})
        partial.rename(output)
    except OSError as error:
        raise UserError(f"output {str(output)!r} cannot be written ({error.strerror})") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return summary


@dataclass(frozen=True)
class _Image:
    """An image file to write and its geometry."""

    channel: str
    stamp_ns: int
    content: bytes
    suffix: str
    size: tuple[int, int]
    geometry: CameraGeometry


class _Scene:
    """One bag that is written as a scene."""

    def __init__(
        self,
        bag: Path,
        detections: Path | None,
        folder: Path,
        rows: NuscenesRows,
        summary: ExportSummary,
        options: ExportOptions,
    ) -> None:
        self._bag, self._detections, self._folder = bag, detections, folder
        self._rows, self._summary, self._options = rows, summary, options
        self._data: dict[str, list[Row]] = {}  # by channel

    def write(self) -> None:
        with BagReader(self._bag) as reader:
            drive = Drive(reader, self._options.parameters)
            self._facts = read_facts(reader)
            self._name = self._free_name(self._facts.scene.get("name") or self._bag.stem)
            stamps = drive.reference_stamps()
            keys = self._key_frames(reader, stamps)
            samples = self._add_samples(keys)
            round_key = _assign(stamps, keys)
            for number, matched in enumerate(drive.matched()):
                for image in self._images(drive, matched):
                    self._add_image(image, keys, round_key[number])
            if not any(self._data.values()):
                reason = next(iter(self._summary.faults), "no round")
                raise UserError(f"bag {str(self._bag)!r} has no usable image: {reason}")
            self._add_lidar_poses(drive, keys)
            for rows in self._data.values():
                rows.sort(key=lambda row: row["timestamp"])
                link(rows)
                self._rows.tables["sample_data"] += rows
            self._summary.annotations += add_annotations(
                self._rows, self._name, samples, self._objects(reader, drive, keys)
            )
        self._summary.scenes.append(self._name)
        self._summary.key_frames += len(keys)

    def _free_name(self, name: str) -> str:
        taken = self._summary.scenes
        return name if name not in taken else f"{name}-{sum(other.startswith(name) for other in taken) + 1}"

    def _key_frames(self, reader: BagReader, stamps: Sequence[int]) -> list[KeyFrame]:
        """Return the key frames of /sample_token, or rounds at the interval of the options."""
        if "/sample_token" in reader.topics:
            found = list(read_key_frames(reader))
        else:
            found = []
            interval_ns = round(self._options.key_interval_s * 1e9) - _JOIN_WITHIN_NS
            for stamp_ns in stamps:
                if not found or stamp_ns - found[-1].stamp_ns >= interval_ns:
                    found.append(KeyFrame(token_of("sample", self._name, stamp_ns), stamp_ns))
        if not found:
            raise UserError(f"bag {str(self._bag)!r} has no round of cameras, so there is no key frame")
        return found

    def _add_samples(self, keys: Sequence[KeyFrame]) -> list[Row]:
        scene = self._facts.scene
        log, token = token_of("log", self._name), scene.get("token") or token_of("scene", self._name)
        names = ("logfile", "vehicle", "date_captured", "location")
        self._rows.add("log", {"token": log, **{name: scene.get(name, "") for name in names}})
        samples = [
            {"token": key.token, "timestamp": to_us(key.stamp_ns), "scene_token": token} for key in keys
        ]
        link(samples)
        self._rows.tables["sample"] += samples
        self._rows.add(
            "scene",
            {
                "token": token,
                "log_token": log,
                "nbr_samples": len(samples),
                "first_sample_token": samples[0]["token"],
                "last_sample_token": samples[-1]["token"],
                "name": self._name,
                "description": scene.get("description", ""),
            },
        )
        return samples

    def _images(self, drive: Drive, matched: MatchedRound[Any]) -> Iterator[_Image]:
        """Yield the usable images of a round."""
        for index, found in enumerate(matched.messages):
            stamp_ns, camera = matched.stamps_ns[index], drive.cameras[index]
            if found is None or stamp_ns is None:
                continue
            try:
                message = drive.bag.deserialize(found.connection, found.content)
                pixels = image_to_rgb(message, drive.image_topics[index])
                size = (pixels.shape[1], pixels.shape[0])
                geometry = drive.rig.geometry(camera, message.header.frame_id, stamp_ns, size)
            except UserError as error:
                self._summary.faults[fault_kind(str(error))] += 1
                continue
            content, suffix = _file_content(message, pixels, geometry)
            yield _Image(camera.upper(), stamp_ns, content, suffix, size, geometry)

    def _add_image(self, image: _Image, keys: Sequence[KeyFrame], assigned: tuple[int, bool]) -> None:
        key, is_key_frame = assigned
        kind = "samples" if is_key_frame else "sweeps"
        name = f"{kind}/{image.channel}/{self._name}__{image.channel}__{to_us(image.stamp_ns)}.{image.suffix}"
        path = self._folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image.content)
        geometry = image.geometry
        self._data.setdefault(image.channel, []).append(
            {
                "token": token_of("sample_data", self._name, image.channel, image.stamp_ns),
                "sample_token": keys[key].token,
                "ego_pose_token": self._rows.ego_pose(self._name, image.stamp_ns, geometry.global_from_ego),
                "calibrated_sensor_token": self._rows.calibration(
                    image.channel, "camera", geometry.ego_from_camera, geometry.intrinsics
                ),
                "timestamp": to_us(image.stamp_ns),
                "fileformat": image.suffix,
                "is_key_frame": is_key_frame,
                "height": image.size[1],
                "width": image.size[0],
                "filename": name,
            }
        )
        self._summary.images += 1

    def _add_lidar_poses(self, drive: Drive, keys: Sequence[KeyFrame]) -> None:
        """Add LIDAR_TOP rows at the key frames, without files, if the bag has that frame: the devkit takes
        the ego pose of a key frame from them."""
        base = self._options.parameters.base_frame
        for key in keys:
            try:
                ego_from_lidar = drive.rig.tree.lookup(base, LIDAR_FRAME, key.stamp_ns)
                pose = drive.rig.global_from_ego(key.stamp_ns)
            except UserError:
                continue
            channel = LIDAR_FRAME.upper()
            name = f"samples/{channel}/{self._name}__{channel}__{to_us(key.stamp_ns)}.pcd.bin"
            self._data.setdefault(channel, []).append(
                {
                    "token": token_of("sample_data", self._name, channel, key.stamp_ns),
                    "sample_token": key.token,
                    "ego_pose_token": self._rows.ego_pose(self._name, key.stamp_ns, pose),
                    "calibrated_sensor_token": self._rows.calibration(channel, "lidar", ego_from_lidar, None),
                    "timestamp": to_us(key.stamp_ns),
                    "fileformat": "pcd",
                    "is_key_frame": True,
                    "height": 0,
                    "width": 0,
                    "filename": name,
                }
            )

    def _objects(
        self, reader: BagReader, drive: Drive, keys: Sequence[KeyFrame]
    ) -> list[SceneObjects | None]:
        """Return the objects of each key frame with the pose at their stamp."""
        frame = self._options.parameters.base_frame
        if self._detections is not None:
            with BagReader(self._detections) as found:
                objects = read_objects(found, DETECTIONS_TOPIC, VELOCITIES_TOPIC, frame=frame)
            objects = {s: o.select(o.scores >= self._options.min_score) for s, o in objects.items()}
            facts: Mapping[int, list[dict[str, Any]]] = {}
        else:
            topics = "/ground_truth/detections", "/ground_truth/velocities"
            objects = read_objects(reader, *topics, frame=frame, optional=True)
            facts = self._facts.annotations
        stamps = sorted(objects)
        result: list[SceneObjects | None] = []
        for key in keys:
            stamp_ns = nearest(stamps, key.stamp_ns, _JOIN_WITHIN_NS)
            if stamp_ns is None:
                result.append(None)
                continue
            own: ObjectList = objects[stamp_ns]
            pose = drive.rig.global_from_ego(stamp_ns)
            result.append(SceneObjects(own, pose, facts.get(stamp_ns)))
        return result


def _assign(stamps: Sequence[int], keys: Sequence[KeyFrame]) -> list[tuple[int, bool]]:
    """Return for each round the index of its key frame, and whether it is the round of that key frame.

    A round between key frames belongs to the next one, as in nuScenes; after the last one, to the last.
    """
    own: dict[int, int] = {}
    for index, key in enumerate(keys):
        best = min(range(len(stamps)), key=lambda n: abs(stamps[n] - key.stamp_ns), default=None)
        if best is not None and abs(stamps[best] - key.stamp_ns) <= _KEY_FRAME_WITHIN_NS:
            own.setdefault(best, index)
    times = np.array([key.stamp_ns for key in keys])
    following = np.minimum(np.searchsorted(times, np.array(stamps)), len(keys) - 1)
    return [(own.get(n, int(following[n])), n in own) for n in range(len(stamps))]


def _file_content(message: Any, pixels: NDArray[np.uint8], geometry: CameraGeometry) -> tuple[bytes, str]:
    """Return content and suffix of an image file: unchanged if possible, else a PNG without losses."""
    if geometry.lens is not None:
        pixels = rectify(pixels, geometry.intrinsics, geometry.lens)
    elif not hasattr(message, "encoding"):
        content = byte_view(message.data).tobytes()
        for signature, suffix in _SUFFIXES.items():
            if content.startswith(signature):
                return content, suffix
    bgr = cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR)
    return cv2.imencode(".png", bgr, [cv2.IMWRITE_PNG_COMPRESSION, 1])[1].tobytes(), "png"


def rectify(pixels: NDArray[np.uint8], intrinsics: Matrix, lens: Lens) -> NDArray[np.uint8]:
    """Return the image (H, W, 3) of a pinhole with the same intrinsics; black where the lens sees nothing."""
    height, width = pixels.shape[:2]
    columns, rows = np.meshgrid(np.arange(width), np.arange(height))
    grid = np.stack([columns, rows, np.ones_like(rows)], axis=-1).reshape(-1, 3).astype(np.float64)
    found, valid = project_pixels(grid @ np.linalg.inv(intrinsics).T, intrinsics, lens)
    found[~valid] = -10.0
    maps = found.reshape(height, width, 2).astype(np.float32)
    return np.asarray(cv2.remap(pixels, maps, np.empty(0, np.float32), cv2.INTER_LINEAR), dtype=np.uint8)
