# SPDX-License-Identifier: Apache-2.0
"""The fast engine as one graph: no host synchronisation, no graph breaks, no compilation limit."""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ftkd_core.config import override
from ftkd_core.models.build import build_stream_petr
from ftkd_core.models.memory import Memory
from ftkd_core.presets import preset
from ftkd_core.runtime.compiling import compile_separately
from ftkd_core.runtime.fast import FastEngine
from ftkd_core.runtime.uploads import DeviceImages
from tests.core.helpers import small_config, small_model
from tests.core.rounds import CPU, make_round


class HostTraffic(TorchDispatchMode):
    """Records operations that synchronise a GPU with its host: copying a Python number into a tensor, and
    reading a tensor's value or a shape that depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(
        self, function: Any, _types: Any, arguments: Any = (), named: Any = None
    ) -> object:
        by_mask = function is torch.ops.aten.index.Tensor and any(
            index is not None and index.dtype == torch.bool for index in arguments[1]
        )
        if by_mask or function in HOST_OPERATIONS:
            self.found.append(str(function))
        return function(*arguments, **(named or {}))


HOST_OPERATIONS = (
    torch.ops.aten.lift_fresh.default, torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default, torch.ops.aten.masked_select.default,
)  # fmt: skip
PUBLISHED = [
    "decoder.as_published=true", "decoder.num_depths=32", "backbone.neck_channels=32",
    "decoder.memory_interval_s=0.4",
    "model_from_ego=[[0, -1, 0, 0.5], [1, 0, 0, 0], [0, 0, 1, -1.8], [0, 0, 0, 1]]",
]  # fmt: skip


@pytest.mark.parametrize("published", [False, True], ids=["ours", "as published"])
def test_frame_does_not_synchronise_with_the_host(published: bool) -> None:
    model = small_model(*PUBLISHED, image_queries=0) if published else small_model()
    engine = FastEngine(model, CPU, 50)
    with torch.inference_mode(), HostTraffic() as traffic:
        geometry = engine.encode_rig(engine._header.device_values)
        engine.run_frame(
            engine._images.network_images, engine._header.device_values, geometry, engine._memory
        )
    assert traffic.found == []
    with HostTraffic() as traffic:
        torch.tensor([1.0]).item()
    assert len(traffic.found) == 2


@pytest.mark.timeout(1200)  # needs 20 s of processor time, more on a busy machine
@pytest.mark.parametrize("name", ["tiny", "r50_704x256_428q", "as published"])
def test_frame_compiles_to_one_graph(name: str) -> None:
    """fullgraph=True raises at the first graph break. One decoder layer suffices, because all layers are
    alike."""
    torch.manual_seed(0)
    if name == "as published":
        model = small_model(*PUBLISHED, "decoder.num_layers=1", image_queries=0)
    else:
        smaller = ["decoder.num_layers=1", "image.width=352", "image.height=128"]
        model = build_stream_petr(override(preset(name), smaller)).eval()
    engine = FastEngine(model, CPU, 300)

    def rig_and_frame(images: Tensor, header: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        return engine.run_frame(images, header, engine.encode_rig(header), memory)

    inputs = (engine._images.network_images, engine._header.device_values, engine._memory)
    with torch.inference_mode():
        compiled = torch.compile(rig_and_frame, fullgraph=True, dynamic=False, backend="eager")
        rows, memory = compiled(*inputs)
        expected, _ = rig_and_frame(*inputs)
    assert torch.allclose(rows, expected, atol=1e-5)
    assert all(a.shape == b.shape for a, b in zip(memory, engine._memory, strict=True))


def test_compiled_functions_return_plain_tuples_of_tensors() -> None:
    """torch 2.11 cannot compile a function that returns a new NamedTuple."""
    engine = FastEngine(small_model(), CPU, 50)
    header = engine._header.device_values
    with torch.inference_mode():
        geometry = engine.encode_rig_flat(header)
        frame = engine.run_frame_flat(
            engine._images.network_images, header, engine.encode_rig(header), engine._memory
        )
    for outputs in (geometry, frame):
        assert type(outputs) is tuple
        assert all(isinstance(output, Tensor) for output in outputs)


EAGER = functools.partial(compile_separately, backend="eager")
TORCH_COMPILES = getattr(torch._dynamo.config, "recompile_limit", 8)
"""Number of compilations torch allows per code object; one more is an error for a full graph."""


class Scaling:
    """Stands for an engine: its method is compiled, and the result depends on the instance."""

    def __init__(self, factor: int) -> None:
        self.factor = factor

    def scale(self, x: Tensor) -> Tensor:
        return self.factor * x


def test_many_engines_can_compile_the_same_method() -> None:
    for factor in range(TORCH_COMPILES + 2):
        compiled = EAGER(Scaling(factor).scale)
        for _ in range(2):
            assert torch.equal(compiled(torch.ones(3)), torch.full((3,), float(factor)))


def test_many_image_sizes_can_be_used_in_turn() -> None:
    """Each size is compiled once; the images equal those of uncompiled scaling."""
    config, header = small_config().image, FastEngine(small_model(), CPU, 50)._header.device_values
    calls: list[int] = []

    def compile_and_count(function: Any) -> Any:
        calls.append(1)
        return EAGER(function)

    compiled, plain = (DeviceImages(config, 6, CPU, way) for way in (compile_and_count, lambda f: f))
    count = TORCH_COMPILES + 2
    for index in (*range(count), 0):
        camera_round = make_round(index, size=(192 + 16 * index, 108 + 9 * index))
        for images in (compiled, plain):
            images.upload(camera_round.views, header)
        assert torch.equal(compiled.network_images, plain.network_images)
    assert len(calls) == count
