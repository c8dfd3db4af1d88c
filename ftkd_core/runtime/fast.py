# SPDX-License-Identifier: Apache-2.0
"""The fast engine: the same network as the plain one, arranged so that a frame costs little but arithmetic.

Host and device meet twice a frame: images and one header of numbers go in, one table of detections comes out;
between the two the host waits for nothing. On a GPU the three steps (images, rig, frame) are compiled and
captured over static buffers; on a CPU they are called. What is float32 there is computed without TF32. Which
part pays on what is told in docs/runtime.md.
Symbols: N cameras, H/W network image, h/w camera image, K detections.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ftkd_core.models.memory import Memory
from ftkd_core.models.position import EncodedRays, TokenGeometry
from ftkd_core.models.predictions import decode
from ftkd_core.models.stream_petr import StreamPETR
from ftkd_core.runtime.compiling import compile_alone
from ftkd_core.runtime.devices import numbered, working_on
from ftkd_core.runtime.engines import Rows, pack
from ftkd_core.runtime.header import Header, RigKey, pack_header, rig_key, unpack_header
from ftkd_core.runtime.inference_model import inference_model
from ftkd_core.runtime.preprocess import round_rig
from ftkd_core.runtime.replay import Replay
from ftkd_core.runtime.uploads import CpuImages, DeviceImages
from ftkd_core.types import CameraRound, Frame


class FastEngine:
    """See `engines.Engine`. `rigs_encoded` counts how often a new rig had to be encoded.

    dtype: of the network's matrices (default float16 on a GPU, float32 on a CPU); compiled: default on a GPU
    only; device_images: scale and crop on the device (default on a GPU only), else by OpenCV on the host.
    compile_mode: as `torch.compile`'s; without its own CUDA graphs.
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
        device, on_gpu = numbered(device), device.type == "cuda"
        if on_gpu:
            torch.backends.cudnn.benchmark = True  # shapes never change: choosing once pays
        self.device = device
        self.dtype = dtype or (torch.float16 if on_gpu else torch.float32)
        self.max_detections = max_detections
        self.rigs_encoded = 0
        self.model = inference_model(model, device, self.dtype)
        config = model.config
        self._compile: Callable[[Any], Any] = lambda function: function
        if on_gpu if compiled is None else compiled:
            self._compile = functools.partial(compile_alone, mode=compile_mode)
        on_device = on_gpu if device_images is None else device_images
        images = DeviceImages if on_device else CpuImages
        self._rig_key: RigKey | None = None
        with working_on(device):
            self._images: DeviceImages | CpuImages = images(
                config.image, len(config.channels), device, self._compile
            )
            # One number for each of a row's 3 W values, so that whole rows are normalised at once.
            self._mean = torch.tensor(config.image.mean, device=device).repeat(config.image.width)
            self._std = torch.tensor(config.image.std, device=device).repeat(config.image.width)
            self._header = Header(len(config.channels), device)
            self._allocate()

    @torch.inference_mode()
    def _allocate(self) -> None:
        """Static buffers: geometry of the rig, memory, detections; and the steps over them."""
        encode, frame = self._compile(self.encode_rig), self._compile(self.run_frame)
        geometry = self.encode_rig(self._header.device_values)
        self._geometry = _like(geometry)
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
            rows, memory = frame(
                self._images.network_images, self._header.device_values, self._geometry, self._memory
            )
            self._rows.copy_(rows)
            _copy(self._memory, memory)  # last: nothing reads the old memory any more

        self._rig_step = Replay(rig_step, self.device)
        self._frame_step = Replay(frame_step, self.device, state=self._memory)

    @torch.inference_mode()
    def start(self, camera_round: CameraRound, *, time_s: float, is_first: bool) -> Callable[[], Rows]:
        """See `Engine`. Returns before a GPU has worked; one round at a time is under way."""
        config = self.model.config
        rig = round_rig(camera_round, config.image, config.channels)  # refuses what cannot be used
        with working_on(self.device):
            self._wait()  # the buffers below may still be read by the round before
            self._header.upload(pack_header(rig, camera_round.global_from_ego, time_s, is_first))
            self._images.upload(camera_round.views, self._header.device_values)
            key = rig_key(rig)
            if key != self._rig_key:
                self._rig_step()
                self._rig_key = key
                self.rigs_encoded += 1
            self._frame_step()
            self._host_rows.copy_(self._rows, non_blocking=True)
            if self._done is not None:
                self._done.record()
        return self._finish

    def _wait(self) -> None:
        if self._done is not None:
            with working_on(self.device):
                self._done.synchronize()

    def _finish(self) -> Rows:
        self._wait()
        return self._host_rows.double().numpy()

    def encode_rig(self, header: Tensor) -> TokenGeometry:
        """What the network makes of the rig alone; nothing of it is computed again while the rig stays."""
        _, rig, _, _ = unpack_header(header, len(self.model.config.channels))
        geometry = self.model.geometry(rig)
        encoded = self.model.position.encode(geometry)
        return geometry._replace(encoded=EncodedRays(*(value.to(self.dtype) for value in encoded)))

    def run_frame(
        self, images: Tensor, header: Tensor, geometry: TokenGeometry, memory: Memory
    ) -> tuple[Tensor, Memory]:
        """Detections (K, 11) of network images (N, H, W, 3) uint8, and the memory after them."""
        pose, rig, time, is_first = unpack_header(header, images.shape[0])
        # Channels stay last in memory: what is (N, H, W, 3) here is the NHWC layout of (N, 3, H, W).
        normal = ((images.flatten(2).float() - self._mean) / self._std).view(images.shape)
        normal = normal.movedim(-1, -3)[None]
        frame = Frame(normal, rig, pose, time, is_first)
        half = self.dtype != torch.float32
        with torch.autocast(self.device.type, dtype=self.dtype if half else None, enabled=half):
            predictions, after = self.model(frame, memory, geometry=geometry)
        return pack(decode(predictions, self.max_detections)), after


def _tensors(values: Any) -> list[Tensor]:
    """The tensors of nested tuples, in order."""
    if isinstance(values, Tensor):
        return [values]
    return [tensor for value in values for tensor in _tensors(value)]


def _like(geometry: TokenGeometry) -> TokenGeometry:
    """Buffers of their own for a geometry (some of its parts may be views of others)."""
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
