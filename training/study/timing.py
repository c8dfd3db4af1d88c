# SPDX-License-Identifier: Apache-2.0
"""What the parts of an experiment cost, measured before there is anything to train.

Models of random weights take as long as trained ones. All is measured from images: with --keep-features,
extracting features once is taken to cost no more than what reading them saves.
"""

import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np
import torch
from lightning_fabric import Fabric

from ftkd_core.data.clips import Clip, StreamDataset
from ftkd_core.data.synthetic_clips import SyntheticClips
from ftkd_core.data.windows import WindowDataset
from ftkd_core.distillation.cache import fill_cache
from ftkd_core.models.build import build_stream_petr
from ftkd_core.models.sparse_bev import SparseBEV, build_sparse_bev
from ftkd_core.models.stream_petr import StreamPETR
from ftkd_core.presets import PRESETS, preset, sparse_bev_preset
from ftkd_core.runtime.devices import device_name
from training.distill import load_teacher
from training.study.balance import BATCHES
from training.study.matrix import OFFLINE, PAST, ROWS, teachers_of
from training.study.planning import Needs, Plan, together
from training.study.predicting import predict
from training.study.stages import PLAIN, cache_of, widest_of
from training.tasks import StreamLesson, WindowLesson, make_distiller
from training.trainer import OptimConfig, Trainer

_WARM_UP_FRAMES: Final = 3
_TIMED_FRAMES: Final = 12


def seconds_per_step(
    name: str, streams: int, clips: SyntheticClips, scenes: int, device: torch.device, steps: int = 6,
    *, backbone_ratio: float = 1.0,
) -> float:  # fmt: skip
    """Seconds of a training step of a preset on that device, its data loaded in the same process."""
    lesson: StreamLesson | WindowLesson
    data: StreamDataset | WindowDataset
    if name in PRESETS:
        lesson = StreamLesson(build_stream_petr(preset(name)), streams)
        data = StreamDataset(clips, scenes, num_streams=streams, segment=10, augment=PLAIN, seed=0)
    else:
        config = sparse_bev_preset(name)
        lesson = WindowLesson(build_sparse_bev(config))
        data = WindowDataset(
            clips, scenes, batch=streams, num_past=config.num_past, num_future=config.num_future,
            augment=PLAIN, seed=0,
        )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        fabric = Fabric(accelerator=device.type, devices=1)
        half = torch.bfloat16 if device.type == "cuda" else None
        optim = OptimConfig(backbone_ratio=backbone_ratio)
        trainer = Trainer(fabric, lesson, optim, Path(folder), steps=100, seed=0, autocast=half)
        trainer.start_training()
        began = 0.0
        for step in range(2 + steps):
            if step == 2:
                began = time.monotonic()
            terms, _ = trainer.train_step(fabric.to_device(data[step]))
            float(next(iter(terms.values())))  # waits for the device
    return (time.monotonic() - began) / steps


