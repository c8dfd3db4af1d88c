# SPDX-License-Identifier: Apache-2.0
"""What a GPU's work needs and what torch keeps for a whole thread or process: the current device, and how
float32 is computed."""

import contextlib
import os
import platform
from collections.abc import Iterator
from pathlib import Path

import torch


def with_device_index(device: torch.device) -> torch.device:
    """`cuda` as the GPU that is the current one now: each thread has its own, which may differ later."""
    if device == torch.device("cuda"):  # which no with_device_index one equals
        return torch.device("cuda", torch.cuda.current_device())
    return device


def device_name(device: torch.device) -> str:
    """For people, beside a figure: which GPU, or how much of which CPU this process uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu, {torch.get_num_threads()} of {os.cpu_count()} cores, {processor_name()}"


def processor_name() -> str:
    """The CPU's model, as Linux knows it: figures of two that are sold as "2 cores" may differ twofold."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(filter(None, named), platform.processor() or platform.machine())


@contextlib.contextmanager
def device_context(device: torch.device) -> Iterator[None]:
    """The device is the current one, to which new streams and events belong, and float32 is computed as such,
    not in TF32; what was set before is set again at the end. On a CPU there is nothing to do."""
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device), without_tf32():
        yield


@contextlib.contextmanager
def without_tf32() -> Iterator[None]:
    """Float32 convolutions and matrix products read all 23 bits of a mantissa. In TF32, torch's default for
    convolutions, they read 10, as many as float16 has."""
    convolutions, products = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    torch.backends.cudnn.allow_tf32 = False
    if products != "highest":
        torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = convolutions
        if products != "highest":
            torch.set_float32_matmul_precision(products)


def tf32_allowed(device: torch.device) -> bool:
    """Whether something would be computed in TF32 on a device now; a CPU has none."""
    allowed = torch.backends.cudnn.allow_tf32 or torch.get_float32_matmul_precision() != "highest"
    return device.type == "cuda" and allowed
