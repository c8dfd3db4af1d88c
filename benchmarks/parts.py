# SPDX-License-Identifier: Apache-2.0
"""Time of the parts of a frame, and stability over a long stream.

    python -m benchmarks.parts --preset r50_704x256_428q --json FILE

All figures are medians of the fast engine in one process, interleaved, with images of the network's size;
`images` is the exception in both.

- `backbone`: a whole step (images in host memory to objects in host memory) and the backbone alone, compiled
  and captured as in the engine; `rest_over_backbone` is the rest of the step relative to the backbone.
- `memory`: the preset compared with the same number of queries and a memory of one slot (with random
  weights, which cost the same).
- `stream`: a detector after --frames frames of one stream compared with one after 20 frames; the growth of
  its memory, its recompilations, and how often the host waited for the GPU before it fetched the objects.
- `images`: six 1600x900 images to the network's input, in the engine and on one core with OpenCV.

Exit code 2 for invalid options.
"""

import argparse
import itertools
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import cv2
import torch
from tqdm import tqdm

from benchmarks.report import report
from ftkd_core.data.synthetic.rig import nuscenes_rig
from ftkd_core.errors import UserError
from ftkd_core.evaluation.detector_benchmark import (
    WEIGHTS_SEED,
    driving_rounds,
    load_preset_model,
    network_rig,
    peak_memory_definition,
    peak_memory_mb,
)
from ftkd_core.evaluation.latency import time_alternating
from ftkd_core.models.build import build_stream_petr
from ftkd_core.models.stream_petr import StreamPETR
from ftkd_core.runtime.compiling import compile_separately
from ftkd_core.runtime.detector import Detector, resolve_device
from ftkd_core.runtime.devices import device_context, device_name
from ftkd_core.runtime.fast import FastEngine
from ftkd_core.runtime.header import Header, pack_header
from ftkd_core.runtime.preprocess import round_rig, stack_images
from ftkd_core.runtime.replay import Replay
from ftkd_core.runtime.uploads import CpuImages, DeviceImages
from ftkd_core.types import CameraRound

EARLY: Final = 20
_ROUNDS = 8
_PERIOD_NS: Final = 500_000_000
_PROTOCOL: Final = {"cuda": (200, 50, 2000), "cpu": (20, 2, 200)}
"""Timed runs, warm-up runs and frames of the long stream, by kind of device."""

Counts = tuple[int, int]
"""Timed and warm-up runs."""


def fast_detector(model: StreamPETR, device: torch.device) -> Detector:
    """Create a detector with the fast engine and a score threshold of 0."""
    return Detector(model, weights_name="", device=device, score_threshold=0.0, runtime="fast")


def endless(rounds: Sequence[CameraRound]) -> Iterator[CameraRound]:
    """Repeat a drive forwards and backwards over the rounds with increasing stamps."""
    there_and_back = [*rounds, *rounds[-2:0:-1]]
    number = 0
    while True:
        chosen = there_and_back[number % len(there_and_back)]
        yield replace(chosen, reference_stamp_ns=number * _PERIOD_NS)
        number += 1


def stepper(detector: Detector, rounds: Sequence[CameraRound]) -> Callable[[], Any]:
    """Return a function that steps through an endless drive."""
    drive = endless(rounds)
    return lambda: detector.step(next(drive))


def medians(steps: Sequence[Callable[[], Any]], counts: Counts, device: torch.device) -> list[float]:
    """Return the median milliseconds of interleaved steps."""
    summaries = time_alternating(steps, runs=counts[0], warm_up=counts[1], device=device)
    return [summary.p50 or 0.0 for summary in summaries]


def backbone_share(detector: Detector, rounds: Sequence[CameraRound], counts: Counts) -> dict[str, float]:
    """Time a whole step, and its backbone alone."""
    engine, config = detector.engine, detector.config
    assert isinstance(engine, FastEngine)
    device, half = engine.device, engine.dtype != torch.float32
    backbone: Callable[..., Any] = engine.model.backbone

    def run(images: torch.Tensor) -> Any:
        with torch.autocast(device.type, dtype=engine.dtype if half else None, enabled=half):
            return backbone(images)

    chosen = compile_separately(run) if device.type == "cuda" else run
    shape = (len(config.channels), 3, config.image.height, config.image.width)
    with torch.inference_mode(), device_context(device):
        torch.manual_seed(WEIGHTS_SEED)
        images = torch.randn(shape, device=device).contiguous(memory_format=torch.channels_last)
        alone = Replay(lambda: chosen(images), device)
        step, backbone_ms = medians([stepper(detector, rounds), alone], counts, device)
    return {
        "step_ms": step,
        "backbone_ms": backbone_ms,
        "rest_over_backbone": (step - backbone_ms) / backbone_ms,
    }


