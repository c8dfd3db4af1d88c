# SPDX-License-Identifier: Apache-2.0
"""What a frozen teacher says of a frame, for every method that learns from it.

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
    """Feature maps of the key frame before: maps {stride: (B, N, C, H, W)} and known (B,), 1 where there is
    such a frame, else 0."""

    maps: Mapping[int, Tensor]
    known: Tensor


class TeacherAnswer(NamedTuple):
    """What the frozen teacher says of one frame, computed now or read from a cache.

    logits (Y, B, Qt, K) and codes (Y, B, Qt, 10) in the student's ego frame, features (B, Qt, Ct) after the
    last layer; targets, {stride: (B, N, Ct, H, W)} of maps to learn from, for FTKD with the future absorbed,
    and their weights {stride: (B,)}; the maps of the frame before, where a method relates frames.
    """

    logits: Tensor
    codes: Tensor
    features: Tensor
    targets: Mapping[int, Tensor]
    target_weights: Mapping[int, Tensor]
    previous: PreviousMaps | None = None


@torch.no_grad()
def teacher_answer(
    predictions: Predictions,
    pyramid: Mapping[int, Tensor],
    real: Tensor,
    num_past: int,
    map_target: str,
    *,
    map_frames: str = "current",
    with_previous: bool = False,
) -> TeacherAnswer:
    """An answer from the teacher's predictions for the current frame and its pyramid {stride: (B, T, N, C, H,
    W)}: the current frame, num_past past ones, the future; real (B, T) says which are frames of their own.

    map_target as `FTKDConfig.pv_target`, map_frames as its `pv_frames`: with `all`, targets are of B (1 +
    num_past) frames, window by window, of weight 0 where a frame only repeats another; with_previous keeps
    the maps of the first past frame.
    """
    first_future = 1 + num_past
    targets, weights = {}, {}
    for stride, maps in pyramid.items():
        future = maps[:, first_future:].float()
        taught = [
            future_aware_target(maps[:, frame].float(), future, real[:, first_future:], map_target)
            for frame in range(first_future if map_frames == "all" else 1)
        ]
        targets[stride] = torch.stack([target for target, _ in taught], 1).flatten(0, 1)
        told = torch.stack([weight for _, weight in taught], 1)  # (B, frames)
        weights[stride] = (told * real[:, : told.shape[1]]).flatten()
    previous = None
    if with_previous:
        if num_past < 1:
            raise ValueError("a teacher without past frames cannot say how frames relate")
        before = {stride: maps[:, 1].float() for stride, maps in pyramid.items()}
        previous = PreviousMaps(before, real[:, 1].to(predictions.features.dtype))
    return TeacherAnswer(
        predictions.logits, predictions.codes, predictions.features, targets, weights, previous
    )
