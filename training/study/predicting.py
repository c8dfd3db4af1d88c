# SPDX-License-Identifier: Apache-2.0
"""Run a trained model on clips and store its detections in a file, which another machine can score.

A clip is a scene of the synthetic world at key frames (2 Hz); `scoring.py` compares its detections with the
same seeds exported as a nuScenes data set. Symbols: F key frames of all clips, M detections of all frames.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import numpy as np
import torch
from lightning_fabric.utilities import move_data_to_device
from tqdm import tqdm

from ftkd_core.classes import our_labels
from ftkd_core.data.augmentation import Augmentation
from ftkd_core.data.clips import Clip, make_sample
from ftkd_core.models.predictions import decode
from ftkd_core.models.sparse_bev import SparseBEV
from ftkd_core.models.stream_petr import StreamPETR
from ftkd_core.types import Detections
from training.feature_cache import network_input
from training.teacher_inference import infer_clip

_MIN_SCORE: Final = 0.01  # detections below it change no metric


@torch.inference_mode()
def detect_clip(
    model: StreamPETR | SparseBEV, clip: Clip, device: torch.device, *, hide_future: bool = False
) -> list[Detections]:
    """Return the detections of every frame of a clip in order; labels are indices into CLASS_NAMES.

    A StreamPETR streams the clip, a SparseBEV runs window by window, with hide_future without future frames.
    A model with cached features takes clips that have them.
    """
    model = model.to(device).eval()
    labels = torch.tensor(our_labels(model.config.class_names), device=device)
    if isinstance(model, SparseBEV):
        frames = _detect_windows(model, clip, hide_future)
    else:
        frames = _stream(model, clip, device)
    return [found._replace(labels=labels[found.labels]) for found in frames]


def _detect_windows(model: SparseBEV, clip: Clip, hide_future: bool) -> Iterator[Detections]:
    for output in infer_clip(model, clip, hide_future=hide_future):
        found = decode(output.predictions)
        for row in range(len(found.boxes)):
            yield Detections(*(value[row : row + 1] for value in found))


def _stream(model: StreamPETR, clip: Clip, device: torch.device) -> Iterator[Detections]:
    memory = model.start_memory()
    for index in range(len(clip.times)):
        sample = move_data_to_device(make_sample(clip, index, Augmentation(), index == 0), device)
        frame = sample.frame(network_input(sample.images))
        predictions, memory = model(frame, memory)
        yield decode(predictions)


def predict(
    model: StreamPETR | SparseBEV, load: Callable[[int], Clip], count: int, output: Path,
    device: torch.device, *, hide_future: bool = False,
) -> Path:  # fmt: skip
    """Write the detections on clips 0 .. count - 1 to an .npz file: boxes (M, 9) in ego, scores and labels
    (M,), counts (F,) of detections per frame, global_from_ego (F, 4, 4)."""
    frames: list[Detections] = []
    poses = []
    for index in tqdm(range(count), desc="detect", unit="scene"):
        clip = load(index)
        frames += detect_clip(model, clip, device, hide_future=hide_future)
        poses.append(clip.global_from_ego)
    boxes, scores, labels = (
        [getattr(f, name)[0].float().cpu().numpy() for f in frames] for name in ("boxes", "scores", "labels")
    )
    kept = [score >= _MIN_SCORE for score in scores]
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