class Costs:
    """Seconds of parts of a plan on one device, each measured when it is first asked for and kept in a file.

    `method` is a teacher or a row of the table; `threads` of each training process (0: PyTorch's choice), of
    which `parallel` students run side by side.
    """

    def __init__(
        self, plan: Plan, clips: SyntheticClips, device: torch.device, kept: Path, *, threads: int,
        parallel: int,
    ) -> None:  # fmt: skip
        self.plan, self.clips, self.device, self.kept = plan, clips, device, kept
        self.threads, self.parallel = threads, parallel
        self.seconds: dict[str, float] = json.loads(kept.read_text()) if kept.exists() else {}
        self._pace: dict[str, float] = {}
        self._lock = threading.Lock()

    def run(self, method: str, steps: int) -> float:
        """Of a run of which so many steps are left, a student's with its detections."""
        training = self._pace.get(self.plan.preset_of(method), 1.0) * self._training(method, steps)
        return training if _is_teacher(method) else training + self.held_out(method)

    def held_out(self, method: str) -> float:
        """Of the detections of a run."""
        return self._crowd(method) * self.plan.held_out * self.detection(method)

    def learn(self, method: str, steps: int, took: float) -> None:
        """Take notice of what so many steps really took, for the next `run` of that preset."""
        self._pace[self.plan.preset_of(method)] = took / self._training(method, steps)

    def _training(self, method: str, steps: int) -> float:
        return self._crowd(method) * (self.start() + steps * self.step(method))

    def _crowd(self, method: str) -> float:
        """How many times as long a run takes for those beside it."""
        return 1.0 if _is_teacher(method) else self.parallel * together(self.parallel)

    def step(self, method: str) -> float:
        """Of a training step."""
        plan, name = self.plan, self.plan.preset_of(method)
        ratio = 1.0 if _is_teacher(method) else plan.backbone_ratio
        return self._known(
            f"step of {name}, batch {plan.streams}, backbone_ratio {ratio:g}",
            lambda: seconds_per_step(
                name, plan.streams, self.clips, plan.scenes, self.device, backbone_ratio=ratio
            ),
            self.threads if _is_teacher(method) else self.threads * self.parallel,
        )

    def answers(self, teacher: str, kind: str) -> float:
        """Of one scene's answers of a teacher, written to a kind of cache (`cache_of`)."""

        def measure() -> float:
            student = build_stream_petr(preset(self.plan.preset))
            distiller = make_distiller(self._teacher(teacher), student, widest_of(kind))
            described = distiller.describe("", self.clips.name)
            return self._scene(
                lambda folder, load: fill_cache(folder, described, distiller.answer_clip, load, 1)
            )

        return self._known(f"a scene's answers ({kind}) of {self._what(teacher)}", measure)

    def detection(self, method: str) -> float:
        """Of one scene's detections."""

        def measure() -> float:
            model: StreamPETR | SparseBEV
            if _is_teacher(method):
                model = self._teacher(method)
            else:
                model = build_stream_petr(preset(self.plan.preset_of(method)))
            return self._scene(
                lambda folder, load: predict(model, load, 1, folder / "detections.npz", self.device)
            )

        return self._known(
            f"a scene's detections of {self._what(method)}", measure, self.threads * self.parallel
        )

    def start(self) -> float:
        """Of starting a training process, up to its first line of work."""

        def measure() -> float:
            began = time.monotonic()
            command = [sys.executable, "-m", "training.train", "--help"]
            subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
            return time.monotonic() - began

        return self._known("starting a process", measure)

    def _what(self, method: str) -> str:
        given = self.plan.given(method) if _is_teacher(method) else ""
        return given or self.plan.preset_of(method)

    def _teacher(self, name: str) -> SparseBEV:
        """The teacher that is given, or one as large as that to be trained; on the device."""
        given, model = self.plan.given(name), sparse_bev_preset(self.plan.preset_of(name))
        return (load_teacher(Path(given)) if given else build_sparse_bev(model)).to(self.device)

    def _scene(self, work: Callable[[Path, Callable[[int], Clip]], Path]) -> float:
        """Of work on a scene that writes to a folder, judged by its first frames; before, on fewer of them,
        for the first use of a device takes longer."""
        clip = self.clips(0)
        warm_up, timed = (_first_frames(clip, count) for count in (_WARM_UP_FRAMES, _TIMED_FRAMES))
        with tempfile.TemporaryDirectory() as folder:
            work(Path(folder, "warm_up"), lambda _: warm_up)
            began = time.monotonic()
            work(Path(folder, "timed"), lambda _: timed)
            return (time.monotonic() - began) * len(clip.times) / len(timed.times)

    def _known(self, what: str, measure: Callable[[], float], threads: int = 0) -> float:
        where = device_name(self.device) + (f", {threads} threads" if threads else "")
        key = f"{what}, on {where}"
        with self._lock:
            if key not in self.seconds:
                usual = torch.get_num_threads()
                torch.set_num_threads(min(usual, threads or usual))
                try:
                    self.seconds[key] = measure()
                finally:
                    torch.set_num_threads(usual)
                self.kept.write_text(json.dumps(self.seconds, indent=1) + "\n")
            return self.seconds[key]


def _is_teacher(method: str) -> bool:
    return method in (OFFLINE, PAST)


def _first_frames(clip: Clip, count: int) -> Clip:
    assert isinstance(clip.images, np.ndarray)
    return replace(
        clip, images=clip.images[:count], ego_from_camera=clip.ego_from_camera[:count],
        global_from_ego=clip.global_from_ego[:count], times=clip.times[:count], objects=clip.objects[:count],
    )  # fmt: skip


def needs_of(plan: Plan, rows: Sequence[str], costs: Costs) -> Needs:
    """What a plan needs for some rows of the table, from its first step to the last detection."""
    methods = [row for row in rows if ROWS[row].method]
    caches = sorted({(ROWS[row].teacher, cache_of(ROWS[row].method, plan.set_method)) for row in methods})
    teachers = teachers_of(rows)
    trained = [name for name in teachers if not plan.given(name)]
    student, shared = rows[0], together(costs.parallel)
    runs, longer = plan.seeds * len(rows), plan.seeds * sum(ROWS[row].longer for row in rows)
    detections = shared * runs * costs.detection(student) + sum(costs.detection(t) for t in teachers)
    return Needs(
        beside={
            "the teachers' answers": plan.scenes * sum(costs.answers(*cache) for cache in caches),
            "balancing": len(methods) * BATCHES * costs.step(student),
            "detection": plan.held_out * detections,
            "starting processes": (len(trained) + shared * runs) * costs.start(),
        },
        teachers=sum(costs.step(name) for name in trained),
        students=shared * longer * costs.step(student),
    )
