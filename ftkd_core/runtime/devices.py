# SPDX-License-Identifier: Apache-2.0
"""Current device, float32 precision, and names of devices and processors."""

import contextlib
import os
import platform
from collections.abc import Iterator
from pathlib import Path

import torch


def with_device_index(device: torch.device) -> torch.device:
    """Replace `cuda` by the current GPU of this thread, which may change later and differs between
    threads."""
    if device == torch.device("cuda"):  # not equal to any device with an index
        return torch.device("cuda", torch.cuda.current_device())
    return device


def device_name(device: torch.device) -> str:
    """Describe a device next to a measurement: the GPU, or the CPU with the number of cores this process
    uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu, {torch.get_num_threads()} of {os.cpu_count()} cores, {processor_name()}"


def processor_name() -> str:
    """Return the CPU model as reported by Linux; speeds of machines with equal core counts may differ by a
    factor of two."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(filter(None, named), platform.processor() or platform.machine())


@contextlib.contextmanager
def device_context(device: torch.device) -> Iterator[None]:
    """Make the device the current one, to which new streams and events belong, and disable TF32; both are
    restored at the end. On a CPU nothing changes."""
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device), without_tf32():
        yield


@contextlib.contextmanager
def without_tf32() -> Iterator[None]:
    """Compute float32 convolutions and matrix products with all 23 mantissa bits. TF32, torch's default for
    convolutions, uses 10, as many as float16."""
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
    """Whether TF32 would be used on a device now; always False on a CPU."""
    allowed = torch.backends.cudnn.allow_tf32 or torch.get_float32_matmul_precision() != "highest"
    return device.type == "cuda" and allowed
