# SPDX-License-Identifier: Apache-2.0
"""The fast engine on an NVIDIA GPU: compiled, captured, half precision. Run with `-m gpu`."""

import gc
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from ftkd_core.config import ImageConfig
from ftkd_core.data.synthetic.rig import nuscenes_rig
from ftkd_core.evaluation.detector_benchmark import compare_detectors, driving_rounds
from ftkd_core.runtime.detector import Detector
from ftkd_core.runtime.engines import PlainEngine
from ftkd_core.runtime.fast import FastEngine
from ftkd_core.runtime.preprocess import resize_and_crop
from ftkd_core.runtime.resample import batch_taps, image_taps, resample
from tests.core.helpers import small_model
from tests.core.rounds import make_round, turn_camera

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]
GPU = torch.device("cuda")


@pytest.fixture(autouse=True)
def _free_memory() -> Iterator[None]:
    """Release the memory of a test's engines before the next test."""
    yield
    gc.collect()


def gpu_detector(runtime: str = "fast", device: torch.device = GPU, **arguments: object) -> Detector:
    detector = Detector(
        small_model(),
        weights_name="small",
        device=device,
        score_threshold=0.0,
        max_detections=50,
        runtime="plain",
    )
    if runtime == "fast":
        detector.engine = FastEngine(small_model(), device, 50, **arguments)  # type: ignore[arg-type]
    return detector


@pytest.mark.parametrize(
    "arguments",
    [
        {"dtype": torch.float32, "compiled": False, "device_images": False},
        {"dtype": torch.float32, "compiled": False},
        {"dtype": torch.float32},
        {"dtype": torch.float16},
    ],
    ids=["captured", "images on the device", "compiled", "half"],
)
def test_each_optimisation_equals_the_plain_twin_over_a_stream(arguments: dict[str, object]) -> None:
    rounds = [make_round(index) for index in range(8)]
    half = arguments["dtype"] == torch.float16
    agreement = compare_detectors(gpu_detector("plain"), gpu_detector(**arguments), rounds, top=20)
    assert agreement.unmatched <= (8 if half else 0)
    assert agreement.center_p99_m < (0.5 if half else 0.05)
    assert agreement.score < (0.05 if half else 0.01)


def test_shipped_detector_keeps_its_accuracy_in_half_precision() -> None:
    """Uses a rendered drive: in noise images many peaks have equal scores, and rounding would select among
    them."""
    plain, fast = (
        Detector.from_weights(device="cuda", runtime=runtime, score_threshold=0.0)
        for runtime in ("plain", "fast")
    )
    agreement = compare_detectors(plain, fast, driving_rounds(6, nuscenes_rig()))
    assert agreement.unmatched <= agreement.compared // 100
    assert agreement.center_p99_m < 0.1
    assert agreement.within > 0.95  # 2 cm and a score difference of 0.005; emulated on a CPU: 0.98


@pytest.mark.parametrize("runtime", ["plain", "fast"])
def test_float32_is_not_computed_in_tf32(runtime: str) -> None:
    """TF32 is disabled within a step of either engine and restored afterwards."""
    assert torch.backends.cudnn.allow_tf32, "torch's default"
    detector = gpu_detector(runtime, dtype=torch.float32, compiled=False)
    allowed = []
    engine = detector.engine
    assert isinstance(engine, (PlainEngine, FastEngine))
    engine.model.backbone.register_forward_pre_hook(
        lambda *_: allowed.append(torch.backends.cudnn.allow_tf32)
    )
    detector.step(make_round(0))
    assert allowed and not any(allowed)
    assert torch.backends.cudnn.allow_tf32


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("runtime", ["plain", "fast"])
def test_second_gpu_computes_the_same_as_the_first(runtime: str) -> None:
    """Holds after a capture on the first GPU and with the first GPU as the current one."""
    first, second = (gpu_detector(runtime, torch.device("cuda", index)) for index in range(2))
    for index in range(3):
        a, b = first.step(make_round(index)), second.step(make_round(index))
        assert np.allclose(a.scores, b.scores, atol=1e-3)
    assert torch.cuda.current_device() == 0


def test_step_does_not_synchronise_the_host() -> None:
    """No operation synchronises before the objects are fetched, in frames with an old rig, a new rig and a
    mask."""
    detector = gpu_detector()
    for index in range(3):
        detector.step(make_round(index))
    rounds = [make_round(3), turn_camera(make_round(4)), make_round(5, missing=1)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        detections = []
        for camera_round in rounds:
            wait = detector.start(camera_round)
            detections.append(wait())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(np.isfinite(objects.boxes).all() for objects in detections)


@pytest.mark.parametrize("change", ["rig", "mask", "size"])
def test_change_between_rounds_takes_effect_immediately(change: str) -> None:
    changed = {
        "rig": turn_camera(make_round(1)),
        "mask": make_round(1, missing=4),
        "size": make_round(1, size=(96, 80)),
    }[change]
    used, fresh = gpu_detector(), gpu_detector()
    used.step(make_round(0))
    used.reset()
    for camera_round in (changed, make_round(2)):
        a, b = used.step(camera_round), fresh.step(camera_round)
        assert np.allclose(a.scores, b.scores, atol=1e-3)


def test_new_image_size_does_not_change_the_memory() -> None:
    """A second capture must not advance the memory."""
    same, other = gpu_detector(), gpu_detector()
    for detector, size in ((same, (192, 108)), (other, (384, 216))):
        detector.step(make_round(0))
        detector.step(make_round(1, size=size))
    assert same.engine._memory.time.equal(other.engine._memory.time)  # type: ignore[attr-defined]


def test_long_stream_allocates_no_further_memory() -> None:
    detector = gpu_detector()
    for index in range(20):
        detector.step(make_round(index))
    before = torch.cuda.memory_allocated(GPU)
    for index in range(20, 200):
        detector.step(make_round(index))
    assert torch.cuda.memory_allocated(GPU) == before


def test_images_scaled_on_the_gpu_equal_those_of_opencv() -> None:
    config = ImageConfig(width=704, height=256)
    image = np.random.default_rng(0).integers(0, 256, (900, 1600, 3), dtype=np.uint8)
    taps = image_taps(config, 1600, 900)
    raw = torch.from_numpy(image[taps.first_row :])[None].to(GPU)
    compiled = torch.compile(resample, fullgraph=True, dynamic=False)
    ours = compiled(raw, batch_taps([taps], GPU), torch.tensor([True], device=GPU))[0].cpu().numpy()
    assert np.abs(ours.astype(int) - resize_and_crop(image, config).astype(int)).max() <= 1
