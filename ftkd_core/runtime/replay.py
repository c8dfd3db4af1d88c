# SPDX-License-Identifier: Apache-2.0
"""A function over static buffers, captured once as a CUDA graph and replayed; on a CPU simply called.

A replay costs the host one launch where the network has a thousand. What a graph reads and writes must stay
where it is: inputs are copied in, results copied out, and state that feeds back into the next replay (the
memory) is copied into its own buffers by the last operations inside the graph.
"""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_WARM_UPS = 3  # before a capture: compiling, choosing kernels and allocating must be over


class Replay:
    """`replay()` runs `function`, which takes and returns nothing: it reads and writes static buffers.

    state: buffers that the function changes and that the warm-up calls before a capture must leave as they
    were. Errors: what the function raises; RuntimeError of CUDA where it cannot be captured (it synchronises,
    or copies from pageable memory).
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
        # Other threads of a node may use the GPU meanwhile: only this thread's stream is being captured. By
        # itself torch would capture on a stream of the GPU on which the process captured first.
        with torch.cuda.graph(graph, stream=_capture_stream(self._device), capture_error_mode="thread_local"):
            self._function()
        return graph


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of a GPU that graphs are captured on: one, since libraries keep a workspace for each."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
