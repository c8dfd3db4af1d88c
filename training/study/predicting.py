# SPDX-License-Identifier: Apache-2.0
"""Run a trained model on clips and store its detections in a file, which another machine can score.

A clip is a scene of the synthetic world at key frames (2 Hz); `scoring.py` compares its detections with the
same seeds exported as a nuScenes data set. Symbols: F key frames of all clips, M detections of all frames.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from ftkd_core.data.clips import Clip
from ftkd_core.models.sparse_bev import SparseBEV
from ftkd_core.models.stream_petr import StreamPETR
from ftkd_core.types import Detections
from training.split_detection import MIN_SCORE, detect_clip


def predict(
    model: StreamPETR | SparseBEV, load: Callable[[int], Clip], count: int, output: Path,
    device: torch.device, *, hide_future: bool = False, drop: float = 0.0,
) -> Path:  # fmt: skip
    """Write the detections on clips 0 .. count - 1 to an .npz file: boxes (M, 9) in ego, scores and labels
    (M,), counts (F,) of detections per frame, global_from_ego (F, 4, 4), seen (F,).

    A share `drop` of the frames, drawn by clip, is not seen, as if the camera round were lost.
    """
    frames: list[Detections] = []
    poses: list[NDArray[np.float64]] = []
    seen: list[bool] = []
    for index in tqdm(range(count), desc="detect", unit="scene"):
        clip = load(index)
        lost = [bool(value) for value in np.random.default_rng(index).random(len(clip.times)) < drop]
        frames += detect_clip(model, clip, device, hide_future=hide_future, dropped=lost)
        seen += [not value for value in lost]
        poses.append(clip.global_from_ego)
    boxes, scores, labels = (
        [getattr(f, name)[0].float().cpu().numpy() for f in frames] for name in ("boxes", "scores", "labels")
    )
    kept = [score >= MIN_SCORE for score in scores]
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(output.name + ".partial.npz")
    np.savez_compressed(
        partial,
        boxes=np.concatenate([b[k] for b, k in zip(boxes, kept, strict=True)]).astype(np.float32),
        scores=np.concatenate([s[k] for s, k in zip(scores, kept, strict=True)]).astype(np.float32),
        labels=np.concatenate([v[k] for v, k in zip(labels, kept, strict=True)]).astype(np.int64),
        counts=np.array([int(k.sum()) for k in kept]),
        global_from_ego=np.concatenate(poses),
        seen=np.array(seen),
    )
    partial.replace(output)
    return output
