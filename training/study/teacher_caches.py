# SPDX-License-Identifier: Apache-2.0
"""Caches of teacher outputs: which kind a method reads, and how to fill one."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from ftkd_core.config import override
from ftkd_core.data.clips import Clip
from ftkd_core.data.synthetic_clips import SyntheticClips
from ftkd_core.distillation.baselines import BaselineConfig
from ftkd_core.distillation.cache import fill_cache
from ftkd_core.distillation.config import FTKDConfig
from ftkd_core.distillation.methods import MethodConfig, method_config
from ftkd_core.models.build import build_stream_petr
from ftkd_core.presets import preset
from ftkd_core.weights import weights_hash
from training.distill import load_teacher
from training.distiller import make_distiller
from training.feature_cache import cache_features


def cache_kind(method: str, settings: Sequence[str] = ()) -> str:
    """Return the kind of cache that a method reads, given the experiment's FTKD settings `name=value`.

    `relations` for the baselines; `future` for FTKD and logits, or `future_TARGET` if FTKD's pv_target is not
    the default.
    """
    if isinstance(method_config(method), BaselineConfig):
        return "relations"
    target = override(FTKDConfig(), settings).pv_target
    return "future" if target == FTKDConfig().pv_target else f"future_{target}"


def widest_method(kind: str) -> MethodConfig:
    """Return the method that reads everything in a cache of this kind."""
    name, _, target = kind.partition("_")
    if name == "relations":
        return method_config("stxd")
    return override(FTKDConfig(), [f"pv_target={target}"] if target else [])


def fill_teacher_cache(
    folder: Path, kind: str, teacher: Path, student: str, clips: SyntheticClips, scenes: int,
    device: torch.device, *, hide_future: bool = False, cached_features: bool = False,
    before_scene: Callable[[], object] = lambda: None,
) -> None:  # fmt: skip
    """Fill a cache with everything that methods of its kind read. `student` is the students' preset.

    With hide_future, the teacher sees no future frames. With cached_features, the teacher's backbone is
    replaced by its feature cache. before_scene is called before each scene; an exception from it stops the
    work between two scenes.
    """
    model = load_teacher(teacher)
    distiller = make_distiller(
        model, build_stream_petr(preset(student)), widest_method(kind), hide_future=hide_future
    )
    model.to(device)
    description = distiller.describe(weights_hash(teacher), clips.name)
    inputs = cache_features(model, clips, clips.cache.parent, scenes, device) if cached_features else clips

    def load(index: int) -> Clip:
        before_scene()
        return inputs(index)

    fill_cache(folder, description, distiller.run_teacher_on_clip, load, scenes)
