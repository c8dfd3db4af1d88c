# SPDX-License-Identifier: Apache-2.0
"""Writer of one scene: images, lidar sweeps, map, poses and annotations.

Times follow nuScenes. The lidar rotates at 20 Hz. Each camera is exposed when the lidar points in its
direction, in six of every ten rotations (12 Hz). Every tenth rotation is a key frame (2 Hz), stamped at the
end of the rotation.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Final, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from ftkd_core.data.synthetic.export_map import write_map
from ftkd_core.data.synthetic.export_tables import Annotation, DatasetTables, Row
from ftkd_core.data.synthetic.lidar import simulate_sweep
from ftkd_core.data.synthetic.render import render_camera
from ftkd_core.data.synthetic.rig import EGO_FROM_LIDAR, LIDAR_OFFSET_S
from ftkd_core.data.synthetic.varied_rigs import DrivenRig
from ftkd_core.data.synthetic.world import Scene

KEY_FRAME_PERIOD_S: Final = 0.5
# Start times of the camera rounds relative to a key frame. The rotation after a key frame has no images, so
# that the key frame's own images are the nearest to its stamp.
_ROUND_STARTS_S: Final = (0.0, 0.1, 0.2, 0.25, 0.35, 0.45)
_ANNOTATION_RANGE_M: Final = 80.0
_LIDAR_CHANNEL: Final = "LIDAR_TOP"


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Options of the export: also images between key frames, JPEG quality 1..100, and a callback after each
    image."""

    sweeps: bool
    jpeg_quality: int
    on_image: Callable[[], object]


class RoundTime(NamedTuple):
    """Start of a round of cameras, its key frame or the next one, and whether it belongs to the key frame
    itself."""

    start_s: float
    key_frame: int
    is_key_frame: bool


def round_times(duration_s: float, sweeps: bool) -> list[RoundTime]:
    """Return all rounds of a scene in time order, from its first key frame to its last."""
    last = key_frame_count(duration_s) - 1
    times = []
    for key_frame in range(last + 1):
        starts = _ROUND_STARTS_S if sweeps and key_frame < last else _ROUND_STARTS_S[:1]
        for start in starts:
            following = key_frame if start == 0.0 else key_frame + 1
            times.append(RoundTime(key_frame * KEY_FRAME_PERIOD_S + start, following, start == 0.0))
    return times


def key_frame_count(duration_s: float) -> int:
    """Return the number of key frames in a scene of this length: 40 in 20 s."""
    return int(duration_s / KEY_FRAME_PERIOD_S + 1e-6)


