# SPDX-License-Identifier: Apache-2.0
"""How large the parts of a distillation method shall be beside the detection loss.

Papers give weights for their own normalisers and networks. Here each part of every method is brought to the
same share of the detection loss, measured with the teacher and the student as they are when the run starts:
the same footing for all of them.
"""

from dataclasses import replace
from typing import Any, Final

import torch
from lightning_fabric.utilities import move_data_to_device
from torch.utils.data import Dataset

from ftkd_core.distillation.baselines import BaselineConfig
from ftkd_core.distillation.config import FTKDConfig
from ftkd_core.distillation.methods import MethodConfig
from ftkd_core.models.sparse_bev import SparseBEV
from ftkd_core.models.stream_petr import StreamPETR
from training.tasks import StreamLesson, is_taught, make_distiller

BATCHES: Final = 20
"""How many are measured for a method."""
_PARTS = {"ftkd/pv": "pv_weight", "ftkd/bev": "bev_weight", "ftkd/logits": "logits_weight"}


def measure_terms(
    lesson: StreamLesson,
    dataset: Dataset[Any],
    batches: int,
    device: torch.device,
    *,
    frozen_backbone: bool = False,
) -> dict[str, float]:
    """Mean of every loss term over the first batches of a data set; no weight is learnt, but batch norms see
    the data, those of a frozen backbone excepted: as in the run (`Trainer.start_training`)."""
    lesson.train()
    if frozen_backbone:
        lesson.detector.backbone.eval()
    state = lesson.start_state()
    sums: dict[str, float] = {}
    with torch.no_grad():
        for step in range(batches):
            batch = move_data_to_device(dataset[step], device)
            generator = torch.Generator().manual_seed(step)
            terms, state = lesson(batch, state, generator)
            for name, value in terms.items():
                sums[name] = sums.get(name, 0.0) + float(value) / batches
    return sums


def balanced(config: MethodConfig, terms: dict[str, float], share: float) -> MethodConfig:
    """The method with every part's weight set so that, on `terms` measured with `config`, the part is `share`
    of the detection loss."""
    detection = sum(value for name, value in terms.items() if not is_taught(name))
    if isinstance(config, BaselineConfig):
        mine = sum(value for name, value in terms.items() if name.startswith(f"{config.name}/"))
        return replace(config, weight=config.weight * share * detection / max(mine, 1e-12))
    changes = {}
    for prefix, weight in _PARTS.items():
        mine = sum(value for name, value in terms.items() if name.startswith(prefix))
        if mine > 0:
            changes[weight] = getattr(config, weight) * share * detection / mine
    assert isinstance(config, FTKDConfig)
    return replace(config, **changes)  # type: ignore[arg-type]


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
    """The balanced method, and the terms it was balanced on; dataset pairs stream batches with teaching,
    frozen_backbone says that the run will leave the student's backbone as it is."""
    device = next(student.parameters()).device
    distiller = make_distiller(teacher, student, config)
    lesson = StreamLesson(student, streams, distiller).to(device)
    distiller.teacher.to(device)
    terms = measure_terms(lesson, dataset, batches, device, frozen_backbone=frozen_backbone)
    return balanced(config, terms, share), terms
