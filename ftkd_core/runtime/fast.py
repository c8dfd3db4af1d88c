# SPDX-License-Identifier: Apache-2.0
"""Fast engine: the same network as the plain one with little overhead per frame.

Host and device communicate twice per frame: images and one header of numbers go in, one table of detections
comes out; the host does not wait in between. On a GPU the three steps (images, rig, frame) are compiled and
captured over static buffers; on a CPU they are called. float32 is computed without TF32. The gains of each
part are listed in docs/explanation/runtime.md. Symbols: N cameras, H/W network image, h/w camera image, K
detections.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from ftkd_core.models.memory import Memory
from ftkd_core.models.position import EncodedRays, TokenGeometry
from ftkd_core.models.predictions import decode
from ftkd_core.models.stream_petr import StreamPETR
from ftkd_core.runtime.compiling import compile_separately
from ftkd_core.runtime.devices import device_context, with_device_index
from ftkd_core.runtime.engines import (
    Arrays,
    Rows,
    arrays_to_memory,
    mask_tokens,
    memory_to_arrays,
    pack_detections,
)
from ftkd_core.runtime.header import Header, RigKey, pack_header, rig_key, unpack_header
from ftkd_core.runtime.inference_model import inference_model
from ftkd_core.runtime.preprocess import IMAGE_MEAN, IMAGE_STD, round_rig, visible_tokens
from ftkd_core.runtime.replay import Replay
from ftkd_core.runtime.uploads import CpuImages, DeviceImages
from ftkd_core.types import CameraRound, Frame


class FastEngine:
    """See `engines.Engine`. `rigs_encoded` counts how often a new rig was encoded.

    dtype: of the network's matrices (default float16 on a GPU, float32 on a CPU). compiled: default on a GPU
    only. device_images: scale and crop on the device (default on a GPU only), else with OpenCV on the host.
    compile_mode: mode of `torch.compile`, without its own CUDA graphs.
    """

    def __init__(
        self,
        model: StreamPETR,
        device: torch.device,
        max_detections: int,
        *,
        dtype: torch.dtype | None = None,
        compiled: bool | None = None,
        device_images: bool | None = None,
        compile_mode: str | None = None,
    ) -> None:
        device, on_gpu = with_device_index(device), device.type == "cuda"
        if on_gpu:
            torch.backends.cudnn.benchmark = True  # shapes are constant, so kernels are selected once
        self.device = device
        self.dtype = dtype or (torch.float16 if on_gpu else torch.float32)
        self.max_detections = max_detections
        self.rigs_encoded = 0
        self.model = inference_model(model, device, self.dtype)
        config = model.config
        self._compile: Callable[[Any], Any] = lambda function: function
        if on_gpu if compiled is None else compiled:
            self._compile = functools.partial(compile_separately, mode=compile_mode)
        on_device = on_gpu if device_images is None else device_images
        images = DeviceImages if on_device else CpuImages
        self.maps_images = on_device
        self._rig_key: RigKey | None = None
        with device_context(device):
            self._images: DeviceImages | CpuImages = images(
                config.image, len(config.channels), device, self._compile
            )
            # One value for each of the 3 W values of a row, so that whole rows are normalised at once.
            self._mean = torch.tensor(IMAGE_MEAN, device=device).repeat(config.image.width)
            self._std = torch.tensor(IMAGE_STD, device=device).repeat(config.image.width)
            self._header = Header(len(config.channels), device)
            self._allocate()

    @torch.inference_mode()
    def _allocate(self) -> None:
        """Allocate the static buffers (geometry of the rig, memory, detections) and create the steps that use
        them."""
        encode, frame = self._compile(self.encode_rig_flat), self._compile(self.run_frame_flat)
        geometry = self.encode_rig(self._header.device_values)
        self._geometry = _empty_like(geometry)
        self._memory = self.model.start_memory()
        classes = len(self.model.config.class_names)
        decoder = self.model.config.decoder
        queries = decoder.num_queries + decoder.num_image_queries + decoder.num_propagated
        count = min(self.max_detections, queries * classes)
        self._rows = torch.zeros(count, 11, device=self.device)
        on_gpu = self.device.type == "cuda"
        self._host_rows = torch.zeros(count, 11, pin_memory=on_gpu)
        self._done = torch.cuda.Event() if on_gpu else None  # type: ignore[no-untyped-call]

        def rig_step() -> None:
            _copy(self._geometry, encode(self._header.device_values))

        def frame_step() -> None:
            rows, *memory = frame(
                self._images.network_images, self._header.device_values, self._geometry, self._memory
            )
            self._rows.copy_(rows)
            _copy(self._memory, memory)  # last, because earlier operations read the old memory

        self._rig_step = Replay(rig_step, self.device)
        self._frame_step = Replay(frame_step, self.device, state=self._memory)

    @torch.inference_mode()
    def start(self, camera_round: CameraRound, *, time_s: float, is_first: bool) -> Callable[[], Rows]:
        """See `Engine`. Returns before a GPU has finished; only one round may be in progress."""
        config = self.model.config
        rig = round_rig(camera_round, config.image, config.channels)  # raises UserError for unusable input
        with device_context(self.device):
            self._wait()  # the previous round may still read the buffers below
            self._header.upload(pack_header(rig, camera_round.global_from_ego, time_s, is_first))
            self._images.upload(camera_round.views, self._header.device_values)
            visible = visible_tokens(camera_round, config.image)
            key = rig_key(rig) + (b"" if visible is None else visible.tobytes())
            if key != self._rig_key:
                self._rig_step()
                if visible is not None:
                    self._geometry.mask.copy_(mask_tokens(self._geometry, visible).mask)
                self._rig_key = key
                self.rigs_encoded += 1
            self._frame_step()
            self._host_rows.copy_(self._rows, non_blocking=True)
            if self._done is not None:
                self._done.record()
        return self._finish

    def memory(self) -> Arrays:
        """See `Engine`."""
        self._wait()
        return memory_to_arrays(self._memory)

    @torch.inference_mode()
    def set_memory(self, memory: Mapping[str, NDArray[Any]]) -> None:
        """See `Engine`."""
        self._wait()
        _copy(self._memory, arrays_to_memory(self._memory, memory))

    def _wait(self) -> None:
        if self._done is not None:
            with device_context(self.device):
                self._done.synchronize()

    def _finish(self) -> Rows:
        self._wait()
        return self._host_rows.double().numpy()

    def encode_rig(self, header: Tensor) -> TokenGeometry:
        """Compute all features that depend only on the rig; they are reused until the rig changes."""
        _, rig, _, _ = unpack_header(header, len(self.model.config.channels))
        geometry = self.model.geometry(rig)
        encoded = self.model.position.encode(geometry)
        return geometry._replace(encoded=EncodedRays(*(value.to(self.dtype) for value in encoded)))

    def encode_rig_flat(self, header: Tensor) -> tuple[Tensor, ...]:
        """Return the tensors of `encode_rig` as a plain tuple, because torch 2.11 cannot compile a function
        that returns a new NamedTuple."""
        return tuple(_tensors(self.encode_rig(header)))

    def run_frame_flat(
        self, images: Tensor, header: Tensor, geometry: TokenGeometry, memory: Memory
    ) -> tuple[Tensor, ...]:
        """Return the detections of `run_frame` and the tensors of its memory as one plain tuple."""
        rows, after = self.run_frame(images, header, geometry, memory)
        return rows, *after

    def run_frame(
        self, images: Tensor, header: Tensor, geometry: TokenGeometry, memory: Memory
    ) -> tuple[Tensor, Memory]:
        """Return detections (K, 11) of network images (N, H, W, 3) uint8, and the next memory."""
        pose, rig, time, is_first = unpack_header(header, images.shape[0])
        # Channels stay last in memory: (N, H, W, 3) here is the NHWC layout of (N, 3, H, W).
        normal = ((images.flatten(2).float() - self._mean) / self._std).view(images.shape)
        normal = normal.movedim(-1, -3)[None]
        frame = Frame(normal, rig, pose, time, is_first)
        half = self.dtype != torch.float32
        with torch.autocast(self.device.type, dtype=self.dtype if half else None, enabled=half):
            predictions, after = self.model(frame, memory, geometry=geometry)
        return pack_detections(decode(predictions, self.max_detections)), after


def _tensors(values: Any) -> list[Tensor]:
    """List the tensors of nested tuples in order."""
    if isinstance(values, Tensor):
        return [values]
    return [tensor for value in values for tensor in _tensors(value)]


def _empty_like(geometry: TokenGeometry) -> TokenGeometry:
    """Allocate separate buffers for a geometry, some of whose parts may be views of others."""
    assert geometry.encoded is not None
    *own, encoded = (_buffers(value) for value in geometry)
    return TokenGeometry(*own, EncodedRays(*encoded))  # type: ignore[call-arg]


def _buffers(value: Any) -> Any:
    if isinstance(value, Tensor):
        return torch.empty_like(value, memory_format=torch.contiguous_format)
    return [_buffers(part) for part in value]


def _copy(buffers: Any, values: Any) -> None:
    for buffer, value in zip(_tensors(buffers), _tensors(values), strict=True):
        buffer.copy_(value)
