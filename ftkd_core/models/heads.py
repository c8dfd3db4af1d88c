# SPDX-License-Identifier: Apache-2.0
"""Prediction heads of the decoders, and the choice of a 2-D head."""

from typing import Final

from torch import nn

from ftkd_core.boxes import CODE_DIM
from ftkd_core.config import DetectorConfig
from ftkd_core.models.dense_head import DenseHead
from ftkd_core.models.focal_head import FocalHead

PRIOR_LOGIT: Final = -4.6
"""Initial bias of classifiers, a score of 0.01, as focal loss needs it (Lin et al. 2017)."""


def class_head(channels: int, num_classes: int) -> nn.Sequential:
    """Return the classifier (B, Q, C) -> (B, Q, K); its initial scores are 0.01."""
    head = nn.Sequential(
        nn.Linear(channels, channels), nn.LayerNorm(channels), nn.ReLU(),
        nn.Linear(channels, channels), nn.LayerNorm(channels), nn.ReLU(),
        nn.Linear(channels, num_classes),
    )  # fmt: skip
    nn.init.constant_(head[-1].bias, PRIOR_LOGIT)  # type: ignore[arg-type]
    return head


def box_head(channels: int) -> nn.Sequential:
    """Return the box regressor (B, Q, C) -> (B, Q, 10)."""
    return nn.Sequential(
        nn.Linear(channels, channels), nn.ReLU(), nn.Linear(channels, channels), nn.ReLU(),
        nn.Linear(channels, CODE_DIM),
    )  # fmt: skip


def start_near_zero(head: nn.Sequential) -> None:
    """Initialise a box head so that its first predictions are close to 0."""
    nn.init.normal_(head[-1].weight, std=0.01)  # type: ignore[arg-type]
    nn.init.zeros_(head[-1].bias)  # type: ignore[arg-type]


def build_auxiliary_head(config: DetectorConfig) -> DenseHead | FocalHead | None:
    """Return the 2-D head that `config.auxiliary_kind` selects."""
    channels, classes = config.backbone.neck_channels, len(config.class_names)
    match config.auxiliary_kind:
        case "dense":
            return DenseHead(channels, classes, config.backbone.auxiliary_stride)
        case "focal":
            return FocalHead(channels, classes)
        case _:
            return None
