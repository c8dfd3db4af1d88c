# SPDX-License-Identifier: Apache-2.0
"""Training throughput of any preset on one device: steps and samples per second, peak memory.

    python -m benchmarks.train_throughput --case r50_704x256_428q:8 --case sparse_bev_r101_704x256_offline:1
    python -m benchmarks.train_throughput --case tiny:16 --precision bf16 --processes 8 --json FILE

A case is PRESET:BATCH; BATCH is streams of a StreamPETR, windows of a SparseBEV. `PRESET:BATCH:stop` trains a
SparseBEV with `gradient_frames=1`. Weights are random with a
seed. Batches of rendered scenes are on the device before the clock starts, so that reading data takes no part
in it (`benchmarks.loader` measures that). Each case is timed alone, unless --processes starts several copies
of it on the same device: their samples per second are added, which shows whether a small model is limited by
the launches of one process. On a GPU float32 uses TF32 in convolutions, PyTorch's default.

A case that does not fit into the device's memory is reported as such, and the next one runs.
"""

import argparse
import gc
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from lightning_fabric import Fabric
from torch.utils.data import Dataset

from benchmarks.report import report
from ftkd_core.data.augmentation import AugmentConfig
from ftkd_core.data.clips import StreamDataset
from ftkd_core.data.synthetic_clips import SyntheticClips
from ftkd_core.data.windows import WindowDataset
from ftkd_core.errors import UserError
from ftkd_core.models.build import build_stream_petr
from ftkd_core.models.sparse_bev import build_sparse_bev
from ftkd_core.percentiles import summarize
from ftkd_core.presets import PRESETS, SPARSE_BEV_PRESETS, preset, sparse_bev_preset
from ftkd_core.runtime.detector import resolve_device
from ftkd_core.runtime.devices import device_name
from training.config import OptimConfig
from training.tasks import StreamingTask, WindowTask
from training.trainer import Trainer

_SCENES, _DURATION_S, _BATCHES, _WARM_UP = 2, 10.0, 3, 3
PRECISIONS: Final = {"fp32": None, "bf16": torch.bfloat16}


class Case(NamedTuple):
    """A preset, the batch it trains on, and whether only the current frame has a gradient."""

    preset: str
    batch: int
    current_only: bool = False

    @property
    def name(self) -> str:
        """PRESET:BATCH or PRESET:BATCH:stop."""
        return f"{self.preset}:{self.batch}{':stop' if self.current_only else ''}"


def read_case(text: str) -> Case:
    """Parse PRESET:BATCH[:stop]. Errors: UserError for an unknown preset, a batch that is no positive number,
    or `stop` for a StreamPETR."""
    name, batch, *rest = [*text.split(":"), ""][: max(2, text.count(":") + 1)]
    known = sorted([*PRESETS, *SPARSE_BEV_PRESETS])
    if name not in known or not batch.isdigit() or not int(batch) or rest not in ([], ["stop"]):
        raise UserError(f"--case {text!r}: expected PRESET:BATCH[:stop] with one of {', '.join(known)}")
    if rest and name in PRESETS:
        raise UserError(f"--case {text!r}: stop is for a SparseBEV; expected {name}:{batch}")
    return Case(name, int(batch), bool(rest))


def measure(case: Case, precision: str, seconds: float, device_text: str, folder: Path) -> dict[str, Any]:
    """Train one case for about `seconds`; median step time, samples per second, peak memory."""
    device = resolve_device(device_text)
    fabric = Fabric(accelerator=device.type, devices=[device.index or 0] if device.type == "cuda" else 1)
    torch.manual_seed(0)
    lesson, data = make_task(case, folder)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    trainer = Trainer(
        fabric, lesson, OptimConfig(), folder, steps=10_000, seed=0, autocast=PRECISIONS[precision]
    )
    trainer.start_training()
    batches = [fabric.to_device(data[step]) for step in range(_BATCHES)]
    times: list[float] = []
    processor, wall = time.process_time(), time.perf_counter()
    for step in range(1_000_000):
        began = time.perf_counter()
        trainer.train_step(batches[step % _BATCHES])
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if step == _WARM_UP - 1:
            processor, wall = time.process_time(), time.perf_counter()
        elif step >= _WARM_UP:
            times.append(1e3 * (time.perf_counter() - began))
            if time.perf_counter() - wall >= seconds:
                break
    median = summarize(times).p50 or 0.0
    return {
        "step_ms": median,
        "samples_per_s": 1e3 * case.batch / median,
        "steps_timed": len(times),
        "processor_cores_used": (time.process_time() - processor) / (time.perf_counter() - wall),
        "peak_memory_gb": torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None,
    }


