# SPDX-License-Identifier: Apache-2.0
"""Parts of the fast engine compared with their plain twins."""

import copy

import cv2
import numpy as np
import pytest
import torch
from torch import nn

from ftkd_core.config import ImageConfig
from ftkd_core.models.resnet import ResNet
from ftkd_core.runtime.header import pack_header, rig_key, unpack_header
from ftkd_core.runtime.inference_model import fold_batch_norms, inference_model
from ftkd_core.runtime.preprocess import resize_and_crop, round_rig
from ftkd_core.runtime.resample import batch_taps, image_taps, resample
from tests.core.helpers import drive, small_config, small_model
from tests.core.rounds import CPU, make_round


def randomised_norms(model: nn.Module) -> nn.Module:
    """Randomise batch norms as after training, so that each of their values matters."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for values in (module.running_mean, module.bias):
                values.data.normal_(0, 0.1)
            for values in (module.running_var, module.weight):
                values.data.uniform_(0.5, 1.5)
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("depth", [18, 50])
def test_folded_batch_norms_compute_the_same(depth: int) -> None:
    torch.manual_seed(0)
    backbone = randomised_norms(ResNet(depth, base_channels=8))
    folded = fold_batch_norms(copy.deepcopy(backbone))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    images = torch.randn(2, 3, 32, 64)
    for plain, fast in zip(backbone(images), folded(images), strict=True):
        assert torch.allclose(plain, fast, atol=1e-4 * float(plain.abs().max()))


def test_all_batch_norms_are_folded_and_the_model_is_unchanged() -> None:
    model = small_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fast = inference_model(model, CPU)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fast.modules())
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_batch_norm_without_convolution_raises() -> None:
    with pytest.raises(ValueError, match="batch norm '1' of Sequential follows no convolution"):
        fold_batch_norms(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm2d(2)))


def test_channels_last_computes_the_same() -> None:
    torch.manual_seed(0)
    backbone = randomised_norms(ResNet(18, base_channels=8))
    last = copy.deepcopy(backbone).to(memory_format=torch.channels_last)
    images = torch.randn(2, 3, 32, 64)
    for plain, fast in zip(
        backbone(images), last(images.contiguous(memory_format=torch.channels_last)), strict=True
    ):
        assert fast.is_contiguous(memory_format=torch.channels_last)
        assert torch.allclose(plain, fast, atol=1e-4 * float(plain.abs().max()))


def test_cached_geometry_computes_the_same() -> None:
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
def test_images_scaled_by_taps_equal_those_of_opencv(width: int, height: int) -> None:
    config = ImageConfig(width=704, height=256)
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = cv2.GaussianBlur(image, (5, 5), 0)
    taps = image_taps(config, width, height)
    raw = torch.from_numpy(image[taps.first_row :])[None]
    ours = resample(raw, batch_taps([taps], CPU), torch.tensor([True]))[0].numpy()
    difference = np.abs(ours.astype(int) - resize_and_crop(image, config).astype(int))
    assert difference.max() <= 1
    assert difference.mean() < (
        0.05 if width > config.width else 0.15
    )  # OpenCV enlarges in fixed-point arithmetic


def test_rows_above_the_crop_are_not_read() -> None:
    taps = image_taps(ImageConfig(width=704, height=256), 1600, 900)
    assert taps.first_row == 318  # 140 of 396 rows are cut; each covers 2.27 image rows
    assert int(taps.rows.source.max()) == 900 - 318 - 1


def test_header_round_trip_is_exact() -> None:
    camera_round = make_round(3, missing=2)
    rig = round_rig(camera_round, small_config().image, [f"cam{i}" for i in range(6)])
    header = torch.from_numpy(pack_header(rig, camera_round.global_from_ego, 1e6 + 0.25, True))
    pose, unpacked, time, first = unpack_header(header, 6)
    assert np.array_equal(pose[0].numpy(), camera_round.global_from_ego)
    assert all(torch.equal(a, b) for a, b in zip(rig, unpacked, strict=True))
    assert (float(time), bool(first)) == (1e6 + 0.25, True)


def test_rounding_errors_of_ego_motion_keep_the_rig_key() -> None:
    config = small_config()
    keys = {
        rig_key(round_rig(make_round(index), config.image, [f"cam{i}" for i in range(6)]))
        for index in range(5)
    }
    assert len(keys) == 1
