# SPDX-License-Identifier: Apache-2.0
"""Detect the key frames of clips with a StreamPETR or a SparseBEV, and score a split of nuScenes.

Symbols: F key frames of several clips, M detections of all frames.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from lightning_fabric.utilities import move_data_to_device
from numpy.typing import NDArray
from tqdm import tqdm

from ftkd_core.classes import our_labels
from ftkd_core.data.augmentation import Augmentation
from ftkd_core.data.clips import Clip, ClipSource, make_sample
from ftkd_core.errors import UserError
from ftkd_core.models.predictions import decode
from ftkd_core.models.sparse_bev import SparseBEV
from ftkd_core.models.stream_petr import StreamPETR
from ftkd_core.types import Detections, ObjectList
from training.feature_cache import network_input
from training.teacher_inference import infer_clip

MIN_SCORE: Final = 0.01
"""Detections below it change no metric."""


@torch.inference_mode()
def detect_clip(
    model: StreamPETR | SparseBEV, clip: Clip, device: torch.device, *, hide_future: bool = False,
    dropped: Sequence[bool] = (),
) -> list[Detections]:  # fmt: skip
    """Return the detections of every frame of a clip in order; labels are indices into CLASS_NAMES.

    A StreamPETR streams the clip, without the frames that are `dropped`, whose detections are empty. A
    SparseBEV runs window by window, with hide_future without future frames. A model with cached features
    takes clips that have them.
    """
    model = model.to(device).eval()
    labels = torch.tensor(our_labels(model.config.class_names), device=device)
    if isinstance(model, SparseBEV):
        if any(dropped):
            raise UserError("frames can be dropped from a stream; a SparseBEV reads windows")
        frames = _detect_windows(model, clip, hide_future)
    else:
        frames = _stream(model, clip, device, dropped or [False] * len(clip.times))
    return [found._replace(labels=labels[found.labels]) for found in frames]


def _detect_windows(model: SparseBEV, clip: Clip, hide_future: bool) -> Iterator[Detections]:
    for output in infer_clip(model, clip, hide_future=hide_future):
        found = decode(output.predictions)
        for row in range(len(found.boxes)):
            yield Detections(*(value[row : row + 1] for value in found))


def _stream(
    model: StreamPETR, clip: Clip, device: torch.device, dropped: Sequence[bool]
) -> Iterator[Detections]:
    memory, is_first = model.start_memory(), True
    for index in range(len(clip.times)):
        if dropped[index]:
            yield Detections(*(torch.zeros(1, 0, *rest, device=device) for rest in ((9,), (), ())))._replace(
                labels=torch.zeros(1, 0, dtype=torch.long, device=device)
            )
            continue
        sample = move_data_to_device(make_sample(clip, index, Augmentation(), is_first), device)
        is_first = False
        frame = sample.frame(network_input(sample.images))
        predictions, memory = model(frame, memory)
        yield decode(predictions)


@dataclass(frozen=True)
class SceneDetections:
    """Detections of some scenes: names; lengths (S,) frames of each; counts (F,) detections of each frame;
    boxes (M, 9) in ego, scores and labels (M,); global_from_ego (F, 4, 4)."""

    names: NDArray[np.str_]
    lengths: NDArray[np.int64]
    counts: NDArray[np.int64]
    boxes: NDArray[np.float64]
    scores: NDArray[np.float64]
    labels: NDArray[np.int64]
    global_from_ego: NDArray[np.float64]

    def save(self, path: Path) -> None:
        """Write the arrays atomically."""
        partial = path.with_name(f"{path.name}.partial.npz")
        np.savez_compressed(partial, **vars(self))
        partial.replace(path)

    @staticmethod
    def load(path: Path) -> "SceneDetections":
        """Read the arrays of `save`."""
        with np.load(path, allow_pickle=False) as file:
            return SceneDetections(**{name: file[name] for name in file.files})

    def frames(self) -> Iterator[tuple[str, int, ObjectList, NDArray[np.float64]]]:
        """Yield scene, index of the frame in it, objects and global_from_ego of every frame."""
        places = [
            (str(name), frame)
            for name, length in zip(self.names, self.lengths, strict=True)
            for frame in range(length)
        ]
        ends = np.cumsum(self.counts)
        for (name, frame), end, count, pose in zip(
            places, ends, self.counts, self.global_from_ego, strict=True
        ):
            own = slice(int(end - count), int(end))
            objects = ObjectList(
                boxes=self.boxes[own], scores=self.scores[own], labels=self.labels[own], stamp_ns=0
            )
            yield name, frame, objects, pose


def detect_scenes(
    model: StreamPETR | SparseBEV, clips: ClipSource, indices: Iterable[int], device: torch.device
) -> SceneDetections:
    """Return the detections of clips by index. The training modes of the model are kept."""
    modes = {module: module.training for module in model.modules()}
    columns: dict[str, list[Any]] = {name: [] for name in ("counts", "boxes", "scores", "labels", "poses")}
    names, lengths = [], []
    for index in tqdm(list(indices), desc="detect", unit="scene", leave=False):
        clip = clips(index)
        names.append(clip.name)
        lengths.append(len(clip.times))
        columns["poses"] += list(clip.global_from_ego)
        for found in detect_clip(model, clip, device):
            boxes, scores, labels = (value[0].float().cpu().numpy() for value in found)
            kept = scores >= MIN_SCORE
            columns["counts"].append(int(kept.sum()))
            for name, values in (("boxes", boxes), ("scores", scores), ("labels", labels)):
                columns[name].append(values[kept])
    for module, mode in modes.items():
        module.training = mode
    return SceneDetections(
        names=np.array(names, dtype=np.str_),
        lengths=np.array(lengths, dtype=np.int64),
        counts=np.array(columns["counts"], dtype=np.int64),
        boxes=np.concatenate([*columns["boxes"], np.zeros((0, 9))]).astype(np.float64),
        scores=np.concatenate([*columns["scores"], np.zeros(0)]).astype(np.float64),
        labels=np.concatenate([*columns["labels"], np.zeros(0)]).astype(np.int64),
        global_from_ego=np.array(columns["poses"], dtype=np.float64).reshape(-1, 4, 4),
    )


def score_scenes(parts: Sequence[SceneDetections], dataroot: Path, version: str) -> dict[str, Any]:
    """Return the official metrics of the scenes that all parts hold together; needs the devkit."""
    from ftkd_core.data.nuscenes import open_dataset, scene_samples
    from ftkd_core.evaluation.nuscenes import PosedObjects, evaluate, to_devkit_results

    dataset = open_dataset(dataroot, version)
    tokens: dict[str, list[str]] = {}
    found: dict[str, PosedObjects] = {}
    for part in parts:
        for name, frame, objects, pose in part.frames():
            if name not in tokens:
                tokens[name] = scene_samples(dataset, name)
            found[tokens[name][frame]] = PosedObjects(objects, pose)
    ordered = [token for name in sorted(tokens) for token in tokens[name]]
    return evaluate(dataset, to_devkit_results(found, ordered), sample_tokens=ordered)
