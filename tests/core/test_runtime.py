# SPDX-License-Identifier: Apache-2.0
"""The fast engine and each of its parts against their plain twins; what changes counts at once."""

import contextlib
import copy
import dataclasses
import functools
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ftkd_core.config import ImageConfig, override
from ftkd_core.data.synthetic.rig import nuscenes_rig
from ftkd_core.errors import UserError
from ftkd_core.evaluation.detector_benchmark import compare_detectors, driving_rounds
from ftkd_core.geometry import yaw_transform
from ftkd_core.models.build import build_stream_petr
from ftkd_core.models.memory import Memory
from ftkd_core.models.resnet import ResNet
from ftkd_core.presets import preset
from ftkd_core.runtime.compiling import compile_alone
from ftkd_core.runtime.detector import Detector, resolve_device
from ftkd_core.runtime.devices import numbered, tf32_allowed, without_tf32, working_on
from ftkd_core.runtime.fast import FastEngine
from ftkd_core.runtime.header import pack_header, rig_key, unpack_header
from ftkd_core.runtime.inference_model import fold_batch_norms, inference_model
from ftkd_core.runtime.preprocess import resize_and_crop, round_rig
from ftkd_core.runtime.resample import batch_taps, image_taps, resample
from ftkd_core.runtime.uploads import DeviceImages
from ftkd_core.types import CameraRound
from tests.core.helpers import drive, small_config, small_model
from tests.core.test_detector import CPU, make_detector, make_round


