# SPDX-License-Identifier: Apache-2.0
"""Real nuScenes tables as data sets to train on: key frames with their photographs, or whole scenes whose
images are rendered.

    python -m benchmarks.real_scenes --tables DIR --output build/mini_val --width 800
    python -m benchmarks.real_scenes --tables DIR --output build/frames --link

Without --link, every key-frame image of the split is rendered from the true calibration, poses and boxes,
with the bodies of the synthetic world on flat ground. Boxes keep their place and size on the ground, but not
their height above it. Finished images are kept, so the command resumes.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Final

import cv2
import numpy as np
from tqdm import tqdm

from ftkd_core.classes import CAMERA_CHANNELS, CLASS_NAMES
from ftkd_core.data.nuscenes import (
    CameraRecord,
    NuScenes,
    camera_records,
    ground_truth,
    open_dataset,
    sample_pose,
    scene_samples,
    split_scenes,
)
from ftkd_core.data.synthetic.actors import Actor
from ftkd_core.data.synthetic.bodies import build_body
from ftkd_core.data.synthetic.mesh import Mesh
from ftkd_core.data.synthetic.paths import Motion, Path2D, SpeedProfile
from ftkd_core.data.synthetic.render import render_camera
from ftkd_core.data.synthetic.rig import SurroundRig
from ftkd_core.data.synthetic.world import Scene
from ftkd_core.errors import UserError
from ftkd_core.geometry import invert_rigid, yaw_transform

SPLIT: Final = "photographs"
"""Custom split of the scenes whose key frames all have photographs."""
_STILL: Final = SpeedProfile(((0.0, 0.0),))
_JPEG_QUALITY: Final = 90


def copy_tables(tables: Path, version: str, output: Path) -> None:
    """Copy the tables and maps of a data set to a new folder."""
    output.mkdir(parents=True, exist_ok=True)
    for name in (version, "maps"):
        if (tables / name).is_dir():
            shutil.copytree(tables / name, output / name, dirs_exist_ok=True)


def link_photographs(tables: Path, version: str, output: Path) -> list[str]:
    """Make a data set of the scenes that have all their photographs, with links to these; return the scenes.
    Its split is SPLIT."""
    copy_tables(tables, version, output)
    link = output / "samples"
    if not link.exists():
        link.symlink_to((tables / "samples").resolve(), target_is_directory=True)
    dataset = open_dataset(output, version)
    scenes = [scene["name"] for scene in dataset.scene if _has_photographs(dataset, scene["name"])]
    if not scenes:
        raise UserError(f"data set {str(tables)!r}: no scene has the photographs of all its key frames")
    (output / version / "splits.json").write_text(json.dumps({SPLIT: scenes}), encoding="utf-8")
    return scenes


def _has_photographs(dataset: NuScenes, scene: str) -> bool:
    channels = {str(sensor["channel"]) for sensor in dataset.sensor if sensor["modality"] == "camera"}
    if not channels.issuperset(CAMERA_CHANNELS):
        return False
    paths = [
        record.path
        for channel in CAMERA_CHANNELS
        for record in camera_records(dataset, scene, channel, keyframes_only=True)
    ]
    return bool(paths) and all(path.is_file() for path in paths)


def render_split(tables: Path, version: str, split: str, output: Path, width: int) -> int:
    """Render all key-frame images of a split that are missing; return how many there are."""
    copy_tables(tables, version, output)
    dataset = open_dataset(output, version)
    count = 0
    for scene in split_scenes(dataset, split):
        records = [
            camera_records(dataset, scene, channel, keyframes_only=True) for channel in CAMERA_CHANNELS
        ]
        frames = list(zip(scene_samples(dataset, scene), *records, strict=True))
        for token, *cameras in tqdm(frames, desc=f"render {scene}", unit="frame"):
            count += len(cameras)
            if not all(record.path.is_file() for record in cameras):
                render_key_frame(dataset, str(token), cameras, width)
    return count


def render_key_frame(dataset: NuScenes, token: str, cameras: Sequence[CameraRecord], width: int) -> None:
    """Write the images of a key frame at their paths, `width` pixels wide."""
    pose = sample_pose(dataset, token)
    height = round(cameras[0].height * width / cameras[0].width)
    scale = np.diag([width / cameras[0].width, height / cameras[0].height, 1.0])
    rig = SurroundRig(
        channels=CAMERA_CHANNELS, width=width, height=height,
        intrinsics=np.stack([scale @ record.intrinsics for record in cameras]),
        ego_from_camera=np.stack(
            [invert_rigid(pose) @ record.global_from_ego @ record.ego_from_camera for record in cameras]
        ),
        exposure_offsets_s=np.zeros(len(cameras)),
    )  # fmt: skip
    scene = frame_scene(dataset, token)
    for number, record in enumerate(cameras):
        image = render_camera(scene, 0.0, rig, number).image
        record.path.parent.mkdir(parents=True, exist_ok=True)
        partial = record.path.with_suffix(".partial.jpg")
        cv2.imwrite(
            str(partial), cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY]
        )
        partial.replace(record.path)


def frame_scene(dataset: NuScenes, token: str) -> Scene:
    """Return a still scene of a key frame's true boxes around the vehicle."""
    objects = ground_truth(dataset, token)
    actors = []
    for box, label, instance in zip(objects.boxes, objects.labels, objects.ids, strict=True):
        name = CLASS_NAMES[int(label)]
        size = (float(box[3]), float(box[4]), float(box[5]))
        motion = Motion(Path2D(float(box[0]), float(box[1]), float(box[6])), _STILL)
        actors.append(Actor(name=name, size=size, motion=motion, body=_body(name, size, instance)))
    return Scene(
        seed=0, name="rendered", description="", duration_s=0.0, start_time_us=0, night=False, fog_per_m=0.0,
        sun=np.array([0.3, 0.4, 0.85]), global_from_local=yaw_transform(0.0),
        ego=Motion(Path2D(0.0, 0.0, 0.0), _STILL), actors=tuple(actors), fixtures=(),
    )  # fmt: skip


@lru_cache(maxsize=1024)
def _body(name: str, size: tuple[float, float, float], instance: str) -> Mesh:
    """Return the body of an object; an instance looks the same in all frames."""
    return build_body(name, size, np.random.default_rng(list(instance.encode())))


def main(argv: Sequence[str] | None = None) -> int:
    """Render or link a data set."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.real_scenes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--tables", type=Path, required=True, help="folder of a nuScenes data set")
    add("--version", default="v1.0-mini", help="its version (default v1.0-mini)")
    add("--split", default="mini_val", help="split to render (default mini_val)")
    add("--output", type=Path, required=True, help="new data set")
    add("--width", type=int, default=800, help="width of rendered images in pixels (default 800)")
    add("--link", action="store_true", help="link existing photographs instead")
    options = parser.parse_args(argv)
    try:
        if options.link:
            scenes = link_photographs(options.tables, options.version, options.output)
            print(f"{options.output}: split {SPLIT} with {', '.join(scenes)}")
        else:
            count = render_split(
                options.tables, options.version, options.split, options.output, options.width
            )
            print(f"{options.output}: {count} images of split {options.split}")
    except UserError as error:
        print(f"real scenes: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
