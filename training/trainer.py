# SPDX-License-Identifier: Apache-2.0
"""The training loop: Lightning Fabric carries devices, processes and precision, a lesson (lessons.py) says
what a step teaches; this carries steps, averages and checkpoints.

Everything a step draws at random is a function of (seed, step, rank), so a run that was killed goes on bit
for bit where its last checkpoint was written.
"""

import copy
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from ftkd_core.errors import UserError
from ftkd_core.models.resnet import ResNet
from ftkd_core.weights import save_weights
from training.config import SLOW_RATIO, OptimConfig
from training.tasks import State, StreamLesson, WindowLesson, difference, is_taught

_LEARNT_PLACES = ("reference_points", "query_boxes")


class Trainer:
    """Owns lesson, averaged weights, optimiser and the lesson's state; `run` goes from the last checkpoint to
    the end. notes: what the weights file shall say of itself beside steps, hours and seed."""

    def __init__(
        self,
        fabric: Fabric,
        lesson: StreamLesson | WindowLesson,
        optim: OptimConfig,
        out: Path,
        *,
        steps: int,
        seed: int,
        autocast: torch.dtype | None = None,
        notes: Mapping[str, Any] | None = None,
    ) -> None:
        self.fabric, self.out, self.optim, self.steps, self.seed = fabric, out, optim, steps, seed
        self.notes = dict(notes or {})
        # Not Fabric's bf16-mixed: it would hand the lesson bfloat16 poses, good to 4 m in a town.
        self.autocast = autocast
        self.lesson, self.raw = lesson, lesson.detector
        self.config = lesson.detector.config
        for module in _frozen(self.raw.backbone, optim):
            module.requires_grad_(False)  # before the optimiser and DDP ask what learns
        self.average = copy.deepcopy(self.raw).eval().requires_grad_(False) if optim.ema else None
        optimizer = torch.optim.AdamW(
            _parameter_groups(lesson, optim), lr=optim.lr, weight_decay=optim.weight_decay
        )
        self.model, self.optimizer = fabric.setup(lesson, optimizer)
        if lesson.distiller is not None:
            fabric.to_device(lesson.distiller.teacher)
        if self.average is not None:
            self.average = fabric.to_device(self.average)
        self.state = lesson.start_state()
        self.step = 0
        self.seconds = 0.0

    def run(self, dataset: Dataset[Any], *, workers: int, save_every: int, log_every: int = 20) -> None:
        """Train to the last step; saves every save_every steps and at the end."""
        loader = DataLoader(
            dataset,
            batch_size=None,
            sampler=range(self.step, self.steps),  # type: ignore[arg-type]
            num_workers=workers,
            prefetch_factor=4 if workers else None,
            pin_memory=self.fabric.device.type == "cuda",
            worker_init_fn=_work_alone,
        )
        writer = SummaryWriter(self.out / "tensorboard") if self.fabric.is_global_zero else None
        progress = tqdm(
            loader, initial=self.step, total=self.steps, desc="train", disable=writer is None, smoothing=0.05
        )
        self.start_training()
        began = time.monotonic()
        for batch in progress:
            terms, norm = self.train_step(self.fabric.to_device(batch))
            self.step += 1
            if self.step % log_every == 0 or self.step == self.steps:
                values = {name: float(value) for name, value in terms.items()}
                total = sum(values.values())
                progress.set_postfix(loss=f"{total:.2f}", class_=f"{values[self._last('class')]:.3f}",
                                     box=f"{values[self._last('box')]:.3f}")  # fmt: skip
                if writer is not None:
                    self._log(writer, values, total, norm)
            if self.step % save_every == 0 or self.step == self.steps:
                now = time.monotonic()
                self.seconds, began = self.seconds + now - began, now
                self.save()
        if writer is not None:
            writer.close()

    def start_training(self) -> None:
        """Training mode for all that learns; the teacher is no part of the model and stays as it is."""
        self.model.train()
        for module in _still(self.raw.backbone, self.optim):
            module.eval()

    def train_step(self, batch: Any) -> tuple[dict[str, Tensor], Tensor]:
        """One optimiser step on one batch of the lesson. Errors: FloatingPointError, which names the part,
        where predictions, a term or a gradient are not finite; no weight has changed then."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.optim.rate(self.step, self.steps) * group["ratio"]
        drawn = hash((self.seed, self.step, self.fabric.global_rank)) % 2**63
        torch.manual_seed(drawn)  # dropout
        generator = torch.Generator().manual_seed(drawn)
        half = self.autocast or torch.bfloat16
        with torch.autocast(self.fabric.device.type, half, enabled=self.autocast is not None):
            try:
                terms, after = self.model(batch, self.state, generator)
            except FloatingPointError as error:  # of what is matched before there are terms
                raise self._stopped(str(error)) from None
        loss = torch.stack(list(terms.values())).sum()
        if not torch.isfinite(loss):
            bad = ", ".join(name for name, value in terms.items() if not torch.isfinite(value))
            raise self._stopped(f"loss term {bad} is not finite")
        self.optimizer.zero_grad(set_to_none=True)
        self.fabric.backward(loss)
        norm = self._clip()
        self.optimizer.step()
        self._update_average()
        self.state = after
        return {name: value.detach() for name, value in terms.items()}, norm.detach()

    def _clip(self) -> Tensor:
        """Clip the gradients; returns their norm of before. Errors: FloatingPointError where it is not
        finite."""
        try:
            norm = self.fabric.clip_gradients(self.model, self.optimizer, max_norm=self.optim.clip_norm)
        except RuntimeError:
            norms = {name: p.grad.norm() for name, p in self.lesson.named_parameters() if p.grad is not None}
            bad = [name for name, value in norms.items() if not torch.isfinite(value)]
            if not bad:  # it was about something else
                raise
            others = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
            raise self._stopped(f"the gradient of {bad[0]}{others} is not finite") from None
        assert norm is not None
        return norm

    def _stopped(self, reason: str) -> FloatingPointError:
        return FloatingPointError(f"step {self.step}: {reason}; the last checkpoint is kept")

    @torch.no_grad()
    def _update_average(self) -> None:
        if self.average is None:
            return
        decay = min(self.optim.ema, (1 + self.step) / (10 + self.step))
        for mean, value in zip(
            self.average.state_dict().values(), self.raw.state_dict().values(), strict=True
        ):
            if mean.is_floating_point():
                mean.lerp_(value, 1 - decay)
            else:
                mean.copy_(value)

    def _last(self, kind: str) -> str:
        return f"layer{self.config.decoder.num_layers - 1}/{kind}"

    def _log(self, writer: SummaryWriter, values: dict[str, float], total: float, norm: Tensor) -> None:
        detection = sum(value for name, value in values.items() if not is_taught(name))
        taught = {name: value for name, value in values.items() if is_taught(name) and detection}
        ratios = {f"ratio/{name}": value / detection for name, value in taught.items()}
        for name, value in {**values, **ratios, "total": total, "gradient_norm": float(norm)}.items():
            writer.add_scalar(name, value, self.step)
        writer.add_scalar("lr", self.optimizer.param_groups[0]["lr"], self.step)

    def save(self) -> None:
        """Write `weights.safetensors` (averaged, half precision) and `state.pt` (all that resuming needs).

        Every process calls it, the first writes. Errors: FloatingPointError where a weight is not finite or
        does not fit half precision; nothing is written then.
        """
        states = self._gather_states()
        if not self.fabric.is_global_zero:
            return
        best = self.average if self.average is not None else self.raw
        mine = {"steps": self.step, "hours": round(self.seconds / 3600, 3), "seed": self.seed}
        weights, notes = self.out / "weights.safetensors", {**mine, **self.notes}
        try:
            save_weights(weights, best.state_dict(), self.config, notes=notes)
        except ValueError as error:
            raise self._stopped(str(error)) from None
        state: dict[str, Any] = {
            "step": self.step,
            "seconds": self.seconds,
            "lesson": self.lesson.state_dict(),
            "average": self.average.state_dict() if self.average is not None else None,
            "optimizer": self.optimizer.state_dict(),
            "states": states,
            "settings": json.dumps(self.lesson.settings),
        }
        partial = self.out / "state.pt.partial"
        torch.save(state, partial)
        partial.replace(self.out / "state.pt")

    def _gather_states(self) -> list[list[Tensor]]:
        """The states of all processes, by rank: in one file they are of one step, whenever a run is
        killed."""
        processes = self.fabric.world_size
        if processes == 1:
            return [list(self.state)]
        states: list[list[Tensor]] = [[] for _ in range(processes)]
        for value in self.state:
            for state, theirs in zip(states, self.fabric.all_gather(value), strict=True):
                # Strides as they were: contiguous, the same values would be summed in another order.
                state.append(torch.empty_like(value).copy_(theirs))
        return states

    def resume(self, path: Path) -> None:
        """Go on from a `state.pt`. UserError where it belongs to another configuration or number of
        processes or streams."""
        state = torch.load(path, map_location=self.fabric.device, weights_only=True)
        if "settings" not in state:
            raise UserError(f"{str(path)!r} is of an older version of the training; give another --out")
        if differ := difference(json.loads(state["settings"]), self.lesson.settings):
            raise UserError(
                f"{str(path)!r} was trained with another configuration ({differ}); give another --out"
            )
        own = self._own_state(path, state)
        theirs, mine = (
            [_taught(group) for group in groups["param_groups"]]
            for groups in (state["optimizer"], self.optimizer.state_dict())
        )
        if theirs != mine:
            raise UserError(
                f"{str(path)!r} trained other parameters (optim.backbone_ratio 0 or not) or these in another "
                "way (backbone_ratio, backbone_norms, frozen_stages, slow, decay_all); give another --out"
            )
        self.lesson.load_state_dict(state["lesson"])
        if self.average is not None:  # where none was kept, it starts from what was learnt
            self.average.load_state_dict(state["average"] or self.raw.state_dict())
        self.optimizer.load_state_dict(state["optimizer"])
        self.state, self.step, self.seconds = own, state["step"], state["seconds"]

    def _own_state(self, path: Path, state: dict[str, Any]) -> State:
        """What a `state.pt` keeps for this process; UserError where it is of other processes or streams."""
        states = state["states"] if "states" in state else [state["state"]]  # the older form: of one process
        there, here = len(states), self.fabric.world_size
        if there != here:
            raise UserError(
                f"{str(path)!r} is of {there} process{'es' * (there > 1)}, this run has {here}; start "
                "as many, or give another --out"
            )
        own = states[self.fabric.global_rank]
        if [value.shape for value in own] != [value.shape for value in self.state]:
            there, here = (len(values[0]) for values in (own, self.state))
            raise UserError(f"{str(path)!r} has {there} streams; this run has {here}")
        return tuple(own)


def _work_alone(worker: int) -> None:
    """OpenCV in a worker of the loader takes one core: the workers share the cores already."""
    cv2.setNumThreads(0)  # 1 would end the threads of the parent, for which a forked worker waits in vain


def _frozen(backbone: ResNet, optim: OptimConfig) -> list[nn.Module]:
    """What of a backbone does not learn."""
    if optim.backbone_ratio == 0:
        return [backbone]
    stages = [backbone.layer1, backbone.layer2, backbone.layer3, backbone.layer4][: optim.frozen_stages]
    frozen: list[nn.Module] = [backbone.conv1, backbone.bn1, *stages] if stages else []
    return [*frozen, *_norms(backbone)] if optim.backbone_norms == "frozen" else frozen


def _still(backbone: ResNet, optim: OptimConfig) -> list[nn.Module]:
    """What of a backbone runs as at inference: what does not learn, and norms that keep their statistics."""
    kept = _norms(backbone) if optim.backbone_norms == "keep_statistics" else []
    return [*_frozen(backbone, optim), *kept]


def _norms(backbone: ResNet) -> list[nn.Module]:
    return [module for module in backbone.modules() if isinstance(module, nn.BatchNorm2d)]


def _parameter_groups(lesson: nn.Module, optim: OptimConfig) -> list[dict[str, Any]]:
    """Backbone and rest, what of them is slow and what is not, each with and without weight decay (norms,
    biases and learnt points are not decayed, unless decay_all is set). UserError for a name of `slow` that
    nothing has."""
    groups: dict[tuple[bool, bool, bool], list[Tensor]] = {}
    learning = {name: p for name, p in lesson.named_parameters() if p.requires_grad}
    for part in optim.slow:
        if not any(part in name.split(".") for name in learning):
            raise UserError(
                f"optim.slow {part!r}: no parameter that learns has it in its name; expected a part of one, "
                "e.g. sampling_offset of a SparseBEV"
            )
    for name, parameter in learning.items():
        decayed = optim.decay_all or (parameter.ndim > 1 and not name.endswith(_LEARNT_PLACES))
        slow = not set(optim.slow).isdisjoint(name.split("."))
        key = (name.startswith("detector.backbone."), slow, decayed)
        groups.setdefault(key, []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": optim.weight_decay if decayed else 0.0,
            "ratio": (optim.backbone_ratio if backbone else 1.0) * (SLOW_RATIO if slow else 1.0),
            "norms": optim.backbone_norms,  # of no use here, but kept in checkpoints, which must agree on it
        }
        for (backbone, slow, decayed), parameters in groups.items()
    ]


def _taught(group: dict[str, Any]) -> tuple[int, float, str]:
    """What two checkpoints' groups of parameters must agree on; those of before the norms had a choice were
    trained with norms that learn."""
    return len(group["params"]), group["ratio"], group.get("norms", "learn")
