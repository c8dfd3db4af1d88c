# SPDX-License-Identifier: Apache-2.0
"""Interleaved timing of several functions."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ftkd_core.percentiles import Summary, summarize


def time_alternating(
    steps: Sequence[Callable[[], Any]],
    *,
    runs: int = 200,
    warm_up: int = 50,
    device: torch.device | None = None,
) -> list[Summary]:
    """Time several steps in alternation (A-B-A-B), so that load on the machine affects all of them equally.

    Each step is called `warm_up` times first. On a GPU, every sample ends with a synchronisation. Returns one
    summary in milliseconds per step.
    """
    samples: list[list[float]] = [[] for _ in steps]
    for run in range(warm_up + runs):
        for step, collected in zip(steps, samples, strict=True):
            _synchronize(device)
            start = time.perf_counter()
            step()
            _synchronize(device)
            if run >= warm_up:
                collected.append((time.perf_counter() - start) * 1e3)
    return [summarize(collected) for collected in samples]


def _synchronize(device: torch.device | None) -> None:
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
