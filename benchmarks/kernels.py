# SPDX-License-Identifier: Apache-2.0
"""Where the time of a frame or of a training step goes, operator by operator, as torch's profiler sees it.

    python -m benchmarks.kernels --preset r50_704x256_428q --runtime fast --json FILE
    python -m benchmarks.kernels --preset tiny --training --batch 16 --json FILE

Lists the kernels (on a CPU the operators) that take most time, with calls and milliseconds per frame or step.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch.profiler import ProfilerActivity, profile

from benchmarks.parts import stepper
from benchmarks.report import report
from benchmarks.train_throughput import PRECISIONS, Case, make_task
from ftkd_core.data.synthetic_clips import SyntheticClips
from ftkd_core.errors import UserError
from ftkd_core.evaluation.detector_benchmark import driving_rounds, load_preset_model, network_rig
from ftkd_core.presets import PRESETS, preset, sparse_bev_preset
from ftkd_core.runtime.detector import Detector, resolve_device
from ftkd_core.runtime.devices import device_name
from training.config import OptimConfig
from training.trainer import Trainer

_WARM_UP, _ROUNDS = 5, 4


def detector_step(name: str, runtime: str, device: torch.device) -> Callable[[], Any]:
    """A function that detects the next round of a drive."""
    model, _ = load_preset_model(name)
    detector = Detector(model, weights_name="", device=device, score_threshold=0.0, runtime=runtime)
    return stepper(detector, driving_rounds(_ROUNDS, network_rig(model)))


def training_step(case: Case, precision: str, device: torch.device, folder: Path) -> Callable[[], Any]:
    """A function that trains one step, always on the same batch."""
    config = preset(case.preset) if case.preset in PRESETS else sparse_bev_preset(case.preset)
    SyntheticClips(0, config.image, folder, 10.0).render_all(2)
    task, data = make_task(case, folder)
    fabric = Fabric(accelerator=device.type, devices=[device.index or 0] if device.type == "cuda" else 1)
    trainer = Trainer(
        fabric, task, OptimConfig(), folder, steps=10_000, seed=0, autocast=PRECISIONS[precision]
    )
    trainer.start_training()
    batch = fabric.to_device(data[0])
    return lambda: trainer.train_step(batch)


def profile_steps(step: Callable[[], Any], device: torch.device, count: int, top: int) -> dict[str, Any]:
    """Profile `count` steps after a warm-up; the `top` kernels (CPU: operators) by their own time."""
    on_gpu = device.type == "cuda"
    for _ in range(_WARM_UP if on_gpu else 1):
        step()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as found:
        for _ in range(count):
            step()
        if on_gpu:
            torch.cuda.synchronize(device)
    rows = []
    for event in found.key_averages():
        if event.device_type.name != ("CUDA" if on_gpu else "CPU"):
            continue
        spent = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        rows.append((spent / 1e3 / count, event.count / count, event.key[:120]))
    rows.sort(reverse=True)
    return {
        "total_ms": sum(row[0] for row in rows),
        "calls": sum(row[1] for row in rows),
        "top": [{"ms": ms, "calls": calls, "name": name} for ms, calls, name in rows[:top]],
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--preset", default="tiny", help="tiny (default), r50_704x256_428q, ...")
    add("--runtime", default="fast", help="engine of the detector (default fast)")
    add("--training", action="store_true", help="a training step instead of a frame")
    add("--batch", type=int, default=2, help="batch of the training step (default 2)")
    add("--precision", choices=tuple(PRECISIONS), default="fp32", help="of the training step (default fp32)")
    add("--steps", type=int, default=5, help="frames or steps that are profiled (default 5)")
    add("--top", type=int, default=25, help="rows of the list (default 25)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default auto)")
    add("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    options = parser.parse_args(argv)
    try:
        device = resolve_device(options.device)
        with tempfile.TemporaryDirectory() as folder:
            if options.training:
                case = Case(options.preset, options.batch)
                step = training_step(case, options.precision, device, Path(folder))
            else:
                step = detector_step(options.preset, options.runtime, device)
            result = profile_steps(step, device, options.steps, options.top)
    except UserError as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return 2
    what = {"training": f"{options.batch}, {options.precision}"} if options.training else {}
    what |= {} if options.training else {"runtime": options.runtime}
    report({"device": device_name(device), "preset": options.preset, **what, **result}, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
