# SPDX-License-Identifier: Apache-2.0
"""Compare the detector with its plain twin: latency, memory, agreement.

    python -m benchmarks.detector --preset r50_704x256_428q --json FILE

Both run in one process, interleaved A-B-A-B, over the same rendered drive, from images in host memory to
objects in host memory. `latency_ms` uses images of the network's size (no scaling); `latency_camera_ms` uses
1600x900 images, which the plain twin scales with OpenCV on the host. `processor_ms` is the processor time of
all threads, which depends little on other load. The plain twin is float32, eager and NCHW, computes the
geometry in each frame, and uses no TF32 and attention as plain matrix products on a GPU.

Exit code 1, after the figures are written, if the two disagree: of the twin's top 100 boxes in each of 8
rounds, less than 99 % (95 % in float16, 80 % in bfloat16) have a counterpart within 2 cm and a score
difference of 0.005. Exit code 2 for invalid options.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import report
from ftkd_core.data.synthetic.rig import nuscenes_rig
from ftkd_core.errors import UserError
from ftkd_core.evaluation.detector_benchmark import (
    TOLERANCE_M,
    TOLERANCE_SCORE,
    Agreement,
    StepTimes,
    compare_detectors,
    count_gflops,
    count_parameters,
    driving_rounds,
    load_preset_model,
    network_rig,
    peak_memory_definition,
    peak_memory_mb,
    reset_peak_memory,
    time_detectors,
)
from ftkd_core.models.stream_petr import StreamPETR
from ftkd_core.runtime.detector import Detector, resolve_device
from ftkd_core.runtime.devices import device_context, device_name, tf32_allowed
from ftkd_core.runtime.fast import FastEngine
from ftkd_core.types import CameraRound

_ROUNDS = 8
_PROTOCOL = (200, 50)  # timed and warm-up runs
_CPU_PROTOCOL = (20, 2)  # a large preset takes seconds per frame there
_LEAST_WITHIN = {torch.float32: 0.99, torch.float16: 0.95, torch.bfloat16: 0.80}
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def run(
    preset: str,
    device: torch.device,
    *,
    repeats: int | None = None,
    warm_up: int | None = None,
    weights: Path | None = None,
    compiled: bool | None = None,
    dtype: torch.dtype | None = None,
) -> dict[str, Any]:
    """Measure all figures of one preset on one device."""
    usual = _PROTOCOL if device.type == "cuda" else _CPU_PROTOCOL
    counts = repeats or usual[0], usual[1] if warm_up is None else warm_up
    model, weights_name = load_preset_model(preset, weights)
    rounds = driving_rounds(_ROUNDS, network_rig(model))
    fast, fast_alone = _measure_alone(model, device, compiled, dtype, rounds)
    assert isinstance(fast.engine, FastEngine)
    plain = Detector(model, weights_name="", device=device, score_threshold=0.0, runtime="plain")
    agreement = compare_detectors(plain, fast, rounds)
    times = time_detectors([fast, plain], rounds, repeats=counts[0], warm_up=counts[1])
    camera_rounds = driving_rounds(2, nuscenes_rig())
    camera_times = time_detectors([fast, plain], camera_rounds, repeats=counts[0], warm_up=counts[1])
    return {
        "device": device_name(device),
        "preset": preset,
        "weights": weights_name,
        **_figures(times, ""),
        **_figures(camera_times, "_camera"),
        **fast_alone,
        "max_center_diff_m": agreement.center_m,
        "agreement": _agreement(agreement, fast.engine.dtype),
        "params": count_parameters(model),
        "params_at_inference": count_parameters(model, at_inference=True),
        "gflops": count_gflops(model, rounds[0]),
        "gflops_are": "FlopCounterMode of one frame, batch 1: a multiply-add is 2 flops",
        "network_dtype": str(fast.engine.dtype),
        "tf32": _tf32(device),
        "runs": _runs(*counts),
    }


def _measure_alone(
    model: StreamPETR,
    device: torch.device,
    compiled: bool | None,
    dtype: torch.dtype | None,
    rounds: Sequence[CameraRound],
) -> tuple[Detector, dict[str, Any]]:
    """Create the fast detector and measure its memory and start-up time before other models take memory."""
    reset_peak_memory(device)
    fast = Detector(model, weights_name="", device=device, score_threshold=0.0, runtime="fast")
    if compiled is not None or dtype is not None:
        fast.engine = FastEngine(model, device, fast.max_detections, compiled=compiled, dtype=dtype)
    began = time.perf_counter()
    for camera_round in rounds[:2]:
        fast.step(camera_round)
    return fast, {
        "peak_memory_mb": peak_memory_mb(device),
        "peak_memory_is": peak_memory_definition(device) + ", before the plain twin is made",
        "ready_s": time.perf_counter() - began,
    }


def _runs(timed: int, warm_up: int) -> dict[str, Any]:
    return {
        "timed": timed,
        "warm_up": warm_up,
        "order": "interleaved A-B-A-B",
        "figure": "median",
        "protocol": "at least {} timed after {}".format(*_PROTOCOL),
        "meets_protocol": timed >= _PROTOCOL[0] and warm_up >= _PROTOCOL[1],
    }


def _agreement(agreement: Agreement, dtype: torch.dtype) -> dict[str, Any]:
    least = _LEAST_WITHIN[dtype]
    return vars(agreement) | {
        "is_close": agreement.within >= least,
        "tolerance": f"{least:.0%} within {TOLERANCE_M} m and {TOLERANCE_SCORE} of score",
        "meaning": f"top 100 of each of {_ROUNDS} rounds, all scores, streaming",
    }


def _tf32(device: torch.device) -> bool:
    """Whether the engines compute float32 in TF32; they share the setting."""
    with device_context(device):
        return tf32_allowed(device)


def _figures(times: Sequence[StepTimes], suffix: str) -> dict[str, Any]:
    """Return medians of the detector and its twin, and the ratio of the twin's to the detector's."""
    result: dict[str, Any] = {}
    for name, ratio, summaries in (
        (f"latency{suffix}_ms", f"ratio{suffix}", [t.wall for t in times]),
        (f"processor{suffix}_ms", f"ratio{suffix}_processor", [t.processor for t in times]),
    ):
        fast, plain = (summary.p50 or 0.0 for summary in summaries)
        result |= {name: {"detector": fast, "plain_twin": plain}, ratio: plain / fast}
    return result


def _make_parser() -> argparse.ArgumentParser:
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
        "--warm-up", type=int, metavar="N", help="warm-up runs of each (default 50 on a GPU, 2 on a CPU)"
    )
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="torch.compile the network (default: on a GPU only)",
    )
    parser.add_argument(
        "--dtype",
        choices=tuple(_DTYPES),
        help="dtype of the fast engine's matrices (default: float16 on a GPU)",
    )
    parser.add_argument("--note", help="text for the JSON, such as other load on the machine")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    options = _make_parser().parse_args(argv)
    try:
        if options.repeats is not None and options.repeats < 1:
            raise UserError(f"--repeats {options.repeats}: expected at least 1")
        if options.warm_up is not None and options.warm_up < 0:
            raise UserError(f"--warm-up {options.warm_up}: expected at least 0")
        result = run(
            options.preset,
            resolve_device(options.device),
            repeats=options.repeats,
            warm_up=options.warm_up,
            weights=options.weights,
            compiled=options.compile,
            dtype=_DTYPES.get(options.dtype),
        )
    except UserError as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return 2
    report(result, options.json, options.note)
    if not result["agreement"]["is_close"]:
        print("benchmark: the detector and its plain twin disagree, see `agreement`", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