def make_task(case: Case, folder: Path) -> tuple[StreamingTask | WindowTask, Dataset[Any]]:
    """What trains the case's model, and the data it trains on."""
    if case.preset in PRESETS:
        config = preset(case.preset)
        clips = SyntheticClips(0, config.image, folder, _DURATION_S)
        data = StreamDataset(
            clips, _SCENES, num_streams=case.batch, segment=10, augment=AugmentConfig(), seed=0
        )
        return StreamingTask(build_stream_petr(config), case.batch), data
    window = sparse_bev_preset(case.preset)
    windows = WindowDataset(
        SyntheticClips(0, window.image, folder, _DURATION_S), _SCENES, batch=case.batch,
        num_past=window.num_past, num_future=window.num_future, augment=AugmentConfig(), seed=0,
    )  # fmt: skip
    task = WindowTask(build_sparse_bev(window), gradient_frames=int(case.current_only))
    return task, windows


def measure_several(
    case: Case, precision: str, seconds: float, device: str, folder: Path, processes: int, threads: int
) -> dict[str, Any]:
    """Train `processes` copies of one case at the same time; samples per second are their sum."""
    if processes == 1:
        found = measure(case, precision, seconds, device, folder)
        gc.collect()
        if resolve_device(device).type == "cuda":
            torch.cuda.empty_cache()
        return found
    context = multiprocessing.get_context("spawn")
    starts = partial(torch.set_num_threads, threads or 1)
    with ProcessPoolExecutor(processes, mp_context=context, initializer=starts) as pool:
        work = [pool.submit(measure, case, precision, seconds, device, folder) for _ in range(processes)]
        found_all = [each.result() for each in work]
    return {
        "processes": processes,
        "step_ms": max(each["step_ms"] for each in found_all),
        "samples_per_s": sum(each["samples_per_s"] for each in found_all),
        "samples_per_s_each": [round(each["samples_per_s"], 2) for each in found_all],
    }


def run(
    cases: Sequence[Case], precisions: Sequence[str], *, seconds: float, device: str, processes: int,
    threads: int,
) -> dict[str, Any]:  # fmt: skip
    """All figures of the cases, by case and precision."""
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for case in cases:
            config = preset(case.preset) if case.preset in PRESETS else sparse_bev_preset(case.preset)
            SyntheticClips(0, config.image, folder, _DURATION_S).render_all(_SCENES)
            for precision in precisions:
                key = f"{case.name}:{precision}"
                try:
                    result[key] = measure_several(
                        case, precision, seconds, device, folder, processes, threads
                    )
                except torch.OutOfMemoryError as error:
                    result[key] = {"out_of_memory": str(error).partition(". ")[0]}
                print(f"{key}: {result[key]}", file=sys.stderr, flush=True)
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.train_throughput",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--case", action="append", default=[], metavar="PRESET:BATCH", help="what to train (default tiny:2)")
    add("--precision", choices=(*PRECISIONS, "both"), default="both", help="both (default), fp32 or bf16")
    add("--seconds", type=float, default=10.0, help="how long each case is timed (default 10)")
    add("--processes", type=int, default=1, help="copies of a case at the same time (default 1)")
    add("--threads", type=int, default=0, help="CPU threads of a process (0: PyTorch's choice)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default auto)")
    add("--note", help="stored in the JSON, such as who else used the machine")
    add("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    options = parser.parse_args(argv)
    try:
        if options.processes < 1 or options.seconds <= 0:
            raise UserError("--processes and --seconds: expected at least 1, and more than 0")
        cases = [read_case(text) for text in options.case or ["tiny:2"]]
        if options.threads:
            torch.set_num_threads(options.threads)
        precisions = tuple(PRECISIONS) if options.precision == "both" else (options.precision,)
        result = run(
            cases, precisions, seconds=options.seconds, device=options.device, processes=options.processes,
            threads=options.threads,
        )  # fmt: skip
        device = device_name(resolve_device(options.device))
    except UserError as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return 2
    report({"device": device, "cases": result}, options.json, options.note)
    return 0


if __name__ == "__main__":
    sys.exit(main())
