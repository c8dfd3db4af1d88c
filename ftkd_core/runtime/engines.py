# SPDX-License-Identifier: Apache-2.0
"""Engine interface of a detector, and the plain engine: float32 (on a GPU without TF32), eager, NCHW, with
everything but the memory recomputed in each frame.

The plain engine is the baseline of published figures and the reference for the fast engine (`fast.py`).
"""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ftkd_core.models.feature_ring import FeatureRing
from ftkd_core.models.memory import Memory
from ftkd_core.models.position import TokenGeometry
from ftkd_core.models.predictions import decode
from ftkd_core.models.sparse_bev import SparseBEV
from ftkd_core.models.stream_petr import StreamPETR
from ftkd_core.runtime.devices import device_context, with_device_index
from ftkd_core.runtime.preprocess import round_to_frame, visible_tokens
from ftkd_core.types import CameraRound, Detections

Rows = NDArray[np.float64]
"""Detections (K, 11), best first: box (9) in ego, score, label."""
Arrays = dict[str, NDArray[Any]]


class Engine(Protocol):
    """Runs rounds through a network and keeps the memory, on one device and from one thread. maps_images:
    whether it resamples the images of virtual cameras itself, on its device."""

    @property
    def maps_images(self) -> bool: ...

    def start(self, camera_round: CameraRound, *, time_s: float, is_first: bool) -> Callable[[], Rows]:
        """Start a round and return a function that waits for its detections. time_s is relative to the
        stream.

        UserError for images or calibration that cannot be used; the memory is unchanged then.
        """
        ...

    def memory(self) -> Arrays:
        """Return a copy of the memory, for `set_memory` of an engine of the same kind and weights."""
        ...

    def set_memory(self, memory: Mapping[str, NDArray[Any]]) -> None:
        """Replace the memory."""
        ...


def pack_detections(detections: Detections) -> Tensor:
    """Pack detections of a batch of 1 into one float32 tensor (K, 11), so that one copy transfers them."""
    return torch.cat(
        [detections.boxes[0], detections.scores[0, :, None], detections.labels[0, :, None].float()], dim=-1
    )


def mask_tokens(geometry: TokenGeometry, visible: NDArray[np.bool_]) -> TokenGeometry:
    """Return a geometry of batch 1 without the tokens (L,) that no camera sees."""
    mask = geometry.mask & torch.from_numpy(visible).to(geometry.mask.device)
    return geometry._replace(mask=mask)


def memory_to_arrays(memory: Memory) -> Arrays:
    """Return a copy of a memory as arrays by field."""
    half = (torch.bfloat16, torch.float16)
    return {
        name: (value.float() if value.dtype in half else value).detach().cpu().numpy().copy()
        for name, value in memory._asdict().items()
    }


def arrays_to_memory(like: Memory, arrays: Mapping[str, NDArray[Any]]) -> Memory:
    """Return the memory of `memory_to_arrays`, with dtypes and device of another memory."""
    return Memory(
        **{
            name: torch.from_numpy(np.array(arrays[name])).to(device=value.device, dtype=value.dtype)
            for name, value in like._asdict().items()
        }
    )


class PlainEngine:
    """The model as it was trained, step by step."""

    maps_images = False

    def __init__(self, model: StreamPETR, device: torch.device, max_detections: int) -> None:
        self.device = with_device_index(device)
        self.model = model.to(self.device).eval().requires_grad_(False)
        self.max_detections = max_detections
        self._memory = self.model.start_memory()

    @torch.inference_mode()
    def start(self, camera_round: CameraRound, *, time_s: float, is_first: bool) -> Callable[[], Rows]:
        """See `Engine`; the work is finished when this returns."""
        config, device = self.model.config, self.device
        with device_context(device), self._attention():
            frame = round_to_frame(
                camera_round, config.image, config.channels, time_s=time_s, is_first=is_first, device=device
            )
            frame = frame._replace(images=frame.images.contiguous())  # NCHW
            visible = visible_tokens(camera_round, config.image)
            geometry = None if visible is None else mask_tokens(self.model.geometry(frame.rig), visible)
            predictions, self._memory = self.model(frame, self._memory, geometry=geometry)
            rows: Rows = pack_detections(decode(predictions, self.max_detections)).double().cpu().numpy()
        return lambda: rows

    def memory(self) -> Arrays:
        """See `Engine`."""
        return memory_to_arrays(self._memory)

    @torch.inference_mode()
    def set_memory(self, memory: Mapping[str, NDArray[Any]]) -> None:
        """See `Engine`."""
        self._memory = arrays_to_memory(self._memory, memory)

    def _attention(self) -> contextlib.AbstractContextManager[Any]:
        """Select attention as plain matrix products on a GPU; on a CPU keep torch's choice."""
        if self.device.type == "cuda":
            return sdpa_kernel(SDPBackend.MATH)
        return contextlib.nullcontext()


class WindowEngine:
    """A SparseBEV as it was trained, with the features of past frames in a ring.

    Its decoder samples features around boxes, so there are no tokens to mask: where a virtual camera sees
    nothing, it reads the features of black pixels.
    """

    maps_images = False

    def __init__(self, model: SparseBEV, device: torch.device, max_detections: int) -> None:
        self.device = with_device_index(device)
        self.model = model.to(self.device).eval().requires_grad_(False)
        self.max_detections = max_detections
        self._ring: FeatureRing | None = None

    @torch.inference_mode()
    def start(self, camera_round: CameraRound, *, time_s: float, is_first: bool) -> Callable[[], Rows]:
        """See `Engine`; the work is finished when this returns."""
        config, device = self.model.config, self.device
        with device_context(device):
            frame = round_to_frame(
                camera_round, config.image, config.channels, time_s=time_s, is_first=is_first, device=device
            )
            predictions, self._ring = self.model.step(frame, None if is_first else self._ring)
            rows: Rows = pack_detections(decode(predictions, self.max_detections)).double().cpu().numpy()
        return lambda: rows

    def memory(self) -> Arrays:
        """See `Engine`; {} before the first round."""
        if self._ring is None:
            return {}
        levels = {f"pyramid{level}": values for level, values in enumerate(self._ring.pyramid)}
        rest = dict(zip(FeatureRing._fields[1:], self._ring[1:], strict=True))
        return {name: value.cpu().numpy().copy() for name, value in {**levels, **rest}.items()}

    def set_memory(self, memory: Mapping[str, NDArray[Any]]) -> None:
        """See `Engine`."""
        values = {name: torch.from_numpy(np.array(value)).to(self.device) for name, value in memory.items()}
        levels = sorted(name for name in values if name.startswith("pyramid"))
        rest = [values[name] for name in FeatureRing._fields[1:] if values]
        self._ring = FeatureRing(tuple(values[name] for name in levels), *rest) if values else None
