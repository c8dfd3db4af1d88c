# SPDX-License-Identifier: Apache-2.0
"""Latency: how samples are summed up, and the protocol by which a step is timed."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class LatencySummary:
    """Milliseconds: median, 95th percentile, mean and maximum of `count` samples; None for none."""

    p50: float | None
    p95: float | None
    mean: float | None
    max: float | None
    count: int

    def as_dict(self) -> dict[str, float | int | None]:
        """For JSON, rounded to a microsecond."""
        return {
            key: round(value, 3) if isinstance(value, float) else value for key, value in asdict(self).items()
        }


def summarize_ms(samples_ms: Sequence[float]) -> LatencySummary:
    """Summary of latencies in milliseconds. Raises ValueError for a sample that is not finite."""
    samples = np.asarray(samples_ms, dtype=np.float64)
    if not np.isfinite(samples).all():
        raise ValueError(
            f"latencies {samples[~np.isfinite(samples)][:3].tolist()} ms; expected finite numbers"
        )
    if samples.size == 0:
        return LatencySummary(None, None, None, None, 0)
    p50, p95 = (float(value) for value in np.percentile(samples, [50, 95]))
    return LatencySummary(p50, p95, float(samples.mean()), float(samples.max()), int(samples.size))


def time_alternating(
    steps: Sequence[Callable[[], Any]],
    *,
    runs: int = 200,
    warm_up: int = 50,
    device: torch.device | None = None,
) -> list[LatencySummary]:
    """Times several steps interleaved (A-B-A-B), so that what slows the machine slows all of them alike.

    Each step is called `warm_up` times first. On a GPU every sample ends with a synchronisation.
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
    return [summarize_ms(collected) for collected in samples]


def _synchronize(device: torch.device | None) -> None:
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
