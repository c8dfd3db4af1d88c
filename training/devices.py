# SPDX-License-Identifier: Apache-2.0
"""Processes, devices and precision of a training run."""

import os
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Final

import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies.ddp import DDPStrategy

from ftkd_core.errors import UserError

_BFLOAT16_FLAGS: Final = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
BARRIER_TIMEOUT: Final = timedelta(hours=12)
"""How long processes wait for each other. The first process indexes data sets and fills caches alone, which
may take hours; torch's defaults of 10 or 30 minutes would end the others. A process that dies is detected by
its launcher, not by this timeout."""


def count_processes(devices: str) -> int:
    """Return the number of processes that share a step: torchrun's, or else `devices`."""
    started = os.environ.get("WORLD_SIZE")
    if started is None and not devices.isdigit():
        raise UserError(f"devices {devices!r} with a recipe: expected a number")
    return int(started or devices)


def make_fabric(accelerator: str = "auto", devices: str = "1") -> Fabric:
    """Return Fabric for the chosen devices; under torchrun it joins the started processes."""
    local_processes = os.environ.get("LOCAL_WORLD_SIZE")
    nodes = int(os.environ.get("WORLD_SIZE", "1")) // max(int(local_processes or "1"), 1)
    make = partial(
        Fabric, accelerator=accelerator, devices=local_processes or devices, num_nodes=max(nodes, 1)
    )
    fabric = make()
    distributed = isinstance(fabric.strategy, DDPStrategy)  # only Fabric can resolve devices=auto
    return make(strategy=DDPStrategy(timeout=BARRIER_TIMEOUT)) if distributed else fabric


def cpu_has_bfloat16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Return whether the processor multiplies matrices in bfloat16 (AVX-512 BF16, AMX or Arm BF16), by the
    flags that Linux reports; False if there are none."""
    try:
        text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    lines = [line for line in text.splitlines() if line.lower().startswith(("flags", "features"))]
    return any(not _BFLOAT16_FLAGS.isdisjoint(line.split()) for line in lines)


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """Return the autocast dtype of a --precision; None means float32 throughout."""
    if precision == "auto":
        precision = "bf16-mixed" if device.type == "cuda" else "32-true"
    if precision not in ("32-true", "bf16-mixed"):
        raise UserError(f"precision {precision!r}; expected auto, 32-true or bf16-mixed")
    return torch.bfloat16 if precision == "bf16-mixed" else None
