# SPDX-License-Identifier: Apache-2.0
"""Detections of a trained model on clips, kept in a file, so that another machine can score them.

A clip is a scene of the synthetic world at key frames (2 Hz); the same seeds written as a nuScenes data set
hold the truth. Symbols: F key frames of all clips, M detections of all frames.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric.utilities import move_data_to_device
from tqdm import tqdm

from ftkd_core.data.clips import Augmentation, Clip, make_sample
from ftkd_core.data.nuscenes import NuScenes, sample_pose
from ftkd_core.errors import UserError
from ftkd_core.evaluation.nuscenes import PosedObjects, evaluate, sample_tokens_of, to_devkit_results
from ftkd_core.evaluation.subsets import evaluate_subsets
from ftkd_core.models.sparse_bev import SparseBEV
from ftkd_core.models.stream_petr import StreamPETR, decode
from ftkd_core.types import Detections, ObjectList
from training.kept_features import network_input
from training.whole_clips import view_clip

_LEAST_SCORE = 0.01  # below it a detection changes no metric and only fills the file
_SAME_POSE_M = 1e-3


@torch.inference_mode()
def detect_clip(model: StreamPETR | SparseBEV, clip: Clip, device: torch.device) -> list[Detections]:
    """Detections of every frame of a clip, in order: streamed, or window by window. A model of kept features
    takes clips that hold them."""
    model = model.to(device).eval()
    if isinstance(model, SparseBEV):
        return [one for view in view_clip(model, clip) for one in _each(decode(view.predictions))]
    found = []
    memory = model.start_memory()
    for index in range(len(clip.times)):
        sample = move_data_to_device(make_sample(clip, index, Augmentation(), index == 0), device)
        frame = sample.frame(network_input(sample.images, model.config.image))
        predictions, memory = model(frame, memory)
        found.append(decode(predictions))
    return found


def _each(batch: Detections) -> list[Detections]:
    """The frames of a batch, each as a batch of one."""
    rows = zip(*(value.split(1) for value in batch), strict=True)
    return [Detections(*row) for row in rows]


def predict(
    model: StreamPETR | SparseBEV, load: Callable[[int], Clip], count: int, output: Path, device: torch.device
) -> Path:
    """Write the detections on clips 0 .. count - 1 to `output` (.npz): boxes (M, 9) in ego, scores and labels
    (M,), counts (F,), global_from_ego (F, 4, 4)."""
    frames: list[Detections] = []
    poses = []
    for index in tqdm(range(count), desc="detect", unit="scene"):
        clip = load(index)
        frames += detect_clip(model, clip, device)
        poses.append(clip.global_from_ego)
    boxes, scores, labels = (
        [getattr(f, name)[0].float().cpu().numpy() for f in frames] for name in ("boxes", "scores", "labels")
    )
    kept = [score >= _LEAST_SCORE for score in scores]
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(output.name + ".partial.npz")
    np.savez_compressed(
        partial,
        boxes=np.concatenate([b[k] for b, k in zip(boxes, kept, strict=True)]).astype(np.float32),
        scores=np.concatenate([s[k] for s, k in zip(scores, kept, strict=True)]).astype(np.float32),
        labels=np.concatenate([v[k] for v, k in zip(labels, kept, strict=True)]).astype(np.int64),
        counts=np.array([int(k.sum()) for k in kept]),
        global_from_ego=np.concatenate(poses),
    )
    partial.replace(output)
    return output


def score(predictions: Path, dataset: NuScenes, split: str, *, still: bool = False) -> dict[str, Any]:
    """Official metrics of a file of `predict` on the data set of the same seeds; `still`, had it said of
    everything that it stands. UserError where the two are not of the same drives."""
    tokens, results = _results(predictions, dataset, split)
    if still:
        for found in results["results"].values():
            for box in found:
                box["velocity"] = [0.0, 0.0]
    return evaluate(dataset, results, sample_tokens=tokens)


def score_subsets(predictions: Path, dataset: NuScenes, split: str) -> dict[str, Any]:
    """Official metrics of part of the objects at a time, as `evaluation.subsets`; errors as of `score`."""
    tokens, results = _results(predictions, dataset, split)
    return evaluate_subsets(dataset, results, tokens)


def _results(predictions: Path, dataset: NuScenes, split: str) -> tuple[tuple[str, ...], dict[str, Any]]:
    tokens = sample_tokens_of(dataset, split=split)
    return tokens, to_devkit_results(_posed(predictions, dataset, tokens), tokens)


def _posed(predictions: Path, dataset: NuScenes, tokens: Sequence[str]) -> dict[str, PosedObjects]:
    with np.load(predictions, allow_pickle=False) as file:
        values = {name: file[name] for name in file.files}
    if len(values["counts"]) != len(tokens):
        raise UserError(
            f"{str(predictions)!r} holds {len(values['counts'])} frames, the data set {len(tokens)}; "
            "expected the same seeds and durations"
        )
    splits = np.cumsum(values["counts"])[:-1]
    columns = [np.split(values[name], splits) for name in ("boxes", "scores", "labels")]
    found = {}
    for place, token in enumerate(tokens):
        pose = values["global_from_ego"][place]
        if np.abs(pose - sample_pose(dataset, token)).max() > _SAME_POSE_M:
            raise UserError(f"{str(predictions)!r} and the data set differ in where frame {place} was taken")
        boxes, scores, labels = (column[place] for column in columns)
        objects = ObjectList(
            boxes=boxes.astype(np.float64), scores=scores.astype(np.float64), labels=labels, stamp_ns=0
        )
        found[token] = PosedObjects(objects, pose)
    return found