class SceneWriter:
    """Writer of one scene: files below the data set folder, rows in the tables. The true rig is rendered, its
    calibration is written."""

    def __init__(
        self, scene: Scene, rig: DrivenRig, folder: Path, tables: DatasetTables, options: ExportOptions
    ):
        self.scene = scene
        self.rig = rig.true
        self.calibrated = rig.calibrated
        self.folder = folder
        self.tables = tables
        self.options = options
        self.logfile = f"synthetic-{scene.seed:07d}"
        self.key_frames_us = [
            self._stamp_us(index * KEY_FRAME_PERIOD_S + LIDAR_OFFSET_S)
            for index in range(key_frame_count(scene.duration_s))
        ]
        # Visible pixels of each instance at each key frame, and its pixels without occlusion.
        self._visible: list[dict[int, float]] = [defaultdict(float) for _ in self.key_frames_us]
        self._total: list[dict[int, float]] = [defaultdict(float) for _ in self.key_frames_us]

    def write(self) -> None:
        """Write the scene; most of the time is spent rendering six cameras at 12 Hz (2 Hz without sweeps)."""
        map_filename = f"maps/{self.logfile}.png"
        write_map(self.folder / map_filename, self.scene)
        log_token = self.tables.add_log(
            self.logfile,
            vehicle="synthetic",
            date=datetime.fromtimestamp(self.scene.start_time_us * 1e-6, tz=timezone.utc).date().isoformat(),
            location=self.logfile,
            map_filename=map_filename,
        )
        samples = self.tables.add_scene(
            self.scene.name, self.scene.description, log_token, self.key_frames_us
        )
        for camera, channel in enumerate(self.rig.channels):
            self._write_camera(camera, channel, samples)
        annotations = self._write_lidar(samples)
        self.tables.add_annotations(self.scene.name, samples, _from_first_to_last_return(annotations))

    def _write_camera(self, camera: int, channel: str, samples: Sequence[str]) -> None:
        calibration = self.tables.add_calibrated_sensor(
            self.logfile, channel, self.calibrated.ego_from_camera[camera],
            self.calibrated.intrinsics[camera], self.calibrated.lens(camera),
        )  # fmt: skip
        rows: list[Row] = []
        for start_s, key_frame, is_key_frame in round_times(self.scene.duration_s, self.options.sweeps):
            stamp_us = self._stamp_us(float(self.rig.exposures_s(start_s)[camera]))
            time_s = self._time_s(stamp_us)
            image = self._render(camera, time_s, key_frame if is_key_frame else None)
            row = self._row(channel, stamp_us, samples[key_frame], is_key_frame, calibration, "jpg")
            self._write_image(self.folder / row["filename"], image)
            rows.append({**row, "width": self.rig.width, "height": self.rig.height})
            self.options.on_image()
        self.tables.add_sample_data(self.scene.name, channel, rows)

    def _render(self, camera: int, time_s: float, key_frame: int | None) -> NDArray[np.uint8]:
        """Render one image (H, W, 3) RGB; at a key frame, also count the pixels of each object."""
        rendering = render_camera(self.scene, time_s, self.rig, camera)
        if key_frame is not None:
            for row, instance in enumerate(self.scene.actors_at(time_s).instance.tolist()):
                self._visible[key_frame][instance] += float(rendering.visible_pixels[row])
                self._total[key_frame][instance] += float(rendering.total_pixels[row])
        return rendering.image

    def _write_lidar(self, samples: Sequence[str]) -> list[list[Annotation]]:
        """Write the lidar files and rows; return the objects near the vehicle at each key frame with their
        lidar returns."""
        calibration = self.tables.add_calibrated_sensor(self.logfile, _LIDAR_CHANNEL, EGO_FROM_LIDAR)
        rows: list[Row] = []
        annotations = []
        for key_frame, stamp_us in enumerate(self.key_frames_us):
            points, hits = simulate_sweep(self.scene, self._time_s(stamp_us))
            row = self._row(_LIDAR_CHANNEL, stamp_us, samples[key_frame], True, calibration, "pcd")
            path = self.folder / row["filename"]
            path.parent.mkdir(parents=True, exist_ok=True)
            _five_columns(points).tofile(path)
            rows.append({**row, "width": 0, "height": 0})
            annotations.append(self._annotations(key_frame, hits))
        self.tables.add_sample_data(self.scene.name, _LIDAR_CHANNEL, rows)
        return annotations

    def _annotations(self, key_frame: int, hits: NDArray[np.int64]) -> list[Annotation]:
        time_s = self._time_s(self.key_frames_us[key_frame])
        actors = self.scene.actors_at(time_s)
        points = np.bincount(hits[hits >= 0], minlength=len(actors.instance))
        distances = np.linalg.norm(actors.boxes_global[:, :2] - self.scene.ego_pose(time_s)[:2, 3], axis=1)
        annotations = []
        for row in np.flatnonzero(distances <= _ANNOTATION_RANGE_M):
            instance = int(actors.instance[row])
            total = self._total[key_frame].get(instance, 0.0)
            visible = self._visible[key_frame].get(instance, 0.0)
            annotations.append(
                Annotation(
                    instance=instance,
                    label=int(actors.labels[row]),
                    attribute=actors.attributes[row],
                    box_global=actors.boxes_global[row],
                    visible_fraction=visible / total if total > 0 else 0.0,
                    lidar_points=int(points[row]),
                )
            )
        return annotations

    def _row(
        self, channel: str, stamp_us: int, sample: str, is_key_frame: bool, calibration: str, fileformat: str
    ) -> Row:
        folder = "samples" if is_key_frame else "sweeps"
        suffix = "pcd.bin" if fileformat == "pcd" else fileformat
        return {
            "timestamp": stamp_us,
            "sample_token": sample,
            "is_key_frame": is_key_frame,
            "calibrated_sensor_token": calibration,
            "fileformat": fileformat,
            "filename": f"{folder}/{channel}/{self.logfile}__{channel}__{stamp_us}.{suffix}",
            "global_from_ego": self.scene.ego_pose(self._time_s(stamp_us)),
        }

    def _write_image(self, path: Path, image: NDArray[np.uint8]) -> None:
        bgr = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
        _, data = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, self.options.jpeg_quality])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.tobytes())  # unlike cv2.imwrite, raises OSError when the disk is full

    def _stamp_us(self, time_s: float) -> int:
        return int(self.scene.start_time_us) + round(time_s * 1e6)

    def _time_s(self, stamp_us: int) -> float:
        """Scene time of a stamp. Rendering uses the rounded stamp, so files and images agree to the
        microsecond."""
        return (stamp_us - int(self.scene.start_time_us)) * 1e-6


def _from_first_to_last_return(annotations: Sequence[Sequence[Annotation]]) -> list[list[Annotation]]:
    """Keep each object from the key frame of its first lidar return to that of its last.

    As in nuScenes, an object is annotated once it has a lidar return, and stays annotated while it is
    occluded in between.
    """
    seen: dict[int, list[int]] = defaultdict(list)
    for key_frame, objects in enumerate(annotations):
        for item in objects:
            if item.lidar_points > 0:
                seen[item.instance].append(key_frame)
    return [
        [
            item
            for item in objects
            if seen[item.instance] and seen[item.instance][0] <= key_frame <= seen[item.instance][-1]
        ]
        for key_frame, objects in enumerate(annotations)
    ]


def _five_columns(points: NDArray[np.float32]) -> NDArray[np.float32]:
    """Pad points (P, 4 or 5) to the five columns of nuScenes: x, y, z, intensity, ring (0 if unknown)."""
    if points.shape[1] < 5:
        points = np.pad(points, ((0, 0), (0, 5 - points.shape[1])))
    return np.ascontiguousarray(points, dtype=np.float32)
