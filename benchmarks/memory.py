# SPDX-License-Identifier: Apache-2.0
"""Memory of one training sample per recipe, counted without computing anything.

    python -m benchmarks.memory --json FILE

The forward and backward pass of each recipe's model run at full size on tensors without content
(`FakeTensorMode`), on any machine, in seconds. Counted per sample:

- `saved_activation_gb`: the tensors that the forward pass stores for the backward pass;
- `all_reduce_gb`: float32 gradients that processes exchange per step; `images` that a sample has;
- `peak_gb`: the largest sum of all live tensors in forward and backward pass, with parameters, gradients and
  the state of AdamW.

Each is given in bfloat16 (autocast) and float32, as the recipe runs and without recomputation. Losses and
matching are left out: they take less than 0.1 GB. A GPU needs more: workspaces of its libraries and
fragmentation. For the R101 teacher without recomputation and without frozen stages, 57.8 GB + 1.0 GB are
counted in float32 and 63.3 GB were measured on an H200.
"""

import argparse
import sys
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.report import report
from ftkd_core.config import DetectorConfig, SparseBEVConfig
from ftkd_core.models.build import build_stream_petr
from ftkd_core.models.recompute import set_recompute
from ftkd_core.models.sparse_bev import SparseBEV, build_sparse_bev
from ftkd_core.models.stream_petr import StreamPETR
from ftkd_core.types import CameraRig, DenoisingQueries, Frame, FrameWindow
from training.config import OptimConfig
from training.optimizer import eval_modules, frozen_modules
from training.recipes import RECIPES
from training.train import TrainOptions, resolve_config

OBJECTS: Final = 40
"""Objects per sample, for denoising queries; nuScenes has 34 on average."""
_FLOAT: Final = 4  # bytes
_GB: Final = 1e9


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of tensors that exist at the same time among those that operations create."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known: dict[int, Any] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._add(value.untyped_storage())
        return result

    def _add(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return

        def free(_: Any) -> None:
            del self._known[key]
            self.now -= size

        self._known[key] = weakref.ref(storage, free)
        self.now += size
        self.peak = max(self.peak, self.now)


def sample_memory(
    config: DetectorConfig | SparseBEVConfig, optim: OptimConfig, *, half: bool, recompute: bool,
    gradient_frames: int = 0,
) -> dict[str, float]:  # fmt: skip
    """Return `saved_activation_gb`, `peak_gb` and sizes of one training sample of a model."""
    with FakeTensorMode():
        model: StreamPETR | SparseBEV = (
            build_sparse_bev(config) if isinstance(config, SparseBEVConfig) else build_stream_petr(config)
        )
        set_recompute(model.train(), recompute)
        for part in frozen_modules(model.backbone, optim):
            part.requires_grad_(False)
        for part in eval_modules(model.backbone, optim):
            part.eval()
        own = {value.untyped_storage()._cdata for value in (*model.parameters(), *model.buffers())}
        saved: dict[int, Any] = {}

        def store(value: Tensor) -> Tensor:
            if value.untyped_storage()._cdata not in own:
                saved[value.untyped_storage()._cdata] = value.untyped_storage()  # kept alive: ids are unique
            return value

        with LiveMemory() as live, torch.autocast("cpu", torch.bfloat16, enabled=half):
            with torch.autograd.graph.saved_tensors_hooks(store, lambda value: value):
                loss = _forward(model, gradient_frames)
            stored = sum(storage.nbytes() for storage in saved.values())
            saved.clear()
            loss.backward()  # type: ignore[no-untyped-call]
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        parameters, frames = sum(p.numel() for p in model.parameters()), 1
        if isinstance(config, SparseBEVConfig):
            frames = config.num_frames
        fixed = _FLOAT * parameters + 2 * _FLOAT * trained  # weights, two moments; gradients are live tensors
    return {
        "saved_activation_gb": stored / _GB,
        "peak_gb": (live.peak + fixed) / _GB,
        "parameters_m": parameters / 1e6,
        "all_reduce_gb": _FLOAT * trained / _GB,
        "images": frames * len(config.channels),
    }


def _forward(model: StreamPETR | SparseBEV, gradient_frames: int) -> Tensor:
    """Return a loss that depends on all outputs of a model for an empty sample."""
    config = model.config
    image, cameras = config.image, len(config.channels)
    lead = (1, config.num_frames, cameras) if isinstance(config, SparseBEVConfig) else (1, cameras)
    rig = CameraRig(torch.zeros(*lead, 3, 3), torch.zeros(*lead, 4, 4), torch.ones(lead, dtype=torch.bool))
    images = torch.zeros(*lead, 3, image.height, image.width)
    denoising = _denoising(config)
    if isinstance(model, SparseBEV):
        window = FrameWindow(images, rig, torch.zeros(lead[:2]))
        predictions, _ = model(window, denoising, gradient_frames)
    else:
        first = torch.ones(1, dtype=torch.bool)
        pose = torch.zeros(1, 4, 4, dtype=torch.float64)
        frame = Frame(images, rig, pose, torch.zeros(1, dtype=torch.float64), first)
        predictions, _ = model(frame, model.start_memory(1), denoising)
    outputs = [
        value for value in tree_leaves(predictions) if isinstance(value, Tensor) and value.requires_grad
    ]
    total: Tensor = torch.stack([value.float().sum() for value in outputs]).sum()
    return total


def _denoising(config: DetectorConfig | SparseBEVConfig) -> DenoisingQueries:
    groups = config.loss.denoising_groups
    shape = (1, groups * OBJECTS)
    labels, real = torch.zeros(shape, dtype=torch.long), torch.ones(shape, dtype=torch.bool)
    return DenoisingQueries(
        torch.zeros(*shape, 3), labels, real, real, groups, torch.zeros(*shape, 10), labels
    )


def recipe_memory(name: str) -> dict[str, Any]:
    """Return the figures of a recipe."""
    config = resolve_config(TrainOptions(out=Path(), recipe=name))
    figures: dict[str, Any] = {}
    for key, half, recompute, frames in (
        ("recipe", True, True, 0),
        ("float32", False, True, 0),
        ("without_recomputation", True, False, 0),
        ("gradient_frames_1", True, True, 1),
    ):
        if key == "gradient_frames_1" and isinstance(config.model, DetectorConfig):
            continue
        figures[key] = sample_memory(
            config.model, config.optim, half=half, recompute=recompute, gradient_frames=frames
        )
    return figures


def count_parameters(model: nn.Module) -> float:
    """Return the parameters of a model in millions."""
    return sum(parameter.numel() for parameter in model.parameters()) / 1e6


def main(argv: Sequence[str] | None = None) -> int:
    """Count and print the memory of recipes."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.memory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--recipe", choices=sorted(RECIPES), action="append", help="only this one; repeatable"
    )
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args(argv)
    names = options.recipe or list(RECIPES)
    report(
        {"objects_per_sample": OBJECTS, "recipes": {name: recipe_memory(name) for name in names}},
        options.json,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
