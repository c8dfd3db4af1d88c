# SPDX-License-Identifier: Apache-2.0
"""Function over static buffers, captured once as a CUDA graph and replayed; called directly on a CPU.

A replay needs one launch from the host instead of about a thousand. Buffers that a graph reads and writes
must stay at their addresses: inputs are copied in and results copied out. State that feeds the next replay
(the memory) is copied into its own buffers by the last operations of the graph.
"""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_WARM_UPS = 3  # before a capture, to finish compilation, kernel selection and allocation


class Replay:
    """`replay()` runs `function`, which has no arguments and no result: it reads and writes static buffers.

    state: buffers that the function changes; the warm-up calls before a capture restore them. Raises the
    function's errors, and RuntimeError if CUDA cannot capture it (it synchronises, or copies from pageable
    memory).
    """

    def __init__(
        self, function: Callable[[], None], device: torch.device, state: Sequence[Tensor] = ()
    ) -> None:
        self._function = function
        self._device = device
        self._state = state
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        if self._device.type != "cuda":
            self._function()
            return
        if self._graph is None:
            self._graph = self._capture()
        self._graph.replay()

    def _capture(self) -> torch.cuda.CUDAGraph:
        before = [buffer.clone() for buffer in self._state]
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                self._function()
            for buffer, value in zip(self._state, before, strict=True):
                buffer.copy_(value)
        torch.cuda.current_stream(self._device).wait_stream(stream)
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        # Only this thread's stream is captured, so other threads may use the GPU meanwhile. Without `stream`,
        # torch captures on a stream of the GPU on which the process captured first.
        with torch.cuda.graph(graph, stream=_capture_stream(self._device), capture_error_mode="thread_local"):
            self._function()
        return graph


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream of a GPU for graph captures; it is shared, because libraries keep a workspace per
    stream."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
