# SPDX-License-Identifier: Apache-2.0
"""Selection of devices and float32 precision."""

import contextlib

import pytest
import torch

from ftkd_core.errors import UserError
from ftkd_core.runtime.detector import resolve_device
from ftkd_core.runtime.devices import device_context, tf32_allowed, with_device_index, without_tf32
from tests.core.rounds import CPU


@pytest.mark.parametrize(("convolutions", "products"), [(True, "highest"), (False, "high"), (True, "medium")])
def test_tf32_is_disabled_inside_and_restored_after(convolutions: bool, products: str) -> None:
    gpu = torch.device("cuda", 0)
    before = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    try:
        torch.backends.cudnn.allow_tf32 = convolutions
        torch.set_float32_matmul_precision(products)
        assert tf32_allowed(gpu) and not tf32_allowed(CPU)
        with contextlib.suppress(ZeroDivisionError), without_tf32():
            assert not tf32_allowed(gpu)
            raise ZeroDivisionError
        with device_context(CPU):  # GPU settings are unchanged
            assert tf32_allowed(gpu)
        assert (torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()) == (
            convolutions, products,
        )  # fmt: skip
    finally:
        torch.backends.cudnn.allow_tf32 = before[0]
        torch.set_float32_matmul_precision(before[1])


def test_missing_gpu_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(UserError, match="device 'cuda:2': this machine's last CUDA GPU is cuda:1"):
        resolve_device("cuda:2")


def test_cuda_without_index_becomes_the_current_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The current GPU may differ between threads."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert with_device_index(torch.device("cuda")) == torch.device("cuda", 1)
    assert with_device_index(torch.device("cuda", 0)) == torch.device("cuda", 0)
    assert with_device_index(CPU) == CPU
