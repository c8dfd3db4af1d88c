# SPDX-License-Identifier: Apache-2.0
"""Train SparseBEV teacher and student on traffic scenes in one short GPU run.

    python -m benchmarks.gpu_study --minutes 4 --out DIR

First all cores but one render the scenes, for at most --render-s seconds. Then one process per job trains on
the GPU until the time ends, all at the same time, each with the scenes in GPU memory:

- teacher: `sparse_bev_small_offline`, with the future hidden in half of the windows
- student: `sparse_bev_small`, the baseline without a teacher
- tiny_offline: `sparse_bev_tiny_offline` (image proposals and hand-written linking), for comparison

Backbone, neck and 2-D head start from research/weights/tiny_teacher_offline.safetensors, the decoders at
random. DIR/NAME/weights.safetensors (float16, averaged) is written every 40 s. DIR/study.json contains the
logs of all processes. A process that fails does not stop the others.

Needs PyTorch with CUDA, NumPy, OpenCV, SciPy, safetensors, tqdm, PyYAML, pydantic, TensorBoard and Lightning
Fabric, in the versions of requirements/base.txt.

`--rehearse` does the same on a CPU with small sizes. Exit codes: 0 every job wrote weights, 1 one did not, 2
bad options.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks.gpu_options import base_parser, choose, end, require_gpu
from benchmarks.report import environment, write_figures
from ftkd_core.config import ImageConfig
from ftkd_core.errors import UserError
from training.device_windows import prepare_scene
from training.timed import READY

_INIT: Final = Path(__file__).parent.parent / "research" / "weights" / "tiny_teacher_offline.safetensors"
_PARTS: Final = "backbone,neck,auxiliary"
_WORLD: Final = "traffic"
_ENDING_S: Final = 10.0
"""Seconds that are reserved for the last save."""
_SMALL_IMAGES: Final = ("--set", "image.width=128", "--set", "image.height=64")
_BYTES_PER_PIXEL: Final = 3
_SPACE_FACTOR: Final = 1.5
_LARGE_BYTES: Final = 100e9


@dataclass(frozen=True)
class Job:
    """A training process: its name, preset, batch and further arguments of `training.timed`."""

    name: str
    preset: str
    batch: int
    arguments: tuple[str, ...] = ()


_HIDDEN: Final = ("--hide-future", "0.5")
_DENOISING: Final = ("--set", "loss.denoising_groups=3")
JOBS: Final = (
    Job("teacher", "sparse_bev_small_offline", 24, (*_HIDDEN, *_DENOISING)),
    Job("student", "sparse_bev_small", 24, _DENOISING),
    Job("tiny_offline", "sparse_bev_tiny_offline", 12, _HIDDEN),
)  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """Sizes of a run: scenes, seconds per scene, image size; and its training device."""

    scenes: int
    duration_s: float
    image: ImageConfig
    device: str


def render(folder: Path, sizes: Sizes, first_seed: int, seconds: float, cores: int) -> int:
    """Prepare scenes in parallel until all are done or the time ends; return their number."""
    with ProcessPoolExecutor(cores, mp_context=multiprocessing.get_context("fork")) as pool:
        seeds = range(first_seed, first_seed + sizes.scenes)
        work = [
            pool.submit(prepare_scene, seed, sizes.image, folder, sizes.duration_s, _WORLD) for seed in seeds
        ]
        try:
            for each in as_completed(work, timeout=seconds):
                if (error := each.exception()) is not None:
                    print(f"a scene failed: {error!r}", flush=True)
        except TimeoutError:
            print(f"stopped rendering after {seconds:.0f} s", flush=True)
        pool.shutdown(wait=True, cancel_futures=True)
    return sum(path.suffix != ".partial" for path in folder.glob("seed-*"))


class Study:
    """The rendering and the training processes of one run."""

    def __init__(self, options: argparse.Namespace, sizes: Sizes) -> None:
        self.options, self.sizes = options, sizes
        self.began = time.time()
        self.until = self.began + 60 * options.minutes - _ENDING_S
        self.summary: dict[str, Any] = {"world": _WORLD, "minutes": options.minutes, "jobs": {}}

    def run(self, jobs: Sequence[Job]) -> bool:
        """Render, train and write the summary; return whether every job wrote weights."""
        needed = self.sizes.scenes * _scene_bytes(self.sizes)
        with tempfile.TemporaryDirectory(dir=_scratch_folder(needed)) as name:
            scenes = Path(name) / "scenes"
            scenes.mkdir()
            running = {job.name: self._start(job, scenes, Path(name)) for job in jobs}
            try:
                self._render(scenes)
                wrote = [self._finish(job, running[job.name], Path(name)) for job in jobs]
            finally:
                for process in running.values():
                    end(process)
        self._write()
        return all(wrote)

    def _render(self, scenes: Path) -> None:
        """Render in a separate process whose libraries use one thread each."""
        began, options = time.time(), self.options
        single = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        command = [
            sys.executable, "-m", "benchmarks.gpu_study", "--render", str(scenes), "--scenes",
            str(self.sizes.scenes), "--render-s", str(options.render_s), "--cores", str(options.cores),
            "--out", str(options.out), *(["--rehearse"] if options.rehearse else []),
        ]  # fmt: skip
        process = subprocess.Popen(command, env=_environment() | single, start_new_session=True)
        try:
            process.wait(options.render_s + 20)
        except subprocess.TimeoutExpired:
            end(process)
        count = sum(path.suffix != ".partial" for path in scenes.glob("seed-*"))
        self.summary |= {"scenes": count, "seconds_to_render": round(time.time() - began, 1)}
        print(f"rendered {count} scenes in {time.time() - began:.1f} s", flush=True)
        if count:
            (scenes / READY).touch()

    def _start(self, job: Job, scenes: Path, folder: Path) -> "subprocess.Popen[bytes]":
        options, rehearse = self.options, self.options.rehearse
        batch = 2 if rehearse else round(job.batch * _batch_scale())
        init = ("--init", str(_INIT), "--init-parts", _PARTS)
        command = [
            sys.executable, "-m", "training.timed", "--preset", job.preset, "--scenes", str(scenes),
            "--until", f"{self.until:.1f}", "--out", str(options.out / job.name), "--device",
            self.sizes.device, "--batch", str(batch), *job.arguments, *init,
            *(_SMALL_IMAGES if rehearse else ()), "--save-s", str(5 if rehearse else 40),
            "--log-every", str(1 if rehearse else 10),
        ]  # fmt: skip
        threads = {"OMP_NUM_THREADS": "1" if rehearse else "2"}
        with (folder / f"{job.name}.txt").open("w") as log:
            return subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=_environment() | threads,
                start_new_session=True,
            )  # fmt: skip

    def _finish(self, job: Job, process: "subprocess.Popen[bytes]", folder: Path) -> bool:
        """Wait for a job until shortly before the end and store its log; return whether it wrote weights."""
        code: int | None = None
        try:
            code = process.wait(max(1.0, self.until + _ENDING_S - 2 - time.time()))
        except subprocess.TimeoutExpired:
            end(process)
        out = self.options.out / job.name
        lines = (folder / f"{job.name}.txt").read_text(errors="replace").splitlines()
        note: dict[str, Any] = {"exit_code": code, "last_lines": [line[:400] for line in lines[-6:]]}
        if (out / "log.json").exists():
            note |= json.loads((out / "log.json").read_text())
        self.summary["jobs"][job.name] = note
        self._write()
        (out / "log.json").unlink(missing_ok=True)  # the summary contains it
        print(f"{job.name}: {note['last_lines'][-1:]}", flush=True)
        return code == 0 and (out / "weights.safetensors").exists()

    def _write(self) -> None:
        self.summary["seconds"] = round(time.time() - self.began, 1)
        write_figures(self.options.out / "study.json", self.summary | {"environment": environment(None)})


def _environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, [".", os.environ.get("PYTHONPATH")]))
    return dict(os.environ) | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


def _batch_scale() -> float:
    """Return the factor on the batches of JOBS, which fit a GPU of 80 GB: larger if it has more memory."""
    return 4 / 3 if torch.cuda.get_device_properties(0).total_memory > _LARGE_BYTES else 1.0


def _scene_bytes(sizes: Sizes) -> int:
    frames = int(sizes.duration_s / 0.5)
    return frames * 6 * sizes.image.width * sizes.image.height * _BYTES_PER_PIXEL


def _scratch_folder(needed: int) -> str | None:
    """Return a memory-backed folder if it has space for that many bytes, else None: the default for temporary
    files."""
    shared = Path("/dev/shm")
    fits = (
        shared.is_dir()
        and os.access(shared, os.W_OK)
        and shutil.disk_usage(shared).free > _SPACE_FACTOR * needed
    )
    return str(shared) if fits else None


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = base_parser("benchmarks.gpu_study", __doc__, minutes=4.0, out="weights, logs and study.json")
    add, names = parser.add_argument, [job.name for job in JOBS]
    add("--jobs", default="", help=f"comma-separated jobs (default all: {', '.join(names)})")
    add("--scenes", type=int, default=120, help="largest number of scenes (default 120)")
    add("--render-s", type=float, default=25.0, help="seconds after which rendering stops (default 25)")
    cores = max(1, (os.cpu_count() or 2) - 1)
    add("--cores", type=int, default=cores, help="processes that render (default: all cores but 1)")
    add("--render", type=Path, metavar="DIR", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    sizes = Sizes(options.scenes, 20.0, ImageConfig(width=352, height=128), "cuda")
    if options.rehearse:
        sizes = Sizes(min(options.scenes, 2), 3.0, ImageConfig(width=128, height=64), "cpu")
    if options.render is not None:
        return 0 if render(options.render, sizes, 0, options.render_s, options.cores) else 1
    try:
        chosen = choose("--jobs", options.jobs, names, options.minutes)
        require_gpu(rehearse=options.rehearse)
    except UserError as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    return 0 if Study(options, sizes).run([job for job in JOBS if job.name in chosen]) else 1


if __name__ == "__main__":
    sys.exit(main())
