# SPDX-License-Identifier: Apache-2.0
"""What a newcomer can measure in a minute: rendering, and the shipped detector from images to objects.

    make bench
    python -m benchmarks.run --json benchmarks/results/cpu.json

Medians over repeated runs after warm-up, one process; CPU figures depend on what else the machine does.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from benchmarks.report import device_name, report
from ftkd_core.data.synthetic.lidar import lidar_hits
from ftkd_core.data.synthetic.render import render_camera
from ftkd_core.data.synthetic.rig import nuscenes_rig
from ftkd_core.data.synthetic.world import make_scene
from ftkd_core.errors import UserError
from ftkd_core.runtime.detector import Detector
from ftkd_core.types import CameraRound, CameraView


def median_ms(work: Callable[[], object], repeats: int, warmup: int = 3) -> float:
    """Median wall time in milliseconds of one call."""
    for _ in range(warmup):
        work()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return float(np.median(times) * 1e3)


def bench_world(repeats: int) -> dict[str, float]:
    """One core: camera images a second at 704x256 and 800x450, and a lidar sweep."""
    cv2.setNumThreads(1)
    scene = make_scene(900_000)
    result = {}
    for name, rig in (
        ("704x256", nuscenes_rig().resized(704, 396, crop_top=140)),
        ("800x450", nuscenes_rig(800, 450)),
    ):
        moments = iter(np.linspace(0.5, 18.0, 1000))

        def six(rig: Any = rig, moments: Any = moments) -> None:
            time_s = float(next(moments))
            for camera in range(6):
                render_camera(scene, time_s, rig, camera)

        result[f"render_{name}_images_per_s"] = 6e3 / median_ms(six, repeats)
    result["lidar_hits_ms"] = median_ms(lambda: lidar_hits(scene, 3.0), repeats)
    return result


def bench_detector(device: str, repeats: int) -> dict[str, float | str]:
    """`Detector.step` on six rendered 1600x900 images: scaling, cropping, network, decoding."""
    detector = Detector.from_weights(device=device)
    scene, rig = make_scene(900_000), nuscenes_rig()
    pose = scene.ego_pose(1.0)
    views = tuple(
        CameraView(
            image=render_camera(scene, 1.0, rig, camera).image,
            intrinsics=rig.intrinsics[camera],
            ego_from_camera=rig.ego_from_camera[camera],
            global_from_ego=pose,
            stamp_ns=0,
        )
        for camera in range(6)
    )
    stamps = iter(range(0, 10**15, 500_000_000))

    def step() -> None:
        detector.step(CameraRound(views=views, reference_stamp_ns=next(stamps), global_from_ego=pose))

    return {
        "preset": detector.preset,
        "device": str(detector.device),
        "step_1600x900_ms": median_ms(step, repeats),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--repeats", type=int, default=20, help="timed repeats of each (default 20)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args(argv)
    try:
        result = {
            "world": bench_world(arguments.repeats),
            "detector": bench_detector(arguments.device, arguments.repeats),
            "machine": device_name(torch.device("cpu")),
        }
    except UserError as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return 2
    report(result, arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
