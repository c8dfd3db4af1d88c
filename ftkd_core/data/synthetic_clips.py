# SPDX-License-Identifier: Apache-2.0
"""Clips rendered from the synthetic world and cached on disk.

A clip is rendered at twice the network's size and area-averaged. Its folder holds `images.npy` (memory-mapped
when read) and `frames.npz`, and gets its final name only when it is complete.
"""

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from ftkd_core.config import ImageConfig
from ftkd_core.data.clips import Clip
from ftkd_core.data.synthetic.frame import SceneFrame, render_frame
from ftkd_core.data.synthetic.rig import LIDAR_OFFSET_S, SurroundRig, nuscenes_rig
from ftkd_core.data.synthetic.traffic import world_config
from ftkd_core.data.synthetic.world import Scene, make_scene
from ftkd_core.data.targets import ClipObjects
from ftkd_core.errors import UserError
from ftkd_core.geometry import invert_rigid
from ftkd_core.runtime.preprocess import network_intrinsics, resize_and_crop

KEY_FRAME_INTERVAL_S: Final = 0.5
_OVERSAMPLING: Final = 2


def training_rig(image: ImageConfig) -> SurroundRig:
    """Return the nuScenes-like rig at twice the network's size, cropped to the rows the network sees."""
    rig = nuscenes_rig()
    width = _OVERSAMPLING * image.width
    height = round(rig.height * width / rig.width)
    return rig.resized(width, height, crop_top=height - _OVERSAMPLING * image.height)


def render_clip(
    seed: int, image: ImageConfig, duration_s: float = 20.0, interval_s: float = KEY_FRAME_INTERVAL_S,
    world: str = "ordinary",
) -> Clip:  # fmt: skip
    """Render the scene of a seed at the network's resolution, with frames interval_s apart (default: nuScenes
    key frames)."""
    scene, rig = make_scene(seed, duration_s, world_config(world)), training_rig(image)
    times = key_times(scene, interval_s)
    frames = [render_frame(scene, float(t), rig) for t in times]
    ego_from_camera = [_ego_from_camera(frame, rig) for frame in frames]
    intrinsics = np.stack([network_intrinsics(k, image, rig.width, rig.height) for k in rig.intrinsics])
    return Clip(
        name=scene.name,
        images=np.stack([[resize_and_crop(view, image) for view in frame.images] for frame in frames]),
        intrinsics=intrinsics,
        ego_from_camera=np.stack(ego_from_camera),
        global_from_ego=np.stack([frame.global_from_ego for frame in frames]),
        times=times,
        objects=tuple(_objects(frame) for frame in frames),
    )


def key_times(scene: Scene, interval_s: float = KEY_FRAME_INTERVAL_S) -> NDArray[np.float64]:
    """Return the frame times (T,) in scene seconds: the ends of the lidar sweeps, as in the data set that
    `synthetic.export` writes for the same seed.

    An interval shorter than that of key frames gives the same number of frames, which cover less time.
    """
    count = int(scene.duration_s / max(interval_s, KEY_FRAME_INTERVAL_S))
    return np.arange(count) * interval_s + LIDAR_OFFSET_S


def _ego_from_camera(frame: SceneFrame, rig: SurroundRig) -> NDArray[np.float64]:
    return invert_rigid(frame.global_from_ego) @ frame.global_from_ego_at_exposure @ rig.ego_from_camera


def _objects(frame: SceneFrame) -> ClipObjects:
    ego_from_global = invert_rigid(frame.global_from_ego)
    boxes = frame.actors.boxes_global.copy()
    boxes[:, :3] = boxes[:, :3] @ ego_from_global[:3, :3].T + ego_from_global[:3, 3]
    boxes[:, 6] += np.arctan2(ego_from_global[1, 0], ego_from_global[0, 0])
    boxes[:, 7:9] = boxes[:, 7:9] @ ego_from_global[:2, :2].T
    return ClipObjects(
        boxes=boxes, labels=frame.actors.labels, visible=frame.visible_fraction, num_points=frame.lidar_points
    )


