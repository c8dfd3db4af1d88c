# SPDX-License-Identifier: Apache-2.0
"""Everything that only a GPU can show, in one prepared run: tests, detector, training, loader, kernels.

    python -m benchmarks.gpu --minutes 7 --out DIR

GPU time is rare, so the command runs by itself. The stages come in order of worth. Each is a process of its
own with a time cap, so that no stage can stop the next one; DIR/gpu.json is written again after each stage,
so that an interrupted run keeps what was measured. DIR/gpu.log holds what the stages printed. The first stage
also compiles what later stages time, on all cores at once: torch keeps compiled code in a cache on disk.

Needs PyTorch with CUDA, OpenCV, SciPy, safetensors, tqdm, PyYAML, pydantic, Lightning Fabric and pytest. A
stage whose packages are missing (the loader needs the nuScenes devkit) is reported as skipped, with the
reason.

`--rehearse` runs every stage on a CPU with small sizes, to find mistakes before the GPU is there.
Exit codes: 0 all stages ended well, 1 a stage failed or had no time left, 2 bad options.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks.gpu_options import base_parser, choose, end, require_gpu
from benchmarks.report import environment, rounded, write_figures
from ftkd_core.errors import UserError

_SUMMARY: Final = "To keep the figures: cp {out}/gpu.json benchmarks/results/gpu.json, and commit it."
_R50, _TEACHER = "r50_704x256_428q", "sparse_bev_r101_704x256_offline"
_TEST_FILE: Final = "tests/core/test_runtime_gpu.py"


@dataclass(frozen=True)
class Stage:
    """A part of the run: its command (a module of Python and its arguments) and its largest share of time.

    rehearsal: the arguments on a CPU. needs: packages without which the stage is skipped. beside: commands
    that run at the same time and whose figures nobody reads (they fill the cache of compiled code).
    """

    name: str
    command: tuple[str, ...]
    cap_s: float
    rehearsal: tuple[str, ...]
    needs: tuple[str, ...] = ()
    beside: tuple[tuple[str, ...], ...] = ()
    writes_json: bool = True


def _detector(preset: str, dtype: str, cap_s: float) -> Stage:
    command = ("benchmarks.detector", "--preset", preset, "--dtype", dtype)
    rehearsal = ("benchmarks.detector", "--preset", "tiny", "--repeats", "1", "--warm-up", "0")
    return Stage(f"detector_{preset}_{dtype}", command, cap_s, rehearsal)


def _throughput(name: str, cap_s: float, *arguments: str) -> Stage:
    rehearsal = ("benchmarks.train_throughput", "--case", "tiny:1", "--seconds", "0.1", "--precision", "fp32")
    return Stage(name, ("benchmarks.train_throughput", *arguments), cap_s, rehearsal)


def _kernels(name: str, cap_s: float, *arguments: str) -> Stage:
    rehearsal = ("benchmarks.kernels", "--preset", "tiny", "--steps", "1", "--top", "5")
    return Stage(name, ("benchmarks.kernels", *arguments), cap_s, rehearsal)


STAGES: Final = (
    Stage(
        "tests",
        ("pytest", "-m", "gpu", "-v", "-n", "8", "-p", "no:cacheprovider", _TEST_FILE),
        200,
        ("pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", "--collect-only", _TEST_FILE),
        needs=("pytest", "xdist", "pytest_timeout", "hypothesis"),
        beside=tuple(
            ("benchmarks.detector", "--preset", preset, "--dtype", dtype, "--repeats", "1", "--warm-up", "0")
            for preset in (_R50, "tiny")
            for dtype in ("float16", "float32")
        ),
        writes_json=False,
    ),
    _detector(_R50, "float16", 120),
    _detector("tiny", "float16", 60),
    Stage(
        "parts_r50",
        ("benchmarks.parts", "--preset", _R50),
        120,
        ("benchmarks.parts", "--preset", "tiny", "--repeats", "1", "--warm-up", "0", "--frames", "21"),
    ),
    _kernels("kernels_r50", 60, "--preset", _R50),
    _throughput("training_student_r50", 60, "--case", f"{_R50}:8", "--seconds", "8"),
    _throughput("training_teacher_r101", 60, "--case", f"{_TEACHER}:1", "--seconds", "8"),
    _throughput(
        "training_tiny", 60, "--case", "tiny:16", "--case", "sparse_bev_tiny_offline:16", "--seconds", "5"
    ),
    _throughput(
        "training_tiny_8_processes", 60, "--case", "tiny:16", "--seconds", "8", "--processes", "8",
        "--threads", "2", "--precision", "bf16",
    ),
    _detector(_R50, "float32", 60),
    _detector("tiny", "float32", 40),
    _kernels("kernels_training_tiny", 40, "--preset", "tiny", "--training", "--batch", "16", "--steps", "2"),
    Stage(
        "distillation_step",
        ("benchmarks.train_step", "--streams", "16", "--repeats", "10"),
        60,
        ("benchmarks.train_step", "--streams", "1", "--repeats", "1", "--threads", "1"),
    ),
    Stage(
        "loader",
        ("benchmarks.loader", "--workers", "0,8,15", "--seconds", "5"),
        60,
        ("benchmarks.loader", "--preset", "tiny", "--workers", "0", "--seconds", "0.1", "--streams", "1"),
        needs=("nuscenes",),
    ),
)  # fmt: skip


class Run:
    """The stages of one run: starts each, keeps its outcome, and writes gpu.json after each."""

    def __init__(self, out: Path, minutes: float, *, rehearse: bool) -> None:
        self.out, self.rehearse = out, rehearse
        self.ends = time.monotonic() + 60 * minutes
        self.stages: dict[str, Any] = {}
        self.environment = dict(os.environ)
        self.environment["PYTHONPATH"] = os.pathsep.join(filter(None, [".", os.environ.get("PYTHONPATH")]))

    def all(self, stages: Sequence[Stage]) -> bool:
        """Run the stages in order; whether all of them ended well or were skipped for a missing package."""
        with (self.out / "gpu.log").open("w", encoding="utf-8") as log:
            for stage in stages:
                began = time.monotonic()
                outcome = self._one(stage, log)
                self.stages[stage.name] = outcome | {"seconds": round(time.monotonic() - began, 1)}
                self._write()
                print(f"{stage.name}: {outcome['outcome']}, {time.monotonic() - began:.0f} s", flush=True)
        return all(each["outcome"] in ("ok", "skipped") for each in self.stages.values())

    def _one(self, stage: Stage, log: Any) -> dict[str, Any]:
        missing = [name for name in stage.needs if find_spec(name) is None]
        if missing:
            return {"outcome": "skipped", "reason": f"not installed: {', '.join(missing)}"}
        left = self.ends - time.monotonic()
        if left < 5:
            return {"outcome": "no time left"}
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "figures.json"
            command = list(stage.rehearsal if self.rehearse else stage.command)
            if stage.writes_json:
                command += ["--json", str(path)]
            outcome = self._execute(stage, command, min(stage.cap_s, left), log)
            if path.exists():
                outcome["figures"] = json.loads(path.read_text())
        return outcome

    def _execute(self, stage: Stage, command: list[str], cap_s: float, log: Any) -> dict[str, Any]:
        log.write(f"\n== {stage.name}: python -m {' '.join(command)}\n")
        log.flush()
        beside = () if self.rehearse else stage.beside
        helpers = [self._start(list(each), subprocess.DEVNULL) for each in beside]
        process = self._start(command, log)
        code: int | None = None
        try:
            code = process.wait(cap_s)
            for helper in helpers:
                helper.wait(max(1.0, min(cap_s, self.ends - time.monotonic())))
        except subprocess.TimeoutExpired:
            log.write(f"not ended after {cap_s:.0f} s\n")
        finally:
            for each in (process, *helpers):
                end(each)
        log.flush()
        last = list(_last_lines(Path(log.name), 3))
        if code is None:
            return {"outcome": f"ended after {cap_s:.0f} s", "last_lines": last}
        return {"outcome": "ok" if code == 0 else f"exit code {code}", "last_lines": last}

    def _start(self, command: list[str], output: Any) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", *command], stdout=output, stderr=subprocess.STDOUT, env=self.environment,
            start_new_session=True,
        )  # fmt: skip

    def _write(self) -> None:
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        figures = {
            "device": device,
            "rehearsal": self.rehearse,
            "stages": self.stages,
            "environment": environment(None),
        }
        write_figures(self.out / "gpu.json", rounded(figures))


def _last_lines(path: Path, count: int) -> Iterator[str]:
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    yield from (line[:300] for line in lines[-count:])


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = base_parser("benchmarks.gpu", __doc__, minutes=7.0, out="gpu.json and gpu.log")
    names = [stage.name for stage in STAGES]
    parser.add_argument(
        "--only", default="", help=f"comma-separated stages (default all: {', '.join(names)})"
    )
    options = parser.parse_args(argv)
    try:
        chosen = choose("--only", options.only, names, options.minutes)
        require_gpu(rehearse=options.rehearse)
    except UserError as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    run = Run(options.out, options.minutes, rehearse=options.rehearse)
    well = run.all([stage for stage in STAGES if stage.name in chosen])
    print(_SUMMARY.format(out=options.out))
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
