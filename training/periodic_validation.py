# SPDX-License-Identifier: Apache-2.0
"""Official nuScenes metrics during training, computed by all processes of the run.

Each process detects its share of the scenes with the model that was just saved. Only the first process loads
the tables of the devkit: it joins the detections, computes the metrics and keeps the best weights.
"""

import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from lightning_fabric import Fabric

from ftkd_core.json_files import write_json
from ftkd_core.models.sparse_bev import SparseBEV
from ftkd_core.models.stream_petr import StreamPETR
from training.split_detection import SceneDetections, detect_scenes, score_scenes

if TYPE_CHECKING:  # it needs the devkit, which training on the synthetic world does not
    from ftkd_core.data.nuscenes_clips import NuScenesClips

BEST_NAME: Final = "best.safetensors"
FOLDER: Final = "validation"
_LOGGED: Final = ("NDS", "mAP", "mATE", "mASE", "mAOE", "mAVE", "mAAE", "samples")


@dataclass(frozen=True, kw_only=True)
class ValidationPlan:
    """Clips of a split that are scored every `every` steps and at the end."""

    clips: "NuScenesClips"
    every: int

    def is_due(self, step: int, steps: int) -> bool:
        """Return whether to validate after a step."""
        return step % self.every == 0 or step == steps


def validate_model(
    plan: ValidationPlan, fabric: Fabric, model: StreamPETR | SparseBEV, weights: Path, step: int
) -> dict[str, Any] | None:
    """Return the metrics of a model on the split, None in all processes but the first; weights is its file.
    All processes must call it; files are written to the folder `validation` next to the weights."""
    began = time.monotonic()
    folder = weights.parent / FOLDER
    folder.mkdir(exist_ok=True)
    own = range(fabric.global_rank, len(plan.clips), fabric.world_size)
    detect_scenes(model, plan.clips, own, fabric.device).save(folder / f"rank-{fabric.global_rank}.npz")
    fabric.barrier()
    if not fabric.is_global_zero:
        return None
    parts = [SceneDetections.load(folder / f"rank-{rank}.npz") for rank in range(fabric.world_size)]
    found = score_scenes(parts, plan.clips.root, plan.clips.version)
    metrics = {
        **{name: found[name] for name in _LOGGED},
        "step": step,
        "split": plan.clips.split,
        "seconds": round(time.monotonic() - began, 1),
    }
    write_json(folder / f"step-{step:07d}.json", {**found, **metrics})
    keep_best(weights, metrics)
    return metrics


def keep_best(weights: Path, metrics: Mapping[str, Any]) -> None:
    """Copy the weights to `best.safetensors` if their NDS is the highest so far."""
    record = weights.parent / FOLDER / "best.json"
    score = metrics["NDS"]
    if score is None:
        return
    if record.exists():
        best = json.loads(record.read_text(encoding="utf-8"))
        if best["NDS"] >= score and best["step"] != metrics["step"]:
            return
    partial = weights.with_name(f"{BEST_NAME}.partial")
    shutil.copyfile(weights, partial)
    partial.replace(weights.with_name(BEST_NAME))
    write_json(record, dict(metrics))
