# SPDX-License-Identifier: Apache-2.0
"""Cost of distillation per training step: student alone, with cached teacher outputs, and with a running
teacher.

    python -m benchmarks.train_step --preset tiny --teacher-preset sparse_bev_tiny_offline --json FILE

All variants train in one process on the same scenes, interleaved A-B-C-A-B-C, from batches on the device to
updated weights. Loading a batch is timed separately (`load_ms`), because worker processes do it in parallel.
On a GPU everything is measured in float32 (convolutions in TF32, PyTorch's default) and in bfloat16. Weights
are random with a fixed seed, so the figures are times, not scores. `processor_ms` is the processor time of
all threads, which depends little on other load.

`--cache-features` adds the student with a frozen backbone, on images (`frozen`) and on cached features
(`kept`).
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch.utils.data import Dataset
from tqdm import tqdm

from benchmarks.report import report
from ftkd_core.data.augmentation import AugmentConfig
from ftkd_core.data.clips import StreamDataset
from ftkd_core.data.synthetic_clips import SyntheticClips
from ftkd_core.data.windows import PairedDataset
from ftkd_core.distillation.cache import TeacherCache, fill_cache
from ftkd_core.distillation.methods import METHODS, method_config
from ftkd_core.errors import UserError
from ftkd_core.models.build import build_stream_petr
from ftkd_core.models.sparse_bev import build_sparse_bev
from ftkd_core.percentiles import summarize
from ftkd_core.presets import preset, sparse_bev_preset
from ftkd_core.runtime.detector import resolve_device
from ftkd_core.runtime.devices import device_name
from training.config import OptimConfig
from training.datasets import CachedDataset
from training.distiller import Distiller, make_distiller
from training.feature_cache import cache_features
from training.tasks import StreamingTask
from training.trainer import Trainer

_SCENES, _DURATION_S, _WARM_UP = 2, 10.0, 3
_NO_AUGMENTATION = AugmentConfig(flip=0.0, rotation=0.0)  # cached teacher outputs need unaugmented geometry
VARIANTS = ("student", "cached", "online")
_FROZEN = OptimConfig(backbone_ratio=0.0)


@dataclass
class TimedTraining:
    """One training to be timed: trainer, data, and the times so far in milliseconds."""

    trainer: Trainer
    data: Dataset[Any]
    load: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)

    def step(self, number: int) -> None:
        """Load a batch and train on it."""
        began = time.perf_counter()
        batch = self.data[number]
        self.load.append(1e3 * (time.perf_counter() - began))
        batch = self.trainer.fabric.to_device(batch)
        _wait(self.trainer.fabric.device)
        wall, processor = time.perf_counter(), time.process_time()
        self.trainer.train_step(batch)
        _wait(self.trainer.fabric.device)
        self.wall.append(1e3 * (time.perf_counter() - wall))
        self.processor.append(1e3 * (time.process_time() - processor))

    def figures(self) -> dict[str, float]:
        """Return medians after warm-up."""
        names = (("step_ms", self.wall), ("processor_ms", self.processor), ("load_ms", self.load))
        return {name: summarize(times[_WARM_UP:]).p50 or 0.0 for name, times in names}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def run(
    name: str, teacher_name: str, method: str, device: torch.device, *, streams: int, repeats: int,
    keep: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Measure all figures of a student and a teacher on one device; `keep` adds frozen backbones."""
    fabric = Fabric(accelerator=device.type, devices=[device.index or 0] if device.type == "cuda" else 1)
    kinds = {"fp32": None, "bf16": torch.bfloat16} if device.type == "cuda" else {"fp32": None}
    with tempfile.TemporaryDirectory() as folder:
        clips = SyntheticClips(0, preset(name).image, Path(folder), _DURATION_S)
        clips.render_all(_SCENES)
        trainings: dict[str, TimedTraining] = {}
        for kind, half in kinds.items():
            for variant, data, distiller in _variants(name, teacher_name, method, device, clips, streams):
                torch.manual_seed(0)
                lesson = StreamingTask(build_stream_petr(preset(name)), streams, distiller)
                trainer = Trainer(
                    fabric, lesson, OptimConfig(), Path(folder), steps=1000, seed=0, autocast=half
                )
                trainer.start_training()
                trainings[f"{variant}_{kind}"] = TimedTraining(trainer, data)
            if keep:
                for variant in ("frozen", "kept"):
                    trainings[f"{variant}_{kind}"] = _frozen(variant, name, fabric, clips, streams, half)
        for number in tqdm(range(_WARM_UP + repeats), desc="time", unit="round"):
            for training in trainings.values():
                training.step(number)
    figures = {key: training.figures() for key, training in trainings.items()}
    return {
        "device": device_name(device),
        "preset": name,
        "teacher_preset": teacher_name,
        "method": method,
        "streams": streams,
        **figures,
        "ratios": _ratios(figures),
        "runs": {"timed": repeats, "warm_up": _WARM_UP, "order": "interleaved", "figure": "median"},
    }