def shaken_norms(model: nn.Module) -> nn.Module:
    """Batch norms as training leaves them: every number of theirs matters."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for values in (module.running_mean, module.bias):
                values.data.normal_(0, 0.1)
            for values in (module.running_var, module.weight):
                values.data.uniform_(0.5, 1.5)
    return model.eval().requires_grad_(False)


def fast_detector(**arguments: object) -> Detector:
    """A detector of the small model whose fast engine has these arguments."""
    detector = make_detector(runtime="plain")
    detector.engine = FastEngine(detector.model, CPU, 50, **arguments)  # type: ignore[arg-type]
    return detector


def assert_same_answer(first: Detector, second: Detector, camera_round: CameraRound) -> None:
    a, b = first.step(camera_round), second.step(camera_round)
    assert np.array_equal(a.scores, b.scores)
    assert np.array_equal(a.boxes, b.boxes)


# -- each part and its twin ------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [18, 50])
def test_folded_batch_norms_compute_the_same(depth: int) -> None:
    torch.manual_seed(0)
    backbone = shaken_norms(ResNet(depth, base_channels=8))
    folded = fold_batch_norms(copy.deepcopy(backbone))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    images = torch.randn(2, 3, 32, 64)
    for plain, fast in zip(backbone(images), folded(images), strict=True):
        assert torch.allclose(plain, fast, atol=1e-4 * float(plain.abs().max()))


def test_every_batch_norm_of_a_detector_is_folded_and_the_model_left_alone() -> None:
    model = small_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fast = inference_model(model, CPU)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fast.modules())
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_batch_norm_without_convolution_is_refused() -> None:
    with pytest.raises(ValueError, match="batch norm '1' of Sequential follows no convolution"):
        fold_batch_norms(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm2d(2)))


def test_channels_last_computes_the_same() -> None:
    torch.manual_seed(0)
    backbone = shaken_norms(ResNet(18, base_channels=8))
    last = copy.deepcopy(backbone).to(memory_format=torch.channels_last)
    images = torch.randn(2, 3, 32, 64)
    for plain, fast in zip(
        backbone(images), last(images.contiguous(memory_format=torch.channels_last)), strict=True
    ):
        assert fast.is_contiguous(memory_format=torch.channels_last)
        assert torch.allclose(plain, fast, atol=1e-4 * float(plain.abs().max()))


def test_kept_geometry_computes_the_same() -> None:
    model = small_model()
    frame = drive(model.config, count=1)[0]
    with torch.no_grad():
        geometry = model.geometry(frame.rig)
        kept = geometry._replace(encoded=model.position.encode(geometry))
        plain, memory = model(frame, model.start_memory())
        fast, fast_memory = model(frame, model.start_memory(), geometry=kept)
    assert torch.equal(plain.logits, fast.logits) and torch.equal(plain.codes, fast.codes)
    assert all(torch.equal(a, b) for a, b in zip(memory, fast_memory, strict=True))


@pytest.mark.parametrize(
    ("width", "height"),
    [(1600, 900), (800, 450), (704, 396), (1408, 792), (640, 360), (300, 100), (1280, 960), (1600, 500)],
)
def test_images_scaled_by_taps_are_those_of_opencv(width: int, height: int) -> None:
    config = ImageConfig(width=704, height=256)
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = cv2.GaussianBlur(image, (5, 5), 0)
    taps = image_taps(config, width, height)
    raw = torch.from_numpy(image[taps.first_row :])[None]
    ours = resample(raw, batch_taps([taps], CPU), torch.tensor([True]))[0].numpy()
    difference = np.abs(ours.astype(int) - resize_and_crop(image, config).astype(int))
    assert difference.max() <= 1
    assert difference.mean() < (0.05 if width > config.width else 0.15)  # OpenCV enlarges in fixed point


def test_rows_above_the_crop_are_not_needed() -> None:
    taps = image_taps(ImageConfig(width=704, height=256), 1600, 900)
    assert taps.first_row == 318  # 140 of 396 rows are cut, at 2.27 rows each
    assert int(taps.rows.source.max()) == 900 - 318 - 1


def test_a_header_carries_a_round_exactly() -> None:
    camera_round = make_round(3, missing=2)
    rig = round_rig(camera_round, small_config().image, [f"cam{i}" for i in range(6)])
    header = torch.from_numpy(pack_header(rig, camera_round.global_from_ego, 1e6 + 0.25, True))
    pose, unpacked, time, first = unpack_header(header, 6)
    assert np.array_equal(pose[0].numpy(), camera_round.global_from_ego)
    assert all(torch.equal(a, b) for a, b in zip(rig, unpacked, strict=True))
    assert (float(time), bool(first)) == (1e6 + 0.25, True)


# -- the whole -------------------------------------------------------------------------------------------

ENGINES = [
    {},
    {"device_images": True},
    pytest.param({"dtype": torch.float16}, id="float16"),
    pytest.param({"dtype": torch.bfloat16}, id="bfloat16"),
]
LEAST_WITHIN = {torch.float16: 0.99, torch.bfloat16: 0.8}
"""Measured: bfloat16 0.89 on a processor that multiplies it itself (AMX), where no box is off by 3 cm."""


@pytest.mark.parametrize("arguments", ENGINES)
def test_the_fast_engine_streams_as_the_plain_one(arguments: dict[str, object]) -> None:
    rounds = [make_round(index) for index in range(6)]
    plain, fast = make_detector(runtime="plain"), fast_detector(**arguments)
    agreement = compare_detectors(plain, fast, rounds, top=20)
    assert agreement.compared == 120
    if "dtype" in arguments:
        assert agreement.unmatched <= 1
        assert agreement.within >= LEAST_WITHIN[arguments["dtype"]]  # type: ignore[index]
    else:
        assert agreement.unmatched == 0
        assert agreement.center_m < 0.02 and agreement.score < 0.002


def test_the_shipped_detector_computes_as_its_plain_twin() -> None:
    """On a rendered drive: in noise many peaks are equally strong, and rounding would choose among them."""
    fast, plain = (
        Detector.from_weights(device="cpu", runtime=runtime, score_threshold=0.0)
        for runtime in ("fast", "plain")
    )
    agreement = compare_detectors(plain, fast, driving_rounds(6, nuscenes_rig()))
    assert agreement.unmatched == 0 and agreement.within == 1
    assert agreement.center_m < 0.01 and agreement.score < 0.005


def test_a_rig_is_encoded_once_and_anew_where_it_changes() -> None:
    detector = make_detector()
    engine = detector.engine
    assert isinstance(engine, FastEngine)
    for index in range(3):  # the vehicle moves, its cameras do not
        detector.step(make_round(index))
    assert engine.rigs_encoded == 1
    turned = turn_camera(make_round(3))
    for camera_round, count in ((turned, 2), (turn_camera(make_round(4)), 2), (make_round(5, missing=1), 3)):
        detector.step(camera_round)
        assert engine.rigs_encoded == count


def turn_camera(camera_round: CameraRound) -> CameraRound:
    """The round after its first camera was knocked."""
    view = camera_round.views[0]
    assert view is not None
    knocked = dataclasses.replace(view, ego_from_camera=yaw_transform(0.1) @ view.ego_from_camera)
    return dataclasses.replace(camera_round, views=(knocked, *camera_round.views[1:]))


@pytest.mark.parametrize("device_images", [False, True])
@pytest.mark.parametrize(
    "change", [turn_camera, lambda _: make_round(1, missing=4), lambda _: make_round(1, size=(96, 80))]
)
def test_what_changes_between_rounds_counts_at_once(change: object, device_images: bool) -> None:
    """An engine that has seen another rig answers as one that has not: nothing of the old rig is left."""
    used, fresh = (fast_detector(device_images=device_images) for _ in range(2))
    used.step(make_round(0))
    used.reset()
    changed = change(make_round(1))  # type: ignore[operator]
    assert_same_answer(used, fresh, changed)
    assert_same_answer(used, fresh, make_round(2))  # and back


def test_a_reset_forgets_the_stream_at_once() -> None:
    used, fresh = make_detector(), make_detector()
    for index in range(3):
        used.step(make_round(index))
    assert not np.array_equal(used.step(make_round(0)).scores, make_detector().step(make_round(0)).scores)
    used.reset()
    for index in range(2):
        assert_same_answer(used, fresh, make_round(index))


def test_an_answer_may_be_fetched_later() -> None:
    detector = make_detector()
    wait = detector.start(make_round(0))
    assert np.array_equal(wait().scores, make_detector().step(make_round(0)).scores)


def test_images_that_are_read_only_or_mirrored_are_taken() -> None:
    good = make_round(0)
    views = []
    for view in good.views:
        assert view is not None
        flipped = view.image[:, :, ::-1].copy()
        flipped.flags.writeable = False
        views.append(dataclasses.replace(view, image=flipped[:, :, ::-1]))
    strange = dataclasses.replace(good, views=tuple(views))
    plain, odd = (fast_detector(device_images=True).step(r) for r in (good, strange))
    assert np.array_equal(plain.scores, odd.scores)


def test_rounding_errors_of_ego_motion_are_no_new_rig() -> None:
    config = small_config()
    keys = {
        rig_key(round_rig(make_round(index), config.image, [f"cam{i}" for i in range(6)]))
        for index in range(5)
    }
    assert len(keys) == 1


# -- the graph -------------------------------------------------------------------------------------------


class HostTraffic(TorchDispatchMode):
    """Notes operations that make a GPU and its host wait for each other: numbers that become a tensor are
    copied there, a tensor that becomes a number, or whose values decide a shape, is waited for."""

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
def test_a_frame_needs_nothing_of_the_host(published: bool) -> None:
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


@pytest.mark.timeout(1200)  # 20 s of processor time, which a busy machine stretches
@pytest.mark.parametrize("name", ["tiny", "r50_704x256_428q", "as published"])
def test_a_frame_is_one_graph(name: str) -> None:
    """No break: fullgraph=True raises at the first. One decoder layer stands for all, which are alike."""
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


EAGER = functools.partial(compile_alone, backend="eager")
TORCH_COMPILES = getattr(torch._dynamo.config, "recompile_limit", 8)
"""Of one code object; one more is an error where a full graph is asked for."""


class Scaling:
    """As an engine: its method is compiled, and what it computes depends on itself."""

    def __init__(self, factor: int) -> None:
        self.factor = factor

    def scale(self, x: Tensor) -> Tensor:
        return self.factor * x


def test_many_engines_compile_the_same_method() -> None:
    for factor in range(TORCH_COMPILES + 2):
        compiled = EAGER(Scaling(factor).scale)
        for _ in range(2):
            assert torch.equal(compiled(torch.ones(3)), torch.full((3,), float(factor)))


def test_many_image_sizes_may_follow_each_other() -> None:
    """Each is compiled once; the images are those that are scaled without compiling."""
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


# -- devices ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("convolutions", "products"), [(True, "highest"), (False, "high"), (True, "medium")])
def test_tf32_is_off_within_and_as_before_after(convolutions: bool, products: str) -> None:
    gpu = torch.device("cuda", 0)
    before = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    try:
        torch.backends.cudnn.allow_tf32 = convolutions
        torch.set_float32_matmul_precision(products)
        assert tf32_allowed(gpu) and not tf32_allowed(CPU)
        with contextlib.suppress(ZeroDivisionError), without_tf32():
            assert not tf32_allowed(gpu)
            raise ZeroDivisionError
        with working_on(CPU):  # nothing of a GPU is touched
            assert tf32_allowed(gpu)
        assert (torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()) == (
            convolutions, products,
        )  # fmt: skip
    finally:
        torch.backends.cudnn.allow_tf32 = before[0]
        torch.set_float32_matmul_precision(before[1])


def test_a_gpu_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(UserError, match="device 'cuda:2': this machine's last CUDA GPU is cuda:1"):
        resolve_device("cuda:2")


def test_the_current_gpu_is_named_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread's current one may be another."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert numbered(torch.device("cuda")) == torch.device("cuda", 1)
    assert numbered(torch.device("cuda", 0)) == torch.device("cuda", 0)
    assert numbered(CPU) == CPU
