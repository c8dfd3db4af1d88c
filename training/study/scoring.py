# SPDX-License-Identifier: Apache-2.0
"""Score files of detections (predicting.py) with the official metrics. Importing this needs the nuScenes
devkit.

`score_runs` scores all runs of an experiment into its matrix.
"""

import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from ftkd_core.data.nuscenes import NuScenes, open_dataset, sample_pose
from ftkd_core.data.synthetic.export import write_dataset
from ftkd_core.errors import UserError
from ftkd_core.evaluation.nuscenes import PosedObjects, evaluate, sample_tokens_of, to_devkit_results
from ftkd_core.evaluation.subsets import evaluate_subsets
from ftkd_core.types import ObjectList
from training.study.json_files import read_json, write_json
from training.study.matrix import checksum, is_scored, make_entry, method_of, read_matrix, seed_of
from training.study.plan import HELD_OUT_SEED, Plan
from training.study.work import spawn_pool

VERSION: Final = "v1.0-synth"
SPLIT: Final = "held_out"
_ARRAYS: Final = ("boxes", "scores", "labels", "counts", "global_from_ego", "seen")
_POSE_TOLERANCE_M: Final = 1e-3


def score(
    predictions: Path, dataset: NuScenes, split: str = SPLIT, *, zero_velocity: bool = False
) -> dict[str, Any]:
    """Return the official metrics of a file of `predicting.predict` on the data set of the same seeds.

    With zero_velocity, all predicted velocities are replaced by 0. Raises UserError if file and data set are
    not of the same drives.
    """
    tokens, results = devkit_results(predictions, dataset, split)
    if zero_velocity:
        for boxes in results["results"].values():
            for box in boxes:
                box["velocity"] = [0.0, 0.0]
    return evaluate(dataset, results, sample_tokens=tokens)


def score_subsets(predictions: Path, dataset: NuScenes, split: str = SPLIT) -> dict[str, Any]:
    """Return the official metrics per object subset, as `evaluation.subsets`; errors as for `score`."""
    tokens, results = devkit_results(predictions, dataset, split)
    return evaluate_subsets(dataset, results, tokens)


def devkit_results(
    predictions: Path, dataset: NuScenes, split: str
) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Return the sample tokens of a split and the devkit's form of a file of detections; errors as for
    `score`. Key frames that were not seen are left out."""
    found = _read_predictions(predictions, dataset, sample_tokens_of(dataset, split=split))
    return tuple(found), to_devkit_results(found, tuple(found))


def _read_predictions(predictions: Path, dataset: NuScenes, tokens: Sequence[str]) -> dict[str, PosedObjects]:
    """Return the detections of a file by sample token, of the frames that were seen. Raise UserError if the
    file is damaged or its frames do not match the data set."""
    values = _load_arrays(predictions)
    if len(values["counts"]) != len(tokens):
        raise UserError(
            f"{str(predictions)!r} holds {len(values['counts'])} frames, the data set {len(tokens)}; "
            "expected the same seeds and durations"
        )
    splits = np.cumsum(values["counts"])[:-1]
    columns = [np.split(values[name], splits) for name in ("boxes", "scores", "labels")]
    found = {}
    for index, token in enumerate(tokens):
        if not values["seen"][index]:
            continue
        pose = values["global_from_ego"][index]
        if np.abs(pose - sample_pose(dataset, token)).max() > _POSE_TOLERANCE_M:
            raise UserError(
                f"{str(predictions)!r} and the data set differ in the ego pose of frame {index}; "
                "expected the same seeds"
            )
        boxes, scores, labels = (column[index] for column in columns)
        objects = ObjectList(
            boxes=boxes.astype(np.float64), scores=scores.astype(np.float64), labels=labels, stamp_ns=0
        )
        found[token] = PosedObjects(objects, pose)
    return found


def _load_arrays(predictions: Path) -> dict[str, NDArray[Any]]:
    try:
        with np.load(predictions, allow_pickle=False) as file:
            values = {name: file[name] for name in _ARRAYS}
    except (OSError, ValueError, KeyError, AttributeError, TypeError, EOFError, BadZipFile) as error:
        raise UserError(
            f"detections {str(predictions)!r} cannot be read ({error}); delete the file and its .json to "
            "detect again"
        ) from None
    return values


def write_held_out(folder: Path, count: int, world: str) -> None:
    """Export the held-out scenes of a world as a nuScenes data set if the folder does not exist."""
    if not folder.is_dir():
        seeds = range(HELD_OUT_SEED, HELD_OUT_SEED + count)
        write_dataset(
            folder, seeds, version=VERSION, split=SPLIT, width=704, height=396, world=world, sweeps=False
        )


def score_files(files: Sequence[Path], folder: Path, *, subsets: bool) -> Iterator[dict[str, Any]]:
    """Yield the scores of files of detections in their order, with `subsets` those of object subsets.

    Runs in one process per CPU core, because the devkit uses one.
    """
    with spawn_pool(os.cpu_count() or 1) as pool:
        yield from pool.map(partial(_score_file, folder, subsets), files)


def _score_file(folder: Path, subsets: bool, predictions: Path) -> dict[str, Any]:
    dataset = open_dataset(folder, VERSION)
    return score_subsets(predictions, dataset) if subsets else score(predictions, dataset)


def score_runs(out: Path, plan: Plan, *, subsets: bool) -> Path:
    """Score the runs of an experiment that have detections; return its `matrix.json`, one entry per run.

    Whole runs are scored first, then with `subsets` the object subsets, which take several times as long.
    Runs are scored again if their detections have changed.
    """
    path, entries = out / "matrix.json", {}
    if path.exists():
        entries = {(entry["method"], entry["seed"]): entry for entry in read_matrix(path)}
    notes_files = sorted((out / "predictions").glob("*.json"))
    if not notes_files:
        raise UserError(f"no detections in {str(out / 'predictions')!r}; train first")
    runs = {(method_of(f.stem), seed_of(f.stem)): f.with_suffix(".npz") for f in notes_files}
    checksums = {run: checksum(file) for run, file in runs.items()}
    write_held_out(out / "held_out", plan.held_out, plan.world)
    for of_subsets in (False, True) if subsets else (False,):
        missing = [run for run in runs if not is_scored(entries.get(run), checksums[run], subsets=of_subsets)]
        scores = score_files([runs[run] for run in missing], out / "held_out", subsets=of_subsets)
        label = "score subsets" if of_subsets else "score"
        for run, found in tqdm(zip(missing, scores, strict=True), label, len(missing), unit="run"):
            if of_subsets:
                entries[run] |= {"subsets": found, "ave_moving": found["moving"]["AVE"]}
            else:
                notes = read_json(runs[run].with_suffix(".json"), "delete it to detect again")
                entries[run] = make_entry(run, found, notes, checksums[run])
            write_json(path, list(entries.values()))
    return path
