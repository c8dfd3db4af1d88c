# SPDX-License-Identifier: Apache-2.0
"""What losses are divided by when several processes train one model."""

import torch
from torch import Tensor, distributed


def shared_count(count: Tensor) -> Tensor:
    """The mean over all processes of a number of objects, counted as at least one in all.

    DDP averages gradients over processes. A sum over this process's objects, divided by this, then gives the
    gradient that one process with everybody's batch would have; divided by the process's own count, each
    object would weigh more where there are few (upstream: mmdet's reduce_mean of the average factor). Every
    process must call it as often as the others.
    """
    total = count.detach().to(torch.float32).clone()
    if not (distributed.is_available() and distributed.is_initialized()):
        return total.clamp(min=1.0)
    distributed.all_reduce(total)
    return total.clamp(min=1.0) / distributed.get_world_size()