def save_clip(clip: Clip, folder: Path) -> None:
    """Write a clip so that it can be memory-mapped; the folder gets its name only when it is complete."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    np.save(partial / "images.npy", np.asarray(clip.images))
    counts = np.array([len(objects.labels) for objects in clip.objects])
    np.savez(
        partial / "frames.npz",
        intrinsics=clip.intrinsics,
        ego_from_camera=clip.ego_from_camera,
        global_from_ego=clip.global_from_ego,
        times=clip.times,
        counts=counts,
        **{
            name: np.concatenate([getattr(objects, name) for objects in clip.objects])
            for name in ("boxes", "labels", "visible", "num_points")
        },
    )
    partial.rename(folder)


def load_clip(folder: Path) -> Clip:
    """Load a clip written by `save_clip`; images stay on disk until they are used."""
    images = np.load(folder / "images.npy", mmap_mode="r")
    with np.load(folder / "frames.npz") as frames:
        splits = np.cumsum(frames["counts"])[:-1]
        columns = {
            name: np.split(frames[name], splits) for name in ("boxes", "labels", "visible", "num_points")
        }
        objects = tuple(
            ClipObjects(**{name: values[index] for name, values in columns.items()})
            for index in range(len(frames["counts"]))
        )
        return Clip(
            name=folder.name,
            images=images,
            intrinsics=frames["intrinsics"],
            ego_from_camera=frames["ego_from_camera"],
            global_from_ego=frames["global_from_ego"],
            times=frames["times"],
            objects=objects,
        )


def world_version() -> str:
    """Return a short hash of the source files of the world and of its clips, so that caches of different
    versions are not mixed."""
    digest = hashlib.sha256()
    for path in [Path(__file__), *sorted((Path(__file__).parent / "synthetic").glob("*.py"))]:
        if not path.name.startswith("export"):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:8]


class SyntheticClips:
    """Clips of consecutive seeds, rendered on first use; picklable, so that worker processes can render.

    Clip i uses the frame interval intervals_s[i mod len(intervals_s)], so a student can be trained for
    several frame rates. UserError for an interval outside 0.05 to 2 s.
    """

    def __init__(
        self, first_seed: int, image: ImageConfig, cache: Path, duration_s: float = 20.0,
        intervals_s: tuple[float, ...] = (KEY_FRAME_INTERVAL_S,), world: str = "ordinary",
    ) -> None:  # fmt: skip
        world_config(world)
        if not intervals_s or not all(0.05 <= interval <= 2.0 for interval in intervals_s):
            raise UserError(f"data.intervals_s {intervals_s}: expected one or more of 0.05 to 2 s")
        self.first_seed = first_seed
        self.image = image
        self.duration_s = duration_s
        self.intervals_s = intervals_s
        self.world = world
        suffix = "" if world == "ordinary" else f"-{world}"
        self.cache = cache / f"{image.width}x{image.height}-{duration_s:g}s-{world_version()}{suffix}"

    @property
    def name(self) -> str:
        """Resolution, duration, world version, first seed, and intervals if they differ from those of key
        frames."""
        name = f"{self.cache.name} from seed {self.first_seed}"
        if self.intervals_s == (KEY_FRAME_INTERVAL_S,):
            return name
        return f"{name} every {', '.join(f'{interval:g}' for interval in self.intervals_s)} s"

    def __call__(self, index: int) -> Clip:
        seed = self.first_seed + index
        interval = self.intervals_s[index % len(self.intervals_s)]
        faster = "" if interval == KEY_FRAME_INTERVAL_S else f"-every-{interval:g}s"
        folder = self.cache / f"seed-{seed:07d}{faster}"
        if not folder.is_dir():
            save_clip(render_clip(seed, self.image, self.duration_s, interval, self.world), folder)
        return load_clip(folder)

    def render_all(self, count: int, progress: Callable[..., tqdm] = tqdm) -> None:  # type: ignore[type-arg]
        """Render the missing ones of the first `count` clips with a progress bar."""
        for index in progress(range(count), desc="render scenes", unit="scene"):
            self(index)
