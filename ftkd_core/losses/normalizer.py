# SPDX-License-Identifier: Apache-2.0
"""Normalizer of losses when several processes train one model."""

import torch
from torch import Tensor, distributed


def shared_count(count: Tensor) -> Tensor:
    """Return the mean of a count over all processes, at least 1 / number of processes.

    DDP averages gradients over processes. A sum over this process's objects divided by this mean gives the
    gradient of one process with the whole batch; divided by the process's own count, objects of processes
    with few objects would weigh more (mmdet: reduce_mean of the average factor). Every process must call it
    equally often.
    """
    total = count.detach().to(torch.float32).clone()
    if not (distributed.is_available() and distributed.is_initialized()):
        return total.clamp(min=1.0)
    distributed.all_reduce(total)
    return total.clamp(min=1.0) / distributed.get_world_size()
