# SPDX-License-Identifier: Apache-2.0
"""The teacher of a distillation run, and the cache of its outputs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_fabric import Fabric

from ftkd_core.config import to_dict
from ftkd_core.data.clips import ClipSource
from ftkd_core.distillation.cache import TeacherCache, fill_cache, join_shards, refuse_augmentation
from ftkd_core.distillation.methods import METHODS, MethodConfig
from ftkd_core.models.sparse_bev import SparseBEV
from training.config import TrainConfig, WindowTrainConfig
from training.datasets import teacher_view
from training.distiller import Distiller


@dataclass(frozen=True)
class TeacherSource:
    """The teacher of a run: its method, the hash of its weights, the cache of its outputs, and whether its
    future frames are hidden."""

    teacher: SparseBEV
    method: MethodConfig
    weights_hash: str = ""
    cache: Path | None = None
    fill_cache: bool = False
    hide_future: bool = False

    @property
    def notes(self) -> dict[str, Any]:
        """Entries of the student's weights file: the method's name, or its settings if it has none, and the
        hash of the teacher's weights; `hide_future` if the teacher's future was hidden."""
        names = [name for name, config in METHODS.items() if config == self.method]
        hidden = {"hide_future": True} if self.hide_future else {}
        return {"method": names[0] if names else to_dict(self.method), "teacher": self.weights_hash} | hidden


def open_cache(
    config: TrainConfig | WindowTrainConfig, source: TeacherSource, folder: Path, distiller: Distiller,
    clips: ClipSource, scenes: int, fabric: Fabric,
) -> TeacherCache:  # fmt: skip
    """Open the cache of the teacher's outputs; fill it first if `source.fill_cache` is set."""
    refuse_augmentation(config.augment)
    description = distiller.describe(source.weights_hash, clips.name, config.augment)
    shards = scenes * max(1, config.augment.views)
    if source.fill_cache:
        fill_cache(
            folder, description, lambda item: distiller.run_teacher_on_clip(*item),
            lambda number: teacher_view(clips, scenes, config.augment, number), shards,
            fabric.global_rank, fabric.world_size,
        )  # fmt: skip
        fabric.barrier()
        if fabric.is_global_zero:
            join_shards(folder, description)
    fabric.barrier()
    return TeacherCache(folder, description, shards)
