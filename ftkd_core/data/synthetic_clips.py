# SPDX-License-Identifier: Apache-2.0
"""Clips rendered from the synthetic world and cached on disk.

A clip is rendered at twice the network's size and area-averaged. Another rig than the nuScenes-like one is
seen through virtual cameras, with the code of the detector (`runtime.virtual_camera`), as at inference: the
clip then has the six channels of the nuScenes-like rig, some of which may be missing or see a part of their
image. Its folder holds `images.npy` (memory-mapped when read) and `frames.npz`, and gets its final name only
when it is complete.
"""

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from ftkd_core.classes import CAMERA_CHANNELS
from ftkd_core.config import ImageConfig
from ftkd_core.data.clips import Clip
from ftkd_core.data.synthetic.frame import SceneFrame, render_frame
from ftkd_core.data.synthetic.rig import LIDAR_OFFSET_S, SurroundRig, nuscenes_rig
from ftkd_core.data.synthetic.rig import canonical_cameras as cameras_of
from ftkd_core.data.synthetic.rig_presets import DEFAULT_RIG
from ftkd_core.data.synthetic.traffic import world_config
from ftkd_core.data.synthetic.varied_rigs import DrivenRig, check_rig_name, rig_of_scene
from ftkd_core.data.synthetic.world import Scene, make_scene
from ftkd_core.data.targets import ClipObjects
from ftkd_core.errors import UserError
from ftkd_core.geometry import invert_rigid
from ftkd_core.runtime.preprocess import (
    network_intrinsics,
    resize_and_crop,
    round_rig,
    stack_images,
    token_grid,
    visible_tokens,
)
from ftkd_core.runtime.virtual_camera import VirtualCameras
from ftkd_core.types import CameraRound, CameraView

KEY_FRAME_INTERVAL_S: Final = 0.5
_OVERSAMPLING: Final = 2
_MOST_OVERSAMPLING: Final = 3
_SEEING: Final = (
    "canonical_cameras", "lens", "runtime/camera_assignment", "runtime/preprocess", "runtime/remap",
    "runtime/virtual_camera",
)  # fmt: skip
"""Modules that decide how the cameras of another rig are seen."""


def training_rig(image: ImageConfig) -> SurroundRig:
    """Return the nuScenes-like rig at twice the network's size, cropped to the rows the network sees."""
    rig = nuscenes_rig()
    width = _OVERSAMPLING * image.width
    height = round(rig.height * width / rig.width)
    return rig.resized(width, height, crop_top=height - _OVERSAMPLING * image.height)


def render_clip(
    seed: int, image: ImageConfig, duration_s: float = 20.0, interval_s: float = KEY_FRAME_INTERVAL_S,
    world: str = "ordinary", rig_name: str = DEFAULT_RIG,
) -> Clip:  # fmt: skip
    """Render the scene of a seed at the network's resolution, with frames interval_s apart (default: nuScenes
    key frames). rig_name as in `varied_rigs.rig_of_scene`."""
    scene = make_scene(seed, duration_s, world_config(world))
    times = key_times(scene, interval_s)
    if rig_name != DEFAULT_RIG:
        return _seen_clip(scene, times, image, rig_of_scene(rig_name, seed))
    rig = training_rig(image)
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


def _seen_clip(scene: Scene, times: NDArray[np.float64], image: ImageConfig, rig: DrivenRig) -> Clip:
    """Render a scene with any rig and return it as a detector with virtual cameras sees it."""
    sized = rig.resized(_render_width(rig.true, image))
    cameras = VirtualCameras(cameras_of(nuscenes_rig()), image, CAMERA_CHANNELS, "auto", log_decisions=False)
    frames = [render_frame(scene, float(time), sized.true) for time in times]
    rounds = [
        cameras.see(_round(frame, sized.calibrated, float(time)))
        for frame, time in zip(frames, times, strict=True)
    ]
    rigs = [round_rig(seen, image, CAMERA_CHANNELS) for seen in rounds]
    visible = visible_tokens(rounds[0], image)
    return Clip(
        name=scene.name,
        images=np.stack([stack_images(seen.views, image) for seen in rounds]),
        intrinsics=rigs[0].intrinsics[0].double().numpy(),
        ego_from_camera=np.stack([seen.ego_from_camera[0].double().numpy() for seen in rigs]),
        global_from_ego=np.stack([frame.global_from_ego for frame in frames]),
        times=times,
        objects=tuple(_objects(frame) for frame in frames),
        present=rigs[0].mask[0].numpy(),
        seen_tokens=None if visible is None else visible.reshape(len(CAMERA_CHANNELS), *token_grid(image)),
    )


