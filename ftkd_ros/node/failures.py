# SPDX-License-Identifier: Apache-2.0
"""Errors after which a detector cannot go on: full memory, and a GPU that reports an error."""

from typing import Final

_REMEDY: Final = "then deactivate, clean up, configure and activate the node"
_MEMORY_TEXTS: Final = ("out of memory", "failed to allocate memory", "bad_alloc")
_GPU_TEXTS: Final = ("cuda error", "cudnn_status", "cublas_status")


def fatal_reason(error: Exception) -> str | None:
    """Return one sentence with the reason and the remedy, or None for an error of a single round.

    Errors of torch and ONNX Runtime are recognised by name and text, so that neither has to be imported.
    After a CUDA error every later call of the process fails too, so it has to be started again.
    """
    names = {kind.__name__ for kind in type(error).__mro__}
    text = str(error)
    first = (text.splitlines() or [""])[0][:200] or type(error).__name__
    lower = text.lower()
    if {"OutOfMemoryError", "MemoryError"} & names or any(part in lower for part in _MEMORY_TEXTS):
        return f"the detector is stopped, out of memory: {first}; free memory on its device, {_REMEDY}"
    if "AcceleratorError" in names or any(part in lower for part in _GPU_TEXTS):
        return f"the detector is stopped, the GPU reports an error: {first}; start the node again"
    return None
