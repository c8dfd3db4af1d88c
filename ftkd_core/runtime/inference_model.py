# SPDX-License-Identifier: Apache-2.0
"""Copy of a model for inference: batch norms folded into convolutions, channels last, and weights in half
precision where accuracy allows it. The original model is unchanged."""

import copy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ftkd_core.models.build import StreamingModel

ModuleT = TypeVar("ModuleT", bound=nn.Module)
ModelT = TypeVar("ModelT", bound=StreamingModel)


def inference_model(model: ModelT, device: torch.device, dtype: torch.dtype = torch.float32) -> ModelT:
    """Return a copy of the model for inference on a device: folded, channels last, with matrices in `dtype`
    and without a 2-D head that is used only in training.

    Run a half `dtype` under autocast of that type. Outputs in metres and scores, and the encoding of the
    rays, stay in float32, because the logarithm of a depth in float16 has a resolution of 8 cm at 40 m.
    """
    fast: Any = copy.deepcopy(model).eval().requires_grad_(False)
    if not model.config.decoder.num_image_queries:
        fast.auxiliary = None
    fast = fold_batch_norms(fast)
    fast = fast.to(device)
    nn.Module.to(fast, memory_format=torch.channels_last)  # type: ignore[call-overload]
    if dtype != torch.float32:
        for name, module in fast.named_modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)) and not name.startswith(_FLOAT32):
                module.to(dtype)
        for parent, name in ((fast, "classifier"), (fast, "regressor"), *_dense_heads(fast)):
            setattr(parent, name, _InFloat32(getattr(parent, name)))
    inferring: ModelT = fast
    return inferring


_FLOAT32 = (
    "classifier", "regressor", "auxiliary.heat", "auxiliary.output", "position.encoder", "position.alignment",
    "linking",
)  # fmt: skip


def _dense_heads(model: StreamingModel) -> list[tuple[nn.Module, str]]:
    head = model.auxiliary
    return [] if head is None else [(head, "heat"), (head, "output")]


class _InFloat32(nn.Module):
    """Module that computes in float32, also under autocast."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            result: Tensor = self.module(x.float())
            return result


def fold_batch_norms(module: ModuleT) -> ModuleT:
    """Fold every batch norm of a module, in place, into its convolution; return the module.

    In an `nn.Sequential` the convolution is the previous module; elsewhere `bn<x>` belongs to `conv<x>`.
    Raises ValueError for a batch norm without convolution.
    """
    for parent in module.modules():
        previous = ""
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                partner = previous if isinstance(parent, nn.Sequential) else name.replace("bn", "conv")
                convolution = parent._modules.get(partner)
                if not isinstance(convolution, nn.Conv2d):
                    raise ValueError(f"batch norm {name!r} of {type(parent).__name__} follows no convolution")
                setattr(parent, partner, fuse_conv_bn_eval(convolution, child))
                setattr(parent, name, nn.Identity())
            previous = name
    return module
