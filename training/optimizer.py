# SPDX-License-Identifier: Apache-2.0
"""Parameter groups of the optimiser and frozen parts of the backbone, as `OptimConfig` asks for."""

from typing import Any, Final

from torch import Tensor, nn

from ftkd_core.errors import UserError
from ftkd_core.models.resnet import ResNet
from training.config import SLOW_RATIO, WEIGHT_DECAY, OptimConfig

_POINT_PARAMETERS: Final = ("reference_points", "query_boxes")


def frozen_modules(backbone: ResNet, optim: OptimConfig) -> list[nn.Module]:
    """Return the parts of a backbone whose parameters are not trained."""
    if optim.backbone_ratio == 0:
        return [backbone]
    stages = [backbone.layer1, backbone.layer2, backbone.layer3, backbone.layer4][: optim.frozen_stages]
    frozen: list[nn.Module] = [backbone.conv1, backbone.bn1, *stages] if stages else []
    return [*frozen, *_batch_norms(backbone)] if optim.backbone_norms == "frozen" else frozen


def eval_modules(backbone: ResNet, optim: OptimConfig) -> list[nn.Module]:
    """Return the parts of a backbone that stay in eval mode: frozen parts, and norms that keep statistics."""
    norms = _batch_norms(backbone) if optim.backbone_norms == "keep_statistics" else []
    return [*frozen_modules(backbone, optim), *norms]


def _batch_norms(backbone: ResNet) -> list[nn.Module]:
    return [module for module in backbone.modules() if isinstance(module, nn.BatchNorm2d)]


def parameter_groups(task: nn.Module, optim: OptimConfig) -> list[dict[str, Any]]:
    """Group the trained parameters of a task by backbone or rest, slow or not, with or without weight decay.

    Norms, biases and learned points have no weight decay unless decay_all is set. Raises UserError for a
    name in `slow` that matches no parameter.
    """
    groups: dict[tuple[bool, bool, bool], list[Tensor]] = {}
    trained = {name: p for name, p in task.named_parameters() if p.requires_grad}
    for part in optim.slow:
        if not any(part in name.split(".") for name in trained):
            raise UserError(
                f"optim.slow {part!r}: no trained parameter has it in its name; expected a part of one, "
                "e.g. sampling_offset of a SparseBEV"
            )
    for name, parameter in trained.items():
        decayed = optim.decay_all or (parameter.ndim > 1 and not name.endswith(_POINT_PARAMETERS))
        slow = not set(optim.slow).isdisjoint(name.split("."))
        key = (name.startswith("detector.backbone."), slow, decayed)
        groups.setdefault(key, []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": WEIGHT_DECAY if decayed else 0.0,
            "ratio": (optim.backbone_ratio if backbone else 1.0) * (SLOW_RATIO if slow else 1.0),
            "norms": optim.backbone_norms,  # not used by AdamW; compared when a checkpoint is resumed
        }
        for (backbone, slow, decayed), parameters in groups.items()
    ]
