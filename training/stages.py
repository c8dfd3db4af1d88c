# SPDX-License-Identifier: Apache-2.0
"""What the stages of the distillation experiment do; `experiments.py` says when."""

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from lightning_fabric import Fabric
from safetensors import safe_open
from tqdm import tqdm

from ftkd_core.config import override
from ftkd_core.data.clips import AugmentConfig, StreamDataset
from ftkd_core.data.nuscenes import NuScenes, open_dataset
from ftkd_core.data.synthetic.export import write_dataset
from ftkd_core.data.synthetic_clips import SyntheticClips
from ftkd_core.data.windows import WindowDataset
from ftkd_core.distillation.baselines import BaselineConfig
from ftkd_core.distillation.cache import TeacherCache, fill_cache
from ftkd_core.distillation.methods import method_config
from ftkd_core.models.sparse_bev import SparseBEV, build_sparse_bev
from ftkd_core.models.stream_petr import StreamPETR, build_stream_petr
from ftkd_core.presets import PRESETS, preset, sparse_bev_preset
from ftkd_core.weights import load_into, read_weights, read_window_weights, start_from, weights_hash
from training import predicting
from training.balance import balance
from training.distill import load_teacher
from training.kept_features import keep_features
from training.lessons import CachedDataset, StreamLesson, WindowLesson, make_distiller
from training.loop import OptimConfig, Trainer
from training.train import split_parts

HELD_OUT_SEED: Final = 900_000
_VERSION, _SPLIT = "v1.0-synth", "held_out"
_PLAIN: Final = AugmentConfig(flip=0.0, rotation=0.0)  # training adds colours, where it sees images
_SETTINGS: Final = ("weight", "pv_weight", "bev_weight", "logits_weight")


def render(clips: SyntheticClips, count: int) -> None:
    """Render the first `count` scenes that are missing, on all cores."""
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        work = pool.map(partial(_render_one, clips), range(count))
        list(tqdm(work, total=count, desc="render scenes", unit="scene"))


def _render_one(clips: SyntheticClips, index: int) -> None:
    clips(index)


def seconds_per_step(
    name: str, streams: int, clips: SyntheticClips, scenes: int, device: torch.device, steps: int = 6
) -> float:
    """Seconds of a training step of a preset on that device, its data loaded in the same process."""
    lesson: StreamLesson | WindowLesson
    data: StreamDataset | WindowDataset
    if name in PRESETS:
        lesson = StreamLesson(build_stream_petr(preset(name)), streams)
        data = StreamDataset(clips, scenes, num_streams=streams, segment=10, augment=_PLAIN, seed=0)
    else:
        config = sparse_bev_preset(name)
        lesson = WindowLesson(build_sparse_bev(config))
        data = WindowDataset(
            clips, scenes, batch=streams, num_past=config.num_past, num_future=config.num_future,
            augment=_PLAIN, seed=0,
        )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        fabric = Fabric(accelerator=device.type, devices=1)
        half = torch.bfloat16 if device.type == "cuda" else None
        trainer = Trainer(fabric, lesson, OptimConfig(), Path(folder), steps=100, seed=0, autocast=half)
        trainer.start_training()
        began = 0.0
        for step in range(2 + steps):
            if step == 2:
                began = time.monotonic()
            terms, _ = trainer.train_step(fabric.to_device(data[step]))
            float(next(iter(terms.values())))  # waits for the device
    return (time.monotonic() - began) / steps


def cache_of(method: str) -> str:
    """Which of a teacher's two caches a method reads."""
    return "relations" if isinstance(method_config(method), BaselineConfig) else "future"


def fill(
    folder: Path, method: str, teacher: Path, student: str, clips: SyntheticClips, scenes: int,
    device: torch.device, *, keep: bool = False,
) -> None:  # fmt: skip
    """Fill a cache with all that methods of its kind read: the maps with the future absorbed, or the maps as
    they are and those of the frame before. With `keep`, from kept features of the teacher's backbone."""
    widest = "stxd" if cache_of(method) == "relations" else "ftkd"
    model = load_teacher(teacher)
    distiller = make_distiller(model, build_stream_petr(preset(student)), method_config(widest))
    model.to(device)
    description = distiller.describe(weights_hash(teacher), clips.name)
    shown = keep_features(model, clips, clips.cache.parent, scenes, device) if keep else clips
    fill_cache(folder, description, distiller.answer_clip, shown, scenes)