def _render_width(rig: SurroundRig, image: ImageConfig) -> int:
    """Return the width of the rendered images: a camera with a wide field needs more pixels for the same
    resolution of the network image."""
    trained = float(np.median(nuscenes_rig().intrinsics[:, 0, 0])) / nuscenes_rig().width
    own = float(np.median(rig.intrinsics[:, 0, 0])) / rig.width
    return round(
        image.width * float(np.clip(_OVERSAMPLING * trained / own, _OVERSAMPLING, _MOST_OVERSAMPLING))
    )


def _round(frame: SceneFrame, calibrated: SurroundRig, time_s: float) -> CameraRound:
    """Return a rendered frame as a round of cameras with their calibration."""
    views = tuple(
        CameraView(
            image=frame.images[camera], intrinsics=calibrated.intrinsics[camera],
            ego_from_camera=calibrated.ego_from_camera[camera],
            global_from_ego=frame.global_from_ego_at_exposure[camera],
            stamp_ns=round(float(frame.exposure_s[camera]) * 1e9), lens=calibrated.lens(camera), name=name,
        )
        for camera, name in enumerate(calibrated.channels)
    )  # fmt: skip
    return CameraRound(
        views=views, reference_stamp_ns=round(time_s * 1e9), global_from_ego=frame.global_from_ego
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


_OPTIONAL: Final = ("present", "seen_tokens")


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
        **{name: value for name in _OPTIONAL if (value := getattr(clip, name)) is not None},
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
            **{name: frames[name] for name in _OPTIONAL if name in frames},
        )


def world_version(rig_name: str = DEFAULT_RIG) -> str:
    """Return a short hash of the source files of the world and of its clips, so that caches of different
    versions are not mixed; for another rig also of those that decide how its cameras are seen."""
    digest = hashlib.sha256()
    paths = [Path(__file__), *sorted((Path(__file__).parent / "synthetic").glob("*.py"))]
    if rig_name != DEFAULT_RIG:
        paths += [Path(__file__).parents[1] / f"{module}.py" for module in _SEEING]
    for path in paths:
        if not path.name.startswith("export"):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:8]


class SyntheticClips:
    """Clips of consecutive seeds, rendered on first use; picklable, so that worker processes can render.

    Clip i uses the frame interval intervals_s[i mod len(intervals_s)], so a student can be trained for
    several frame rates. rig_name as in `varied_rigs.rig_of_scene`. UserError for an interval outside 0.05 to
    2 s and for an unknown rig.
    """

    def __init__(
        self, first_seed: int, image: ImageConfig, cache: Path, duration_s: float = 20.0,
        intervals_s: tuple[float, ...] = (KEY_FRAME_INTERVAL_S,), world: str = "ordinary",
        rig_name: str = DEFAULT_RIG,
    ) -> None:  # fmt: skip
        world_config(world)
        check_rig_name(rig_name)
        if not intervals_s or not all(0.05 <= interval <= 2.0 for interval in intervals_s):
            raise UserError(f"data.intervals_s {intervals_s}: expected one or more of 0.05 to 2 s")
        self.first_seed = first_seed
        self.image = image
        self.duration_s = duration_s
        self.intervals_s = intervals_s
        self.world = world
        self.rig_name = rig_name
        suffix = "" if world == "ordinary" else f"-{world}"
        suffix += "" if rig_name == DEFAULT_RIG else f"-{rig_name}"
        version = world_version(rig_name)
        self.cache = cache / f"{image.width}x{image.height}-{duration_s:g}s-{version}{suffix}"

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
            clip = render_clip(seed, self.image, self.duration_s, interval, self.world, self.rig_name)
            save_clip(clip, folder)
        return load_clip(folder)

    def render_all(self, count: int, progress: Callable[..., tqdm] = tqdm) -> None:  # type: ignore[type-arg]
        """Render the missing ones of the first `count` clips with a progress bar."""
        for index in progress(range(count), desc="render scenes", unit="scene"):
            self(index)
