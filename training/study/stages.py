# SPDX-License-Identifier: Apache-2.0
"""What the stages of the distillation experiment do; `experiments.py` says when."""

import json
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import safe_open
from tqdm import tqdm

from ftkd_core.config import BackboneConfig, override
from ftkd_core.data.augmentation import AugmentConfig
from ftkd_core.data.clips import Clip, StreamDataset
from ftkd_core.data.synthetic.export import write_dataset
from ftkd_core.data.synthetic_clips import SyntheticClips
from ftkd_core.distillation.baselines import BaselineConfig
from ftkd_core.distillation.cache import TeacherCache, fill_cache
from ftkd_core.distillation.config import FTKDConfig
from ftkd_core.distillation.methods import MethodConfig, method_config
from ftkd_core.errors import UserError
from ftkd_core.models.build import build_stream_petr
from ftkd_core.models.sparse_bev import SparseBEV
from ftkd_core.models.stream_petr import StreamPETR
from ftkd_core.presets import preset
from ftkd_core.weights import (
    load_into,
    read_config,
    read_weights,
    read_window_weights,
    start_from,
    weights_hash,
)
from training.distill import load_teacher
from training.feature_cache import keep_features
from training.study import predicting
from training.study.balance import balance
from training.study.matrix import checksum, is_scored, make_entry, method_of, read_matrix
from training.study.planning import Plan
from training.tasks import CachedDataset, make_distiller
from training.train import split_parts

HELD_OUT_SEED: Final = 900_000
_VERSION, _SPLIT = "v1.0-synth", "held_out"
PLAIN: Final = AugmentConfig(flip=0.0, rotation=0.0)  # training adds colours, where it sees images
_SETTINGS: Final = ("weight", "pv_weight", "bev_weight", "logits_weight")


def render(clips: SyntheticClips, count: int) -> None:
    """Render the first `count` scenes that are missing, on all cores."""
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        work = pool.map(partial(_render_one, clips), range(count))
        list(tqdm(work, total=count, desc="render scenes", unit="scene"))


def _render_one(clips: SyntheticClips, index: int) -> None:
    clips(index)


def cache_of(method: str, settings: Sequence[str] = ()) -> str:
    """Which of a teacher's caches a method reads in an experiment with these settings of FTKD, each
    `name=value`: `relations`, `future`, or `future_TARGET` where FTKD teaches image features another target
    than by default. (Of the other methods of this kind none reads image features.)"""
    if isinstance(method_config(method), BaselineConfig):
        return "relations"
    target = override(FTKDConfig(), settings).pv_target
    return "future" if target == FTKDConfig().pv_target else f"future_{target}"


def widest_of(kind: str) -> MethodConfig:
    """The method that reads all that a kind of cache holds."""
    name, _, target = kind.partition("_")
    if name == "relations":
        return method_config("stxd")
    return override(FTKDConfig(), [f"pv_target={target}"] if target else [])


def fill(
    folder: Path, kind: str, teacher: Path, student: str, clips: SyntheticClips, scenes: int,
    device: torch.device, *, keep: bool = False, ready: Callable[[], None] = lambda: None,
) -> None:  # fmt: skip
    """Fill a cache with all that methods of its kind (`cache_of`) read: the maps with the future absorbed, or
    the maps as they are and those of the frame before. With `keep`, from kept features of the teacher's
    backbone. `ready` is called before each scene; what it raises stops between two."""
    model = load_teacher(teacher)
    distiller = make_distiller(model, build_stream_petr(preset(student)), widest_of(kind))
    model.to(device)
    description = distiller.describe(weights_hash(teacher), clips.name)
    shown = keep_features(model, clips, clips.cache.parent, scenes, device) if keep else clips

    def load(index: int) -> Clip:
        ready()
        return shown(index)

    fill_cache(folder, description, distiller.answer_clip, load, scenes)