def balance_method(
    method: str, teacher: Path, student: str, init: tuple[str, str], clips: SyntheticClips, scenes: int, *,
    cache: Path, streams: int, share: float, device: torch.device, keep: bool = False,
    settings: Sequence[str] = (),
) -> dict[str, Any]:  # fmt: skip
    """The weights that bring each part of a method to `share` of the detection loss, and the terms measured
    before, on the teacher's cached answers: `{"settings": {...}, "terms": {...}}`. init: the file that
    students start from and its parts, as --init and --init-parts; keep, as students are shown kept
    features; settings, changes of the method, each `name=value`."""
    torch.manual_seed(0)
    model, guide = build_stream_petr(preset(student)), load_teacher(teacher)
    if init[0]:
        start_from(Path(init[0]), model, model.config, split_parts(init[1]))
    model.to(device)
    shown = keep_features(model, clips, clips.cache.parent, scenes, device) if keep else clips
    data = StreamDataset(shown, scenes, num_streams=streams, segment=10, augment=_PLAIN, seed=0)
    chosen = override(method_config(method), settings)
    description = make_distiller(guide, model, chosen).describe(weights_hash(teacher), clips.name)
    answers = CachedDataset(data, TeacherCache(cache, description, scenes))
    config, terms = balance(guide, model.to(device), chosen, answers, streams=streams, share=share)
    weights = {name: value for name, value in asdict(config).items() if name in _SETTINGS}
    return {"settings": weights, "terms": terms}


def steps_of(weights: Path) -> int:
    """Training steps of a weights file; 0 where there is none."""
    if not weights.is_file():
        return 0
    notes = (read_window_weights if _is_sparse_bev(weights) else read_weights)(weights)[2]
    return int(notes.get("steps", 0))


def _is_sparse_bev(weights: Path) -> bool:
    with safe_open(weights, framework="pt") as file:
        return bool((file.metadata() or {}).get("kind") == "SparseBEVConfig")


def load_model(weights: Path) -> StreamPETR | SparseBEV:
    """The model of a weights file, student or teacher."""
    if _is_sparse_bev(weights):
        return load_teacher(weights)
    state, config, _ = read_weights(weights)
    model = build_stream_petr(config)
    load_into(model, state, str(weights))
    return model


def keep_held_out(files: Sequence[Path], clips: SyntheticClips, count: int, device: torch.device) -> None:
    """Extract the features of clips that the backbones of weights files see, each distinct one once."""
    for file in files:
        keep_features(load_model(file), clips, clips.cache.parent, count, device)


def detect(
    weights: Path, clips: SyntheticClips, count: int, output: Path, device: torch.device, threads: int = 0,
    *, keep: bool = False,
) -> None:  # fmt: skip
    """Write the detections of a weights file on the first `count` clips, on `threads` CPU threads
    (0: PyTorch's choice); with `keep`, from kept features of its backbone."""
    if threads:
        torch.set_num_threads(threads)
    model = load_model(weights)
    shown = keep_features(model, clips, clips.cache.parent, count, device) if keep else clips
    predicting.predict(model, shown, count, output, device)


def write_held_out(folder: Path, count: int) -> None:
    """The held-out scenes as a nuScenes data set, unless they are there."""
    if not folder.is_dir():
        seeds = range(HELD_OUT_SEED, HELD_OUT_SEED + count)
        write_dataset(folder, seeds, version=_VERSION, split=_SPLIT, width=704, height=396, sweeps=False)


def processes(count: int) -> ProcessPoolExecutor:
    """Processes for work that would wait for each other in the threads of one. Started anew: a forked one
    would inherit the locks of PyTorch's threads."""
    return ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn"))


def score(files: Sequence[Path], folder: Path, *, subsets: bool) -> Iterator[dict[str, Any]]:
    """Official scores of files of detections, in their order, on the held-out data set of a folder, or those
    of part of the objects at a time; on all cores, for the devkit uses one."""
    work = predicting.score_subsets if subsets else predicting.score
    with processes(os.cpu_count() or 1) as pool:
        yield from pool.map(partial(_score_one, work, folder), files)


def _score_one(
    work: Callable[[Path, NuScenes, str], dict[str, Any]], folder: Path, predictions: Path
) -> dict[str, Any]:
    return work(predictions, open_dataset(folder, _VERSION), _SPLIT)
