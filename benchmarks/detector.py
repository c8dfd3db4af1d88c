# SPDX-License-Identifier: Apache-2.0
"""The detector against its plain twin: latency, memory, agreement.

    python -m benchmarks.detector --preset r50_704x256_428q --json FILE

Both run in one process, interleaved A-B-A-B, over the same rendered drive, from images in host memory to
objects in host memory. The first latency is with images of the network's size (nothing to scale); the second,
`latency_camera_ms`, with 1600x900 images, which the plain twin scales with OpenCV on the host. `processor_ms`
is the processor time of all threads, for a CPU that others use too. The plain twin
is float32, eager, NCHW, on a GPU with attention as plain matrix products, and computes the geometry anew in
each frame.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import device_name, report
from ftkd_core.data.synthetic.rig import nuscenes_rig
from ftkd_core.errors import UserError
from ftkd_core.runtime.detector import Detector, resolve_device
from ftkd_core.runtime.fast import FastEngine
from ftkd_core.runtime.measure import (
    StepTimes,
    compare_detectors,
    count_gflops,
    count_parameters,
    driving_rounds,
    network_rig,
    peak_memory_mb,
    peak_memory_meaning,
    preset_model,
    reset_peak_memory,
    time_detectors,
)

_ROUNDS = 8
_DEFAULT_REPEATS = {"cuda": (200, 50), "cpu": (20, 2)}  # timed and warm-up runs


def run(
    preset: str, device: torch.device, *, repeats: int | None, weights: Path | None, compiled: bool | None
) -> dict[str, Any]:
    """All figures of one preset on one device."""
    timed, warm_up = _DEFAULT_REPEATS["cuda" if device.type == "cuda" else "cpu"]
    timed = repeats or timed
    model, weights_name = preset_model(preset, weights)
    rounds = driving_rounds(_ROUNDS, network_rig(model))
    gflops = count_gflops(model, rounds[0])

    def detector(runtime: str) -> Detector:
        return Detector(model, weights_name=weights_name, device=device, score_threshold=0.0, runtime=runtime)

    reset_peak_memory(device)
    fast = detector("fast")
    if compiled is not None:
        fast.engine = FastEngine(model, device, fast.max_detections, compiled=compiled)
    began = time.perf_counter()
    for camera_round in rounds[:2]:
        fast.step(camera_round)
    ready_s = time.perf_counter() - began
    peak = peak_memory_mb(device)  # before the twin takes any
    plain = detector("plain")

    agreement = compare_detectors(plain, fast, rounds)
    times = time_detectors([fast, plain], rounds, repeats=timed, warm_up=warm_up)
    camera_rounds = driving_rounds(2, nuscenes_rig())
    camera_times = time_detectors([fast, plain], camera_rounds, repeats=timed, warm_up=warm_up)
    return {
        "device": device_name(device),
        "preset": preset,
        "weights": weights_name,
        **_figures(times, ""),
        **_figures(camera_times, "_camera"),
        "peak_memory_mb": peak,
        "peak_memory_is": peak_memory_meaning(device) + ", before the plain twin is made",
        "max_center_diff_m": agreement.center_m,
        "agreement": vars(agreement) | {"meaning": "top 100 of each of 8 rounds, all scores, streaming"},
        "params": count_parameters(model),
        "gflops": gflops,
        "gflops_are": "FlopCounterMode of one frame, batch 1: a multiply-add is 2 flops",
        "ready_s": ready_s,
        "network_dtype": str(fast.engine.dtype) if isinstance(fast.engine, FastEngine) else "float32",
        "runs": {"timed": timed, "warm_up": warm_up, "order": "interleaved A-B-A-B", "figure": "median"},
    }


def _figures(times: Sequence[StepTimes], suffix: str) -> dict[str, Any]:
    """Medians of the detector and its twin, and the twin's over the detector's."""
    result: dict[str, Any] = {}
    for name, ratio, summaries in (
        (f"latency{suffix}_ms", f"ratio{suffix}", [t.wall for t in times]),
        (f"processor{suffix}_ms", f"ratio{suffix}_processor", [t.processor for t in times]),
    ):
        fast, plain = (summary.p50 or 0.0 for summary in summaries)
        result |= {name: {"detector": fast, "plain_twin": plain}, ratio: plain / fast}
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.detector",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--preset", default="tiny", help="tiny (default), r50_704x256_428q, ...")
    parser.add_argument(
        "--weights", type=Path, metavar="FILE", help="default: shipped, or random with a seed"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default auto)")
    parser.add_argument(
        "--repeats", type=int, metavar="N", help="timed runs of each (default 200 on a GPU, 20 on a CPU)"
    )
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="torch.compile the network (default: on a GPU only)",
    )
    parser.add_argument("--note", help="said in the JSON, such as who else used the machine")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    options = parser.parse_args(argv)
    try:
        if options.repeats is not None and options.repeats < 1:
            raise UserError(f"--repeats {options.repeats}: expected at least 1")
        result = run(
            options.preset,
            resolve_device(options.device),
            repeats=options.repeats,
            weights=options.weights,
            compiled=options.compile,
        )
    except UserError as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return 2
    report(result, options.json, options.note)
    return 0


if __name__ == "__main__":
    sys.exit(main())
