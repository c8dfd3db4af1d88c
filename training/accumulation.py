# SPDX-License-Identifier: Apache-2.0
"""Split a process's batch into parts whose gradients are accumulated."""

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from ftkd_core.distillation.teacher_output import TeacherOutput

ItemT = TypeVar("ItemT")


def split_batch(item: ItemT, parts: int) -> list[ItemT]:
    """Return an item of a training data set as `parts` items with an equal share of its streams or windows.

    Tensors have the batch first, except the logits and codes (Y, B, ...) of a TeacherOutput. Raises
    ValueError if the batch is no multiple of `parts`.
    """
    return [item] if parts == 1 else [_part(item, index, parts) for index in range(parts)]


def _part(value: Any, index: int, parts: int, axis: int = 0) -> Any:
    if isinstance(value, Tensor):
        if value.shape[axis] % parts:
            raise ValueError(f"a batch of {value.shape[axis]} in {parts} parts: expected a divisor")
        return value.chunk(parts, dim=axis)[index]
    if isinstance(value, TeacherOutput):
        layers = (_part(value.logits, index, parts, 1), _part(value.codes, index, parts, 1))
        return TeacherOutput(*layers, *(_part(entry, index, parts) for entry in value[2:]))
    if isinstance(value, Mapping):
        return {key: _part(entry, index, parts) for key, entry in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_part(entry, index, parts) for entry in value))
    if isinstance(value, (list, tuple)):
        return type(value)(_part(entry, index, parts) for entry in value)
    return value


def merge_states(states: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Return the state of a whole batch from those of its parts."""
    return states[0] if len(states) == 1 else tuple(torch.cat(values) for values in zip(*states, strict=True))
