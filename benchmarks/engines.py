# SPDX-License-Identifier: Apache-2.0
"""Engines of the detector on a CPU, side by side: latency, with and without other load, and agreement.

    python -m benchmarks.engines --json FILE

For each preset and number of threads all engines run in one process, interleaved A-B-C-A-B-C over the same
rendered drive with images of the network's size. `ratio_to_fast_before` is the fast engine's median over the
engine's: 1.3 means 1.3 times as fast. The fast engine is the one that was the default on a CPU before
exported engines existed. With `competing_load` another process keeps every core busy at normal priority
meanwhile, as other software of a vehicle does. `processor_ms` is the processor time of all threads of this
process. Differences are the largest over the top 100 boxes of each round whose counterpart is within 2 cm and
0.005; `within` is the share of boxes for which that holds."""

import argparse
import contextlib
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from tqdm import tqdm

from benchmarks.report import report
from ftkd_core.errors import UserError
from ftkd_core.evaluation.detector_benchmark import (
    compare_detectors,
    driving_rounds,
    load_preset_model,
    network_rig,
    time_detectors,
)
from ftkd_core.json_files import write_json
from ftkd_core.models.stream_petr import StreamPETR
from ftkd_core.runtime.detector import Detector
from ftkd_core.runtime.devices import device_name
from ftkd_core.runtime.export import export_onnx
from ftkd_core.runtime.exported_engine import ExportedEngine, OpenSession
from ftkd_core.runtime.sessions import OnnxSession, OpenVinoSession
from ftkd_core.types import CameraRound

_CPU: Final = torch.device("cpu")
ENGINES: Final = ("fast", "onnx", "openvino")
_ROUNDS: Final = 8


def make_detectors(model: StreamPETR, exported: Path, threads: int) -> dict[str, Detector]:
    """A detector per engine, with its number of threads."""
    sessions: dict[str, OpenSession] = {
        "onnx": partial(OnnxSession, device=_CPU, threads=threads),
        "openvino": partial(OpenVinoSession, threads=threads),
    }
    found = {}
    for name in ENGINES:
        runtime = "fast" if name == "fast" else "plain"
        found[name] = Detector(model, weights_name="", device=_CPU, score_threshold=0.0, runtime=runtime)
        if name in sessions:
            found[name].engine = ExportedEngine(exported, model.config, sessions[name])
    return found


def rows_of(
    preset: str, model: StreamPETR, exported: Path, threads: int, load: bool, repeats: int
) -> list[dict[str, Any]]:
    """The figures of all engines of one preset with one number of threads."""
    torch.set_num_threads(threads)
    rounds: Sequence[CameraRound] = driving_rounds(_ROUNDS, network_rig(model))
    detectors = make_detectors(model, exported, threads)
    plain = Detector(model, weights_name="", device=_CPU, score_threshold=0.0, runtime="plain")
    agreements = {name: compare_detectors(plain, each, rounds) for name, each in detectors.items()}
    with competing_load() if load else contextlib.nullcontext():
        times = time_detectors(list(detectors.values()), rounds, repeats=repeats, warm_up=2)
    fast = times[0].wall.p50 or 0.0
    return [
        {
            "preset": preset, "engine": name, "threads": threads, "competing_load": load,
            "median_ms": each.wall.p50, "min_ms": each.wall.min, "processor_ms": each.processor.p50,
            "ratio_to_fast_before": fast / (each.wall.p50 or 1.0),
            "max_center_diff_m": agreements[name].center_m, "max_score_diff": agreements[name].score,
            "within": agreements[name].within, "repeats": repeats,
        }
        for name, each in zip(detectors, times, strict=True)
    ]  # fmt: skip


@contextlib.contextmanager
def competing_load() -> Iterator[None]:
    """Keep every core busy from other processes."""
    context = multiprocessing.get_context("spawn")
    others = [context.Process(target=_spin, daemon=True) for _ in range(os.cpu_count() or 1)]
    for each in others:
        each.start()
    try:
        yield
    finally:
        for each in others:
            each.kill()
            each.join()


def _spin() -> None:
    while True:
        sum(range(100_000))


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.engines",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--presets", default="tiny,r50_704x256_428q", help="comma-separated (default %(default)s)")
    add("--threads", default="1,2", help="numbers of threads (default %(default)s)")
    add("--repeats", type=int, default=20, help="timed rounds of each; a quarter for large presets")
    add("--no-load", action="store_true", help="skip the runs with a competing load")
    add("--json", type=Path, metavar="FILE", help="write the list of figures to this file")
    options = parser.parse_args(argv)
    try:
        counts = options.threads.split(",")
        if options.repeats < 1 or not all(part.isdigit() and int(part) for part in counts):
            raise UserError(f"--repeats {options.repeats} --threads {options.threads}: expected at least 1")
        rows = run(options)
    except UserError as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return 2
    report({"device": device_name(_CPU), "engines": rows}, None)
    if options.json is not None:
        write_json(options.json, rows)
        print(f"wrote {options.json}")
    print(table(rows))
    return 0


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """All rows: presets, with and without load, threads."""
    rows: list[dict[str, Any]] = []
    loads = (False,) if options.no_load else (False, True)
    with tempfile.TemporaryDirectory() as folder:
        for preset in options.presets.split(","):
            model, _ = load_preset_model(preset)
            exported = Path(folder) / f"{preset}.onnx"
            export_onnx(model, exported, weights_hash="")
            repeats = options.repeats if preset == "tiny" else max(1, options.repeats // 4)
            cases = [(int(threads), load) for load in loads for threads in options.threads.split(",")]
            for threads, load in tqdm(cases, desc=preset, unit="case"):
                rows += rows_of(preset, model, exported, threads, load, repeats)
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    names = ("preset", "threads", "load", "engine", "median ms", "min ms", "ratio")
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for row in rows:
        figures = (f"{row['median_ms']:.0f}", f"{row['min_ms']:.0f}", f"{row['ratio_to_fast_before']:.2f}")
        load = "yes" if row["competing_load"] else "no"
        lines.append(f"| {' | '.join((row['preset'], str(row['threads']), load, row['engine'], *figures))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
