# SPDX-License-Identifier: Apache-2.0
"""`torch.compile` for functions of fixed shapes, which many engines of one process may each compile."""

import types
from collections.abc import Callable
from typing import Any

import torch


def compile_separately(
    function: Callable[..., Any], *, mode: str | None = None, backend: str = "inductor"
) -> Callable[..., Any]:
    """A function or method of Python compiled as one full graph for each kind of arguments, with a cache of
    its own.

    torch keeps what it compiled beside the function's code object, whoever asked for it, and where that must
    be one graph it raises at the ninth kind (`torch._dynamo.config.recompile_limit`). So each result has a
    code object of its own; give it arguments of one kind only, and there is no limit.
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
