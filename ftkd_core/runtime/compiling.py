# SPDX-License-Identifier: Apache-2.0
"""`torch.compile` for functions of fixed shapes, without a limit on how often one function is compiled."""

import types
from collections.abc import Callable
from typing import Any

import torch


def compile_separately(
    function: Callable[..., Any], *, mode: str | None = None, backend: str = "inductor"
) -> Callable[..., Any]:
    """Compile a Python function or method as one full graph with its own compilation cache.

    torch keeps compiled code per code object and raises at the ninth variant of a full graph
    (`torch._dynamo.config.recompile_limit`). Each result therefore has its own code object. Call it with
    arguments of one kind (types, shapes) only.
    """
    plain: Any = getattr(function, "__func__", function)
    own = types.FunctionType(
        plain.__code__.replace(), plain.__globals__, plain.__name__, plain.__defaults__, plain.__closure__
    )
    own.__kwdefaults__ = plain.__kwdefaults__
    bound: Callable[..., Any] = own
    if isinstance(function, types.MethodType):
        bound = types.MethodType(own, function.__self__)
    compiled: Callable[..., Any] = torch.compile(
        bound, fullgraph=True, dynamic=False, mode=mode, backend=backend
    )
    return compiled
