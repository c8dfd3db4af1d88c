# SPDX-License-Identifier: Apache-2.0
"""Two-minute benchmark: rendering, and the shipped detector compared with its plain twin and by part. Ends
with a table.

    make bench
    python -m benchmarks.run --json benchmarks/results/cpu.json

Figures are medians over repeated runs after warm-up in one process; CPU figures depend on other load. For
more detail run `python -m benchmarks.detector`, `benchmarks.parts`, `benchmarks.train_step` or
`benchmarks.loader`.
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

from benchmarks import detector, parts
from benchmarks.report import report
from ftkd_core.data.synthetic.lidar import lidar_hits
from ftkd_core.data.synthetic.render import render_camera
from ftkd_core.data.synthetic.rig import nuscenes_rig
from ftkd_core.data.synthetic.world import make_scene
from ftkd_core.errors import UserError
from ftkd_core.runtime.detector import resolve_device
from ftkd_core.runtime.devices import device_name


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
    """Measure camera images per second at 704x256 and 800x450, and a lidar sweep, on one core."""
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


def goals_table(twins: dict[str, Any], split: dict[str, Any]) -> str:
    """Return a Markdown table of the figures of `benchmarks.detector` and `benchmarks.parts` with the goals,
    which are set for `r50_704x256_428q` in half precision on an H100."""
    images, stream = split["images"], split["stream"]
    rows = [
        ("one round, images of the network's size", f"{twins['latency_ms']['detector']:.3g} ms", "1.3 ms"),
        ("plain twin / detector", f"{twins['ratio']:.3g}", "at least 8"),
        ("one round, 1600x900 images", f"{twins['latency_camera_ms']['detector']:.3g} ms", ""),
        ("rest of the step / backbone", f"{split['backbone']['rest_over_backbone']:.3g}", "0.36"),
        ("with memory / without", f"{split['memory']['on_over_off']:.3g}", "1.05"),
        (f"after {stream['frames']} frames / after 20", f"{stream['late_over_early']:.3g}", "1.02"),
        ("memory growth in between", f"{stream['grown_bytes'] / 1e6:.3g} MB", "0"),
        ("recompilations in between", f"{stream['compiled_again']}", "0"),
        ("peak memory", f"{twins['peak_memory_mb']:.0f} MB", "450 MB"),
        ("six 1600x900 images to the network's input", f"{images['engine_ms']:.3g} ms", "0.5 ms"),
        ("OpenCV on one core / detector", f"{images['one_core_over_engine']:.3g}", "at least 20"),
        (
            "boxes equal to the plain twin's within 2 cm and 0.005",
            f"{twins['agreement']['within']:.1%}",
            "100 %",
        ),
    ]
    lines = [f"| {twins['preset']}, {twins['device']} | measured | goal (R50, H100) |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default auto)")
    parser.add_argument("--preset", default="tiny", help="tiny (default), r50_704x256_428q, ...")
    parser.add_argument("--repeats", type=int, default=20, help="timed repeats of each (default 20)")
    parser.add_argument("--frames", type=int, default=200, help="frames of the long stream (default 200)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args(argv)
    preset, repeats = arguments.preset, arguments.repeats
    try:
        if repeats < 1 or arguments.frames < parts.EARLY:
            raise UserError(
                f"--repeats {repeats} --frames {arguments.frames}: expected at least 1 and {parts.EARLY}"
            )
        device = resolve_device(arguments.device)
        twins = detector.run(preset, device, repeats=repeats)
        split = parts.run(preset, device, repeats=repeats, frames=arguments.frames)
        machine = device_name(torch.device("cpu"))
        result = {"world": bench_world(repeats), "detector": twins, "parts": split, "machine": machine}
    except UserError as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return 2
    report(result, arguments.json)
    print(goals_table(twins, split))
    return 0


if __name__ == "__main__":
    sys.exit(main())
