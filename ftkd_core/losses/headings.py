# SPDX-License-Identifier: Apache-2.0
"""Target headings of classes that are symmetric or have no heading."""

import torch
from torch import Tensor

from ftkd_core.classes import CLASS_NAMES, HEADINGLESS, SYMMETRIC


def target_heading(
    heading: Tensor, predicted: Tensor, labels: Tensor, class_names: tuple[str, ...] = CLASS_NAMES
) -> Tensor:
    """Return target headings (..., 2) for objects of `labels` (...).

    For symmetric classes this is the true heading or its reverse, whichever is nearer to the prediction (the
    devkit scores no more than that); for classes without a heading it is nan.
    """
    reversed_ = is_one_of(SYMMETRIC, labels, class_names) & ((heading * predicted).sum(-1) < 0)
    heading = torch.where(reversed_[..., None], -heading, heading)
    return torch.where(is_one_of(HEADINGLESS, labels, class_names)[..., None], torch.nan, heading)


def is_one_of(names: tuple[str, ...], labels: Tensor, class_names: tuple[str, ...]) -> Tensor:
    """Return whether each label (...), an index into class_names, is the class of one of the names."""
    wanted = labels.new_tensor([place for place, name in enumerate(class_names) if name in names])
    return torch.isin(labels, wanted)
