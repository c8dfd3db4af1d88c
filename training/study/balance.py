# SPDX-License-Identifier: Apache-2.0
"""Balance the parts of a distillation method against the detection loss.

Papers give weights for their own normalizers and networks. Here every part of every method is scaled to the
same share of the detection loss, measured with teacher and student at the start of the run, so that all
methods are compared on equal terms.
"""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Final

import torch
from lightning_fabric.utilities import move_data_to_device
from torch.utils.data import Dataset

from ftkd_core.config import override
from ftkd_core.data.augmentation import AugmentConfig
from ftkd_core.data.clips import StreamDataset
from ftkd_core.data.synthetic_clips import SyntheticClips
from ftkd_core.distillation.baselines import BaselineConfig
from ftkd_core.distillation.cache import TeacherCache
from ftkd_core.distillation.config import FTKDConfig
from ftkd_core.distillation.methods import MethodConfig, method_config
from ftkd_core.models.build import build_stream_petr
from ftkd_core.models.sparse_bev import SparseBEV
from ftkd_core.models.stream_petr import StreamPETR
from ftkd_core.presets import preset
from ftkd_core.weights import start_from, weights_hash
from training.datasets import CachedDataset
from training.distill import load_teacher
from training.distiller import is_distillation_term, make_distiller
from training.feature_cache import cache_features
from training.study.plan import Plan
from training.tasks import StreamingTask
from training.train import split_parts

BATCHES: Final = 20
"""Number of batches that are measured per method."""
_PARTS: Final = {"ftkd/pv": "pv_weight", "ftkd/bev": "bev_weight", "ftkd/logits": "logits_weight"}
_WEIGHTS: Final = ("weight", *_PARTS.values())
_NO_AUGMENTATION: Final = AugmentConfig(flip=0.0, rotation=0.0)  # training adds colour changes to images


def measure_terms(
    task: StreamingTask,
    dataset: Dataset[Any],
    batches: int,
    device: torch.device,
    *,
    frozen_backbone: bool = False,
) -> dict[str, float]:
    """Return the mean of every loss term over the first batches of a data set. No weight is trained.

    Batch norms update their statistics, except those of a frozen backbone, as in the run
    (`Trainer.start_training`).
    """
    task.train()
    if frozen_backbone:
        task.detector.backbone.eval()
    state = task.start_state()
    sums: dict[str, float] = {}
    with torch.no_grad():
        for step in range(batches):
            batch = move_data_to_device(dataset[step], device)
            generator = torch.Generator().manual_seed(step)
            terms, state = task(batch, state, generator)
            for name, value in terms.items():
                sums[name] = sums.get(name, 0.0) + float(value) / batches
    return sums


def balanced(config: MethodConfig, terms: dict[str, float], share: float) -> MethodConfig:
    """Return the method with weights such that each part is `share` of the detection loss, given the `terms`
    that were measured with `config`."""
    detection = sum(value for name, value in terms.items() if not is_distillation_term(name))
    if isinstance(config, BaselineConfig):
        part = sum(value for name, value in terms.items() if name.startswith(f"{config.name}/"))
        return replace(config, weight=config.weight * share * detection / max(part, 1e-12))
    assert isinstance(config, FTKDConfig)
    changes: dict[str, Any] = {}
    for prefix, weight in _PARTS.items():
        part = sum(value for name, value in terms.items() if name.startswith(prefix))
        if part > 0:
            changes[weight] = getattr(config, weight) * share * detection / part
    return replace(config, **changes)


def balance(
    teacher: SparseBEV,
    student: StreamPETR,
    config: MethodConfig,
    dataset: Dataset[Any],
    *,
    streams: int,
    share: float,
    batches: int = BATCHES,
    frozen_backbone: bool = False,
) -> tuple[MethodConfig, dict[str, float]]:
    """Return the balanced method and the measured terms. Items of the data set pair stream batches with the
    teacher's input; frozen_backbone is whether the runs freeze the student's backbone."""
    device = next(student.parameters()).device
    distiller = make_distiller(teacher, student, config)
    task = StreamingTask(student, streams, distiller).to(device)
    distiller.teacher.to(device)
    terms = measure_terms(task, dataset, batches, device, frozen_backbone=frozen_backbone)
    return balanced(config, terms, share), terms


def balance_row(
    plan: Plan, method: str, settings: Sequence[str], teacher: Path, cache: Path, clips: SyntheticClips,
    device: torch.device, *, hide_future: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Balance a method, changed by `settings` (each `name=value`), on the cached outputs of a teacher, with
    hide_future those without future frames.

    Returns `{"settings": weights, "terms": measured terms}`.
    """
    torch.manual_seed(0)
    model = build_stream_petr(override(preset(plan.preset), plan.set_student))
    guide = load_teacher(teacher)
    if plan.init:
        start_from(Path(plan.init), model, model.config, split_parts(plan.init_parts))
    model.to(device)
    inputs = (
        cache_features(model, clips, clips.cache.parent, plan.scenes, device)
        if plan.cache_features
        else clips
    )
    data = StreamDataset(
        inputs, plan.scenes, num_streams=plan.streams, segment=10, augment=_NO_AUGMENTATION, seed=0
    )
    chosen = override(method_config(method), settings)
    distiller = make_distiller(guide, model, chosen, hide_future=hide_future)
    description = distiller.describe(weights_hash(teacher), clips.name)
    items = CachedDataset(data, TeacherCache(cache, description, plan.scenes))
    config, terms = balance(
        guide, model.to(device), chosen, items, streams=plan.streams, share=plan.share,
        frozen_backbone=plan.backbone_ratio == 0,
    )  # fmt: skip
    weights = {name: value for name, value in asdict(config).items() if name in _WEIGHTS}
    return {"settings": weights, "terms": terms}
