# SPDX-License-Identifier: Apache-2.0
"""`ftkd bench`: time and memory per round on this machine; `benchmarks.detector` compares the runtimes."""

import time
from pathlib import Path
from typing import Any, Final

import click

from ftkd_core.errors import UserError
from ftkd_core.json_files import write_json
from ftkd_ros.commands import options

_ROUNDS: Final = 4
_WARM_UP: Final = 5


@click.command(short_help="Measure latency and peak memory of the detector on this machine.")
@click.option("--preset", default="tiny", help="Model to time.")
@click.option("--weights", type=options.PATH, metavar="FILE", help="Weights of that preset.")
@click.option("--device", default="auto", help="auto, cpu, cuda or cuda:N.")
@click.option(
    "--runtime", default="auto", help="Engine: openvino, onnx, fast, plain (the slower reference) or auto."
)
@click.option("--repeats", type=int, default=50, metavar="N", help="Number of timed rounds.")
@click.option(
    "--json", "json_file", type=options.PATH, metavar="FILE", help="Also write the figures to this file."
)
def bench(
    preset: str, weights: Path | None, device: str, runtime: str, repeats: int, json_file: Path | None
) -> int:
    """Stream a rendered drive through the detector and print latency and peak memory.

    A round is timed from images in memory to detected objects. A preset without shipped weights is timed with
    random ones, which take the same time.
    """
    if repeats < 1:
        raise UserError(f"--repeats {repeats}: expected at least 1")
    figures = measure(preset, weights, device, runtime, repeats=repeats)
    latency, processor = figures["latency_ms"], figures["processor_ms"]
    print(f"{figures['preset']} ({figures['weights']}) on {figures['device']}, engine {figures['runtime']}")
    print(f"first round after {figures['ready_s']:.1f} s")
    print(
        f"six 1600x900 images to objects: p50 {latency['p50']:.1f} ms, p95 {latency['p95']:.1f} ms, "
        f"max {latency['max']:.1f} ms ({latency['count']} rounds)"
    )
    print(f"processor time of all threads: p50 {processor['p50']:.1f} ms")
    print(f"peak memory {figures['peak_memory_mb']:.0f} MB ({figures['peak_memory_is']})")
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        write_json(json_file, figures)
    return 0


def measure(preset: str, weights: Path | None, device: str, runtime: str, *, repeats: int) -> dict[str, Any]:
    """Return latency (ms), peak memory (MB) and the seconds until the first round was complete."""
    from ftkd_core.data.synthetic.rig import nuscenes_rig
    from ftkd_core.evaluation import detector_benchmark as measuring
    from ftkd_core.runtime.detector import Detector, resolve_device

    place = resolve_device(device)
    model, weights_name = measuring.load_streaming_model(preset, weights)
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
        "runtime": detector.runtime,
        "latency_ms": times.wall.as_dict(),
        "processor_ms": times.processor.as_dict(),
        "peak_memory_mb": round(measuring.peak_memory_mb(place), 1),
        "peak_memory_is": measuring.peak_memory_definition(place),
        "ready_s": round(ready_s, 2),
    }
