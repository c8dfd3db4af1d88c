# SPDX-License-Identifier: Apache-2.0
"""The training loop: Lightning Fabric carries devices, processes and precision, a lesson (lessons.py) says
what a step teaches; this carries steps, averages and checkpoints.

Everything a step draws at random is a function of (seed, step, rank), so a run that was killed goes on bit
for bit where its last checkpoint was written.
"""

import copy
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from ftkd_core.errors import UserError
from ftkd_core.weights import save_weights
from training.lessons import StreamLesson, WindowLesson

_LEARNT_PLACES = ("reference_points", "query_boxes")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW with linear warm-up and cosine decay to final_ratio * lr; gradients clipped to clip_norm; the
    backbone learns at backbone_ratio * lr (1 from scratch; 0: it stays as it is, its statistics too); ema is
    the decay of the averaged weights (0: none)."""

    lr: float = 4e-4
    weight_decay: float = 0.01
    warmup_steps: int = 200
    final_ratio: float = 0.01
    clip_norm: float = 35.0
    backbone_ratio: float = 1.0
    ema: float = 0.998

    def rate(self, step: int, steps: int) -> float:
        """Learning rate at a step of a run of `steps`."""
        warm = min(1.0, (step + 1) / max(self.warmup_steps, 1))
        progress = min(1.0, max(0.0, (step - self.warmup_steps) / max(steps - self.warmup_steps, 1)))
        cosine = self.final_ratio + (1 - self.final_ratio) * 0.5 * (1 + math.cos(math.pi * progress))
        return self.lr * warm * cosine


class Trainer:
    """Owns lesson, averaged weights, optimiser and the lesson's state; `run` goes from the last checkpoint to
    the end."""

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
    ) -> None:
        self.fabric, self.out, self.optim, self.steps, self.seed = fabric, out, optim, steps, seed
        # Not Fabric's bf16-mixed: it would hand the lesson bfloat16 poses, good to 4 m in a town.
        self.autocast = autocast
        self.lesson, self.raw = lesson, lesson.detector
        self.config = lesson.detector.config
        if optim.backbone_ratio == 0:
            self.raw.backbone.requires_grad_(False)
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
        if self.optim.backbone_ratio == 0:
            self.raw.backbone.eval()

    def train_step(self, batch: Any) -> tuple[dict[str, Tensor], Tensor]:
        """One optimiser step on one batch of the lesson. Errors: FloatingPointError where a term is not
        finite."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.optim.rate(self.step, self.steps) * group["ratio"]
        drawn = hash((self.seed, self.step, self.fabric.global_rank)) % 2**63
        torch.manual_seed(drawn)  # dropout
        generator = torch.Generator().manual_seed(drawn)
        half = self.autocast or torch.bfloat16
        with torch.autocast(self.fabric.device.type, half, enabled=self.autocast is not None):
            terms, after = self.model(batch, self.state, generator)
        loss = torch.stack(list(terms.values())).sum()
        if not torch.isfinite(loss):
            bad = ", ".join(name for name, value in terms.items() if not torch.isfinite(value))
            raise FloatingPointError(
                f"step {self.step}: loss term {bad} is not finite; the last checkpoint is kept"
            )
        self.state = after
        self.optimizer.zero_grad(set_to_none=True)
        self.fabric.backward(loss)
        norm = self.fabric.clip_gradients(self.model, self.optimizer, max_norm=self.optim.clip_norm)
        self.optimizer.step()
        self._update_average()
        assert norm is not None
        return {name: value.detach() for name, value in terms.items()}, norm.detach()

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
        for name, value in {**values, "total": total, "gradient_norm": float(norm)}.items():
            writer.add_scalar(name, value, self.step)
        writer.add_scalar("lr", self.optimizer.param_groups[0]["lr"], self.step)

    def save(self) -> None:
        """Write `weights.safetensors` (averaged, half precision) and `state.pt` (all that resuming needs)."""
        if not self.fabric.is_global_zero:
            return
        best = self.average if self.average is not None else self.raw
        notes = {"steps": self.step, "hours": round(self.seconds / 3600, 3), "seed": self.seed}
        save_weights(self.out / "weights.safetensors", best.state_dict(), self.config, notes=notes)
        state: dict[str, Any] = {
            "step": self.step,
            "seconds": self.seconds,
            "lesson": self.lesson.state_dict(),
            "average": self.average.state_dict() if self.average is not None else None,
            "optimizer": self.optimizer.state_dict(),
            "state": list(self.state),
            "settings": json.dumps(self.lesson.settings),
        }
        partial = self.out / "state.pt.partial"
        torch.save(state, partial)
        partial.replace(self.out / "state.pt")

    def resume(self, path: Path) -> None:
        """Go on from a `state.pt`. UserError where it belongs to another configuration or number of
        streams."""
        state = torch.load(path, map_location=self.fabric.device, weights_only=True)
        if "settings" not in state:
            raise UserError(f"{str(path)!r} is of an older version of the training; give another --out")
        if json.loads(state["settings"]) != json.loads(json.dumps(self.lesson.settings)):
            raise UserError(f"{str(path)!r} was trained with another configuration; give another --out")
        if [value.shape for value in state["state"]] != [value.shape for value in self.state]:
            there, here = (len(values[0]) for values in (state["state"], self.state))
            raise UserError(f"{str(path)!r} has {there} streams; this run has {here}")
        theirs, mine = (
            [len(group["params"]) for group in groups["param_groups"]]
            for groups in (state["optimizer"], self.optimizer.state_dict())
        )
        if theirs != mine:
            raise UserError(
                f"{str(path)!r} trained other parameters (optim.backbone_ratio 0 or not); give another --out"
            )
        self.lesson.load_state_dict(state["lesson"])
        if self.average is not None and state["average"] is not None:
            self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.state, self.step, self.seconds = tuple(state["state"]), state["step"], state["seconds"]


def _parameter_groups(lesson: torch.nn.Module, optim: OptimConfig) -> list[dict[str, Any]]:
    """Backbone and rest, each with and without weight decay (norms, biases and learnt points are not
    decayed)."""
    groups: dict[tuple[bool, bool], list[Tensor]] = {}
    for name, parameter in lesson.named_parameters():
        if not parameter.requires_grad:
            continue
        decayed = parameter.ndim > 1 and not name.endswith(_LEARNT_PLACES)
        key = (name.startswith("detector.backbone."), decayed)
        groups.setdefault(key, []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": optim.weight_decay if decayed else 0.0,
            "ratio": optim.backbone_ratio if backbone else 1.0,
        }
        for (backbone, decayed), parameters in groups.items()
    ]