def balance_method(
    method: str, teacher: Path, student: str, init: tuple[str, str], clips: SyntheticClips, scenes: int, *,
    cache: Path, streams: int, share: float, device: torch.device, keep: bool = False,
    frozen_backbone: bool = False, settings: Sequence[str] = (),
) -> dict[str, Any]:  # fmt: skip
    """The weights that bring each part of a method to `share` of the detection loss, and the terms measured
    before, on the teacher's cached answers: `{"settings": {...}, "terms": {...}}`. init: the file that
    students start from and its parts, as --init and --init-parts; keep and frozen_backbone, as students are
    shown kept features and leave their backbone as it is; settings, changes of the method, each
    `name=value`."""
    torch.manual_seed(0)
    model, guide = build_stream_petr(preset(student)), load_teacher(teacher)
    if init[0]:
        start_from(Path(init[0]), model, model.config, split_parts(init[1]))
    model.to(device)
    shown = keep_features(model, clips, clips.cache.parent, scenes, device) if keep else clips
    data = StreamDataset(shown, scenes, num_streams=streams, segment=10, augment=PLAIN, seed=0)
    chosen = override(method_config(method), settings)
    description = make_distiller(guide, model, chosen).describe(weights_hash(teacher), clips.name)
    answers = CachedDataset(data, TeacherCache(cache, description, scenes))
    config, terms = balance(
        guide, model.to(device), chosen, answers, streams=streams, share=share,
        frozen_backbone=frozen_backbone,
    )  # fmt: skip
    weights = {name: value for name, value in asdict(config).items() if name in _SETTINGS}
    return {"settings": weights, "terms": terms}


def steps_of(weights: Path) -> int:
    """Training steps of a weights file; 0 where there is none."""
    if not weights.is_file():
        return 0
    notes = (read_window_weights if _is_sparse_bev(weights) else read_weights)(weights)[2]
    return int(notes.get("steps", 0))


def preset_of(weights: Path) -> str:
    """The preset that the model of a weights file was built from, as its own configuration says."""
    found = read_config(weights)
    if isinstance(found, BackboneConfig):
        raise UserError(f"{str(weights)!r} holds a backbone alone; expected a student or a teacher")
    return found.preset


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
    with processes(os.cpu_count() or 1) as pool:
        yield from pool.map(partial(_score_one, folder, subsets), files)


def score_runs(out: Path, plan: Plan, *, subsets: bool) -> Path:
    """matrix.json of an experiment, with an entry a run whose detections are there: first the scores of all
    of them, then with `subsets` those of part of the objects at a time, which take several times as long.
    Where the detections are others than those that an entry is of, they are scored again."""
    path, entries = out / "matrix.json", {}
    if path.exists():
        entries = {(entry["method"], entry["seed"]): entry for entry in read_matrix(path)}
    noted = sorted((out / "predictions").glob("*.json"))
    if not noted:
        raise UserError(f"no detections in {str(out / 'predictions')!r}; train first")
    runs = {(method_of(f.stem), int(f.stem.rpartition("-")[2])): f.with_suffix(".npz") for f in noted}
    sums = {run: checksum(file) for run, file in runs.items()}
    write_held_out(out / "held_out", plan.held_out)
    for parts in (False, True) if subsets else (False,):
        missing = [run for run in runs if not is_scored(entries.get(run), sums[run], subsets=parts)]
        scores = score([runs[run] for run in missing], out / "held_out", subsets=parts)
        words = "score parts" if parts else "score"
        for run, found in tqdm(zip(missing, scores, strict=True), words, len(missing), unit="run"):
            if parts:
                entries[run]["subsets"] = found
            else:
                notes = json.loads(runs[run].with_suffix(".json").read_text())
                notes = {"preset": plan.preset_of(run[0])} | notes  # older notes do not say
                entries[run] = make_entry(run, found, notes, sums[run])
            path.write_text(json.dumps(list(entries.values()), indent=1) + "\n")
    return path


def _score_one(folder: Path, subsets: bool, predictions: Path) -> dict[str, Any]:
    from ftkd_core.data.nuscenes import open_dataset
    from training import scoring

    work = scoring.score_subsets if subsets else scoring.score
    return work(predictions, open_dataset(folder, _VERSION), _SPLIT)


def require_devkit() -> None:
    """UserError where the nuScenes devkit, which scores, is not installed."""
    if find_spec("nuscenes") is None:
        raise UserError(
            "scoring needs the nuScenes devkit, which is not installed; install nuscenes-devkit, or give "
            "--phase train and score on another machine"
        )
