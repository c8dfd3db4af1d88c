# SPDX-License-Identifier: Apache-2.0
"""Activation checkpointing: do not store the activations of a part of a network, compute them again in the
backward pass.

Gradients, batch statistics and dropout masks equal those without it. Upstream calls it `with_cp`.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

ResultT = TypeVar("ResultT")


def recompute(module: nn.Module, run: Callable[..., ResultT], *inputs: Any) -> ResultT:
    """Return run(*inputs), which uses the parameters of `module`, and store only the inputs for the backward
    pass. inputs: tensors, or tuples and named tuples of tensors and other values. Without gradients it is a
    plain call."""
    leaves, structure = tree_flatten(inputs)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    trained = any(tensor.requires_grad for tensor in (*tensors, *module.parameters()))
    if not (torch.is_grad_enabled() and trained):
        return run(*inputs)

    def call(*values: Any) -> ResultT:
        return run(*tree_unflatten(values, structure))

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _unchanged_statistics(module)

    result: ResultT = checkpoint(call, *leaves, use_reentrant=False, context_fn=contexts)
    return result


def set_recompute(detector: nn.Module, enabled: bool) -> None:
    """Switch activation checkpointing of a detector's backbone and decoder on or off."""
    for module in detector.modules():
        if hasattr(module, "recomputes"):
            setattr(module, "recomputes", enabled)  # noqa: B010, a plain attribute to mypy


@contextmanager
def _unchanged_statistics(module: nn.Module) -> Iterator[None]:
    """Keep the running statistics of batch norms, because the forward pass has updated them already."""
    norms = [part for part in module.modules() if isinstance(part, nn.BatchNorm2d) and part.training]
    before = [(norm.momentum, norm.num_batches_tracked.clone()) for norm in norms]  # type: ignore[union-attr]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, (momentum, batches) in zip(norms, before, strict=True):
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(batches)  # type: ignore[union-attr]