def _variants(
    name: str, teacher_name: str, method: str, device: torch.device, clips: SyntheticClips, streams: int
) -> list[tuple[str, Dataset[Any], Distiller | None]]:
    """Return data and distiller of each of VARIANTS; the cache is filled by the call."""
    torch.manual_seed(1)
    teacher = build_sparse_bev(sparse_bev_preset(teacher_name))
    student = build_stream_petr(preset(name))
    distillers = [make_distiller(teacher, student, method_config(method)) for _ in range(2)]
    teacher.to(device)
    manifest = distillers[0].describe("random", clips.name)
    folder = clips.cache / "answers"
    fill_cache(folder, manifest, distillers[0].run_teacher_on_clip, clips, _SCENES)
    data = StreamDataset(clips, _SCENES, num_streams=streams, segment=10, augment=_NO_AUGMENTATION, seed=0)
    windows = PairedDataset(data, teacher.config.num_past, teacher.config.num_future)
    cached = CachedDataset(data, TeacherCache(folder, manifest, _SCENES))
    return [("student", data, None), ("cached", cached, distillers[0]), ("online", windows, distillers[1])]


def _frozen(
    variant: str, name: str, fabric: Fabric, clips: SyntheticClips, streams: int, half: torch.dtype | None
) -> TimedTraining:
    """Create the student with a frozen backbone, on images or on cached features."""
    torch.manual_seed(0)
    model = build_stream_petr(preset(name))
    folder = clips.cache.parent
    shown = clips if variant == "frozen" else cache_features(model, clips, folder, _SCENES, fabric.device)
    data = StreamDataset(shown, _SCENES, num_streams=streams, segment=10, augment=_NO_AUGMENTATION, seed=0)
    trainer = Trainer(
        fabric, StreamingTask(model, streams), _FROZEN, folder, steps=1000, seed=0, autocast=half
    )
    trainer.start_training()
    return TimedTraining(trainer, data)


def _ratios(figures: dict[str, dict[str, float]]) -> dict[str, float]:
    """Return ratios of step times, by wall time and by processor time."""
    found = {}
    for kind in ("fp32", "bf16"):
        if f"student_{kind}" in figures:
            for clock, suffix in (("step_ms", ""), ("processor_ms", "_processor")):
                student, cached, online = (figures[f"{variant}_{kind}"][clock] for variant in VARIANTS)
                found[f"cached_over_student_{kind}{suffix}"] = cached / student
                found[f"online_over_cached_{kind}{suffix}"] = online / cached
                if f"kept_{kind}" in figures:
                    kept, frozen = (figures[f"{variant}_{kind}"][clock] for variant in ("kept", "frozen"))
                    found[f"kept_over_frozen_{kind}{suffix}"] = kept / frozen
    if "student_bf16" in figures:
        found["student_fp32_over_bf16"] = (
            figures["student_fp32"]["step_ms"] / figures["student_bf16"]["step_ms"]
        )
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.train_step",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--preset", default="tiny", help="streaming student (default tiny)")
    add("--teacher-preset", default="sparse_bev_tiny_offline", help="its teacher")
    add("--method", default="ftkd", help=f"{', '.join(METHODS)} (default ftkd)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default auto)")
    add("--streams", type=int, default=2, help="batch size (default 2)")
    add("--repeats", type=int, default=20, help="timed steps of each variant (default 20)")
    add(
        "--cache-features",
        action="store_true",
        help="also time a frozen backbone, on images and on cached features",
    )
    add("--threads", type=int, default=0, help="CPU threads (0: PyTorch's choice)")
    add("--note", help="text for the JSON, such as other load on the machine")
    add("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    options = parser.parse_args(argv)
    try:
        if options.repeats < 1 or options.streams < 1:
            raise UserError("--repeats and --streams: expected at least 1")
        if options.threads:
            torch.set_num_threads(options.threads)
        result = run(
            options.preset, options.teacher_preset, options.method, resolve_device(options.device),
            streams=options.streams, repeats=options.repeats, keep=options.cache_features,
        )  # fmt: skip
    except UserError as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return 2
    report(result, options.json, options.note)
    return 0


if __name__ == "__main__":
    sys.exit(main())
