# SPDX-License-Identifier: Apache-2.0
"""Target headings of classes that are symmetric or have no heading."""

import torch
from torch import Tensor

from ftkd_core.classes import CLASS_NAMES, HEADINGLESS, SYMMETRIC


def target_heading(
    goal: Tensor, predicted: Tensor, labels: Tensor, class_names: tuple[str, ...] = CLASS_NAMES
) -> Tensor:
    """Headings (..., 2) to learn for objects of `labels` (...): of a class that looks the same from behind,
    the nearer of the true heading and its reverse (the devkit scores no more); nan for classes without."""
    reversed_ = is_one_of(SYMMETRIC, labels, class_names) & ((goal * predicted).sum(-1) < 0)
    goal = torch.where(reversed_[..., None], -goal, goal)
    return torch.where(is_one_of(HEADINGLESS, labels, class_names)[..., None], torch.nan, goal)


def is_one_of(names: tuple[str, ...], labels: Tensor, class_names: tuple[str, ...]) -> Tensor:
    """Whether each label (...) is a place in class_names of one of the names."""
    wanted = labels.new_tensor([place for place, name in enumerate(class_names) if name in names])
    return torch.isin(labels, wanted)
