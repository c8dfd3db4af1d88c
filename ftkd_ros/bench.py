# SPDX-License-Identifier: Apache-2.0
"""`ftkd bench`: what a round costs on this machine. `benchmarks.detector` compares it with its plain twin."""

import argparse
import time
from pathlib import Path
from typing import Any, Final

from ftkd_core.errors import UserError
from ftkd_core.json_files import write_json

SUMMARY: Final = "latency and peak memory of the detector on this machine"
DESCRIPTION: Final = (
    "Streams a rendered drive through the detector and prints how long a round takes, from images in memory "
    "to objects, and how much memory that needs. Where a preset has no shipped weights, random ones serve: "
    "the time is the same."
)
_ROUNDS: Final = 4
_WARM_UP: Final = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--preset", default="tiny", help="model to time (default tiny)")
    parser.add_argument("--weights", type=Path, metavar="FILE", help="weights of that preset")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default auto)")
    parser.add_argument("--runtime", default="fast", help="fast (default), or plain, its twin")
    parser.add_argument("--repeats", type=int, default=50, metavar="N", help="timed rounds (default 50)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")


def run(options: argparse.Namespace) -> int:
    """Measure and print; UserError for options that cannot be used."""
    if options.repeats < 1:
        raise UserError(f"--repeats {options.repeats}: expected at least 1")
    figures = measure(
        options.preset, options.weights, options.device, options.runtime, repeats=options.repeats
    )
    latency, processor = figures["latency_ms"], figures["processor_ms"]
    print(f"{figures['preset']} ({figures['weights']}) on {figures['device']}, {options.runtime} runtime")
    print(f"first round after {figures['ready_s']:.1f} s")
    print(
        f"six 1600x900 images to objects: p50 {latency['p50']:.1f} ms, p95 {latency['p95']:.1f} ms, "
        f"max {latency['max']:.1f} ms ({latency['count']} rounds)"
    )
    print(f"processor time of all threads: p50 {processor['p50']:.1f} ms")
    print(f"peak memory {figures['peak_memory_mb']:.0f} MB ({figures['peak_memory_is']})")
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        write_json(options.json, figures)
    return 0


def measure(preset: str, weights: Path | None, device: str, runtime: str, *, repeats: int) -> dict[str, Any]:
    """Latency in milliseconds, peak memory in megabytes and the seconds until the first round was through."""
    from ftkd_core.data.synthetic.rig import nuscenes_rig
    from ftkd_core.evaluation import detector_benchmark as measuring
    from ftkd_core.runtime.detector import Detector, resolve_device

    place = resolve_device(device)
    model, weights_name = measuring.load_preset_model(preset, weights)
    rounds = measuring.driving_rounds(_ROUNDS, nuscenes_rig())
    measuring.reset_peak_memory(place)
    began = time.perf_counter()
    detector = Detector(model, weights_name=weights_name, device=place, runtime=runtime)
    detector.step(rounds[0])
    ready_s = time.perf_counter() - began
    times = measuring.time_detectors([detector], rounds, repeats=repeats, warm_up=_WARM_UP)[0]
    return {
        "preset": preset,
        "weights": weights_name,
        "device": str(place),
        "runtime": runtime,
        "latency_ms": times.wall.as_dict(),
        "processor_ms": times.processor.as_dict(),
        "peak_memory_mb": round(measuring.peak_memory_mb(place), 1),
        "peak_memory_is": measuring.peak_memory_definition(place),
        "ready_s": round(ready_s, 2),
    }