def memory_cost(
    model: StreamPETR, rounds: Sequence[CameraRound], device: torch.device, counts: Counts
) -> dict[str, float]:
    """Compare the preset's detector with one of the same number of queries whose memory has one slot."""
    decoder = model.config.decoder
    queries = decoder.num_queries + decoder.num_propagated - 1
    without = replace(decoder, num_queries=queries, num_propagated=1, memory_length=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(WEIGHTS_SEED)
        other = build_stream_petr(replace(model.config, decoder=without))
    steps = [stepper(fast_detector(each, device), rounds) for each in (model, other)]
    on, off = medians(steps, counts, device)
    return {"on_ms": on, "off_ms": off, "on_over_off": on / off}


def long_stream(
    model: StreamPETR, rounds: Sequence[CameraRound], device: torch.device, frames: int, counts: Counts
) -> dict[str, float | int | str | None]:
    """Compare a detector late in a stream with another early in it, and count growth and recompilations of
    the first."""
    aged, fresh = (fast_detector(model, device) for _ in range(2))
    drive, new = endless(rounds), stepper(fresh, rounds)
    for _ in range(EARLY):
        aged.step(next(drive))
    before, compiled = memory_bytes(device), compilations()
    waits = count_waits(aged, itertools.islice(drive, frames - EARLY), device)
    grown, compiled = memory_bytes(device) - before, compilations() - compiled
    for _ in range(EARLY):
        new()
    late, early = medians([lambda: aged.step(next(drive)), new], counts, device)
    return {
        "frames": frames,
        "late_ms": late,
        "early_ms": early,
        "late_over_early": late / early,
        "grown_bytes": grown,
        "grown_bytes_are": _memory_definition(device),
        "compiled_again": compiled,
        "host_waits_in_start": waits,
    }


def memory_bytes(device: torch.device) -> int:
    """Return the allocated memory on a GPU, or the peak size of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return round(peak_memory_mb(device) * 1e6)


def _memory_definition(device: torch.device) -> str:
    return "allocated on the GPU" if device.type == "cuda" else peak_memory_definition(device)


def compilations() -> int:
    """Return the number of graphs that torch has compiled in this process."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def count_waits(detector: Detector, drive: Iterable[CameraRound], device: torch.device) -> int | None:
    """Step through rounds and count torch's warnings that the host waits for the GPU in `start`, before the
    objects are fetched; None on a CPU."""
    on_gpu = device.type == "cuda"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for camera_round in tqdm(drive, desc="stream", unit="frame"):
            if on_gpu:
                torch.cuda.set_sync_debug_mode("warn")
            try:
                fetch = detector.start(camera_round)
            finally:
                if on_gpu:
                    torch.cuda.set_sync_debug_mode("default")
            fetch()
    return sum("synchroniz" in str(warning.message) for warning in caught) if on_gpu else None


def image_cost(model: StreamPETR, device: torch.device, counts: Counts) -> dict[str, float]:
    """Time camera images to the network's input, in the engine and with OpenCV on one core."""
    config = model.config
    (camera_round,) = driving_rounds(1, nuscenes_rig())
    rig = round_rig(camera_round, config.image, config.channels)
    on_gpu = device.type == "cuda"
    kind, compiler = (DeviceImages, compile_separately) if on_gpu else (CpuImages, lambda function: function)
    with torch.inference_mode(), device_context(device):
        images = kind(config.image, len(config.channels), device, compiler)
        header = Header(len(config.channels), device)
        header.upload(pack_header(rig, camera_round.global_from_ego, 0.0, True))
        threads = cv2.getNumThreads()
        cv2.setNumThreads(1)
        try:
            (one_core,) = medians([lambda: stack_images(camera_round.views, config.image)], counts, device)
        finally:
            cv2.setNumThreads(threads)
        (engine,) = medians([lambda: images.upload(camera_round.views, header.device_values)], counts, device)
    return {"engine_ms": engine, "one_core_ms": one_core, "one_core_over_engine": one_core / engine}


def run(
    preset: str, device: torch.device, *, repeats: int | None = None, warm_up: int | None = None,
    frames: int | None = None, weights: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Measure all figures of one preset on one device."""
    usual = _PROTOCOL[device.type]
    counts = repeats or usual[0], usual[1] if warm_up is None else warm_up
    model, weights_name = load_preset_model(preset, weights)
    rounds = driving_rounds(_ROUNDS, network_rig(model))
    detector = fast_detector(model, device)
    return {
        "device": device_name(device),
        "preset": preset,
        "weights": weights_name,
        "backbone": backbone_share(detector, rounds, counts),
        "memory": memory_cost(model, rounds, device, counts),
        "images": image_cost(model, device, counts),
        "stream": long_stream(model, rounds, device, frames or usual[2], counts),
        "runs": {
            "timed": counts[0],
            "warm_up": counts[1],
            "order": "interleaved A-B-A-B",
            "figure": "median",
        },
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.parts",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--preset", default="tiny", help="tiny (default), r50_704x256_428q, ...")
    add("--weights", type=Path, metavar="FILE", help="default: shipped, or random with a seed")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default auto)")
    add("--repeats", type=int, metavar="N", help="timed runs (default 200 on a GPU, 20 on a CPU)")
    add("--warm-up", type=int, metavar="N", help="warm-up runs (default 50 on a GPU, 2 on a CPU)")
    add(
        "--frames",
        type=int,
        metavar="N",
        help="frames of the long stream (default 2000 on a GPU, 200 on a CPU)",
    )
    add("--note", help="text for the JSON, such as other load on the machine")
    add("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    options = parser.parse_args(argv)
    try:
        for name, least in (("repeats", 1), ("warm_up", 0), ("frames", EARLY)):
            value = getattr(options, name)
            if value is not None and value < least:
                raise UserError(f"--{name.replace('_', '-')} {value}: expected at least {least}")
        result = run(
            options.preset, resolve_device(options.device), repeats=options.repeats,
            warm_up=options.warm_up, frames=options.frames, weights=options.weights,
        )  # fmt: skip
    except UserError as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return 2
    report(result, options.json, options.note)
    return 0


if __name__ == "__main__":
    sys.exit(main())
