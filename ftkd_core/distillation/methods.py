# SPDX-License-Identifier: Apache-2.0
"""Distillation methods by name: FTKD, its ablations and its baselines.

The module of every method takes the same arguments and has the same attributes: `strides` of the teacher's
maps, `map_target` (as `FTKDConfig.pv_target`) and `needs_previous` (whether it needs the maps of the previous
frame).
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from ftkd_core.config import SparseBEVConfig
from ftkd_core.distillation.baselines import Baseline, BaselineConfig
from ftkd_core.distillation.config import FTKDConfig
from ftkd_core.distillation.ftkd import FTKD
from ftkd_core.errors import UserError

MethodConfig = FTKDConfig | BaselineConfig

_FTKD: Final = FTKDConfig()
METHODS: Final[dict[str, MethodConfig]] = {
    "ftkd": _FTKD,
    "ftkd_no_pv": replace(_FTKD, pv_weight=0.0),
    "ftkd_no_bev": replace(_FTKD, bev_weight=0.0),
    "ftkd_no_fld": replace(_FTKD, logits_weight=0.0),
    # The logit distillation of DETRDistill (Chang et al. 2023): all layers, paired by prediction.
    "logits": replace(
        _FTKD, pv_weight=0.0, bev_weight=0.0, matching="prediction", background_reach_m=0.0
    ),
    "mgd": BaselineConfig(name="mgd"),
    "cwd": BaselineConfig(name="cwd"),
    "stxd": BaselineConfig(name="stxd"),
}  # fmt: skip
"""The row `ftkd_blind` of the experiment is `ftkd` with the teacher's future frames hidden."""


def method_config(name: str) -> MethodConfig:
    """Return the settings of a method. Errors: UserError that lists the known names."""
    if name not in METHODS:
        raise UserError(f"unknown distillation method {name!r}; expected one of {', '.join(METHODS)}")
    return METHODS[name]


def build_method(
    config: MethodConfig,
    *,
    student_channels: int,
    teacher_channels: int,
    map_channels: Mapping[int, tuple[int, int]],
    teacher: SparseBEVConfig | None = None,
) -> FTKD | Baseline:
    """Return the module of a method; arguments as in `FTKD`."""
    if isinstance(config, BaselineConfig):
        return Baseline(config, map_channels)
    return FTKD(
        config,
        student_channels=student_channels,
        teacher_channels=teacher_channels,
        map_channels=map_channels,
        teacher=teacher,
    )
