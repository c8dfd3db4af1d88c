# SPDX-License-Identifier: Apache-2.0
"""Draw the rounds of a bag with their detections as an animated WebP: six cameras and a top view.

The picture in README.md, 12 images per second and camera:

    ftkd synth --output build/animation/data
    ftkd convert --dataroot build/animation/data --version v1.0-synth --scene scene-1900000 \\
        --output build/animation/input --sweeps
    ftkd detect --bag build/animation/input --output build/animation/detections
    python -m scripts.make_animation --bag build/animation/input --detections build/animation/detections \\
        --output docs/images/demo.webp --skip 60
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ftkd_core.errors import UserError
from ftkd_core.types import CameraRound, ObjectList
from ftkd_core.visualization import draw_bird_eye, draw_surround
from ftkd_ros.bag.io import BagReader
from ftkd_ros.bag.recording import read_recording
from ftkd_ros.bag.replay_rounds import Drive


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the animation; return the exit code: 0, or 2 for bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.make_animation", description=__doc__.split("\n")[0]
    )
    add = parser.add_argument
    add("--bag", type=Path, required=True, metavar="BAG", help="bag with the cameras")
    add("--detections", type=Path, required=True, metavar="BAG", help="bag with /detections")
    add("--output", type=Path, required=True, metavar="FILE", help="the .webp file; replaced if it exists")
    add("--skip", type=int, default=0, metavar="N", help="rounds to leave out at the start (default 0)")
    add("--frames", type=int, default=108, metavar="N", help="rounds to show at most (default 108)")
    add("--fps", type=float, default=12.0, help="rounds per second of the animation (default 12)")
    add("--width", type=int, default=1000, metavar="PX", help="width of the picture (default 1000)")
    add("--quality", type=int, default=45, metavar="Q", help="WebP quality, 0 to 100 (default 45)")
    add("--min-score", type=float, default=0.35, metavar="S", help="lowest score drawn (default 0.35)")
    options = parser.parse_args(arguments)
    try:
        frames = list(draw_frames(options))
    except UserError as error:
        print(f"make_animation: {error}", file=sys.stderr)
        return 2
    if not frames:
        print(f"make_animation: no round of {options.bag} has detections after --skip", file=sys.stderr)
        return 2
    first, *rest = frames
    first.save(
        options.output, save_all=True, append_images=rest, duration=round(1000 / options.fps), loop=0,
        quality=options.quality, method=6,
    )  # fmt: skip
    size = options.output.stat().st_size
    print(f"{options.output}: {len(frames)} frames, {first.width}x{first.height}, {size / 1e6:.2f} MB")
    return 0


def draw_frames(options: argparse.Namespace) -> Iterator[Image.Image]:
    """Yield one picture per round that has detections."""
    with BagReader(options.bag) as source, BagReader(options.detections) as detections:
        drive = Drive(source)
        found = read_recording(detections, drive).objects
        shown = (
            camera_round for camera_round, _ in drive.rounds() if camera_round.reference_stamp_ns in found
        )
        for camera_round in islice(shown, options.skip, options.skip + options.frames):
            stamp_ns = camera_round.reference_stamp_ns
            picture = draw_round(camera_round, found[stamp_ns], options.min_score)
            height = round(picture.shape[0] * options.width / picture.shape[1])
            small = cv2.resize(picture, (options.width, height), interpolation=cv2.INTER_AREA)
            yield Image.fromarray(small)


def draw_round(camera_round: CameraRound, objects: ObjectList, min_score: float) -> NDArray[np.uint8]:
    """Return the six cameras on the left and the top view on the right, of equal height."""
    cameras = draw_surround(camera_round, objects, width=1440, min_score=min_score)
    top = draw_bird_eye(objects, size=cameras.shape[0], range_m=45.0, min_score=min_score)
    joined: NDArray[Any] = np.concatenate([cameras, top], axis=1)
    return joined.astype(np.uint8)


if __name__ == "__main__":
    sys.exit(main())
