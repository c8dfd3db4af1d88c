# SPDX-License-Identifier: Apache-2.0
"""Output of a frozen teacher for one frame, as every distillation method reads it.

Symbols: B batch, T frames of the window (current, past, future), N cameras, Y decoder layers, Q queries, K
classes, C channels, H/W feature size.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ftkd_core.distillation.reconstruction import future_aware_target
from ftkd_core.models.predictions import Predictions


class PreviousMaps(NamedTuple):
    """Feature maps of the previous key frame: maps {stride: (B, N, C, H, W)}; known (B,), 1 if that frame
    exists, else 0."""

    maps: Mapping[int, Tensor]
    known: Tensor


class TeacherOutput(NamedTuple):
    """Output of the frozen teacher for one frame, computed or read from a cache.

    logits (Y, B, Qt, K) and codes (Y, B, Qt, 10) in the student's ego frame; features (B, Qt, Ct) of the last
    layer; targets {stride: (B, N, Ct, H, W)}, the maps to distill, and their weights {stride: (B,)};
    previous, the maps of the previous frame, for methods that compare frames.
    """

    logits: Tensor
    codes: Tensor
    features: Tensor
    targets: Mapping[int, Tensor]
    target_weights: Mapping[int, Tensor]
    previous: PreviousMaps | None = None


@torch.no_grad()
def make_teacher_output(
    predictions: Predictions,
    pyramid: Mapping[int, Tensor],
    real: Tensor,
    num_past: int,
    map_target: str,
    *,
    with_previous: bool = False,
) -> TeacherOutput:
    """Return the output of a teacher from its predictions and its pyramid.

    Args: predictions for the current frame; pyramid {stride: (B, T, N, C, H, W)} of the current frame,
    num_past past frames and the future; real (B, T), False for frames that repeat another; map_target as
    `FTKDConfig.pv_target`; with_previous adds the maps of the first past
    frame. Errors: ValueError if with_previous is set and there are no past frames.
    """
    first_future = 1 + num_past
    targets, weights = {}, {}
    for stride, maps in pyramid.items():
        future = maps[:, first_future:].float()
        targets[stride], weight = future_aware_target(
            maps[:, 0].float(), future, real[:, first_future:], map_target
        )
        weights[stride] = weight * real[:, 0]
    previous = None
    if with_previous:
        if num_past < 1:
            raise ValueError(
                "a teacher with 0 past frames has no maps of a previous frame; expected 1 or more"
            )
        before = {stride: maps[:, 1].float() for stride, maps in pyramid.items()}
        previous = PreviousMaps(before, real[:, 1].to(predictions.features.dtype))
    return TeacherOutput(
        predictions.logits, predictions.codes, predictions.features, targets, weights, previous
    )
