# SPDX-License-Identifier: Apache-2.0
"""The training loop: steps, averaged weights, logging and checkpoints. Lightning Fabric handles devices,
processes and precision; a task (`tasks.py`) computes the losses.

All random draws of a step are a function of (seed, step, rank), so a run that was killed resumes bit for bit
from its last checkpoint.
"""

import copy
import json
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import cv2
import torch
from lightning_fabric import Fabric
from lightning_fabric.loggers.logger import Logger
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ftkd_core.classes import CAMERA_CHANNELS
from ftkd_core.data.synthetic.rig import canonical_cameras, nuscenes_rig
from ftkd_core.errors import UserError
from ftkd_core.models.sparse_bev import SparseBEV
from ftkd_core.models.stream_petr import StreamPETR
from ftkd_core.weights import save_weights
from training import checkpoint
from training.accumulation import merge_states, split_batch
from training.config import MAX_GRADIENT_NORM, OptimConfig
from training.distiller import is_distillation_term
from training.optimizer import eval_modules, frozen_modules, parameter_groups
from training.periodic_validation import ValidationPlan, validate_model
from training.preemption import StoppedError, StopRequest
from training.run_log import RunLog, Throughput
from training.tasks import DecoderTask, State, StreamingTask, WindowTask

WEIGHTS_NAME = "weights.safetensors"


class Trainer:
    """Owns a task, its state, the averaged weights and the optimiser. `run` trains from the current step to
    the last. accumulate: parts of a batch whose gradients are averaged before a step. notes: entries of the
    weights file besides steps, hours and seed."""

    def __init__(
        self,
        fabric: Fabric,
        task: StreamingTask | WindowTask | DecoderTask,
        optim: OptimConfig,
        out: Path,
        *,
        steps: int,
        seed: int,
        autocast: torch.dtype | None = None,
        accumulate: int = 1,
        notes: Mapping[str, Any] | None = None,
    ) -> None:
        self.fabric, self.out, self.optim, self.steps, self.seed = fabric, out, optim, steps, seed
        self.accumulate = accumulate
        self.notes = dict(notes or {})
        # Not Fabric's bf16-mixed: it would cast poses to bfloat16, which is accurate to 4 m in a town.
        self.autocast = autocast
        self.task, self.raw = task, task.detector
        self.config = task.detector.config
        for module in frozen_modules(self.raw.backbone, optim):
            module.requires_grad_(False)  # before the optimiser and DDP collect the trained parameters
        self.average: nn.Module | None = None
        if optim.ema:
            self.average = copy.deepcopy(self.raw).eval().requires_grad_(False)
        optimizer = torch.optim.AdamW(parameter_groups(task, optim), lr=optim.lr)
        self.model, self.optimizer = fabric.setup(task, optimizer)
        if task.distiller is not None:
            fabric.to_device(task.distiller.teacher)
        if self.average is not None:
            self.average = fabric.to_device(self.average)
        self.state = task.start_state()
        self.step = 0
        self.seconds, self._began = 0.0, time.monotonic()

    def run(
        self, dataset: Dataset[Any], *, workers: int, save_every: int, log_every: int = 20, keep: int = 1,
        samples_per_step: int = 0, loggers: Sequence[Logger] = (), plan: ValidationPlan | None = None,
    ) -> None:  # fmt: skip
        """Train to the last step; save every save_every steps, at the end and on SIGTERM, which then raises
        StoppedError.

        keep: number of checkpoints that are kept. samples_per_step: of all processes, for throughput.
        loggers: in addition to the files of `RunLog`. plan: validation during the run.
        """
        log = RunLog(self.out, loggers) if self.fabric.is_global_zero else None
        if log is not None:
            log.resume(self.step)
        progress = tqdm(
            initial=self.step, total=self.steps, desc="train", disable=log is None, smoothing=0.05
        )  # fmt: skip
        stop, speed = StopRequest(self.fabric), Throughput(samples_per_step)
        self.start_training()
        self._began = time.monotonic()
        with stop.listen(), progress:
            for batch in speed.timed(self._loader(dataset, workers)):
                terms, norm = self.train_step(self.fabric.to_device(batch))
                self.step += 1
                progress.update()
                last = self.step == self.steps
                if self.step % log_every == 0 or last:
                    self._log(log, progress, terms, norm, speed.figures(self.steps - self.step))
                stopped = bool(stop) and not last
                due = plan is not None and plan.is_due(self.step, self.steps)
                if self.step % save_every == 0 or last or stopped or due:
                    self._count_time()
                    self.save(keep)
                if stopped:
                    break
                if due and plan is not None:
                    with speed.paused():
                        self._validate(plan, log)
                    self._began = time.monotonic()
        if log is not None:
            log.close()
        if self.step < self.steps:
            raise StoppedError(
                f"stopped by SIGTERM at step {self.step} of {self.steps}; the checkpoint is saved"
            )

    def _count_time(self) -> None:
        """Add the time since the last call to the hours of training."""
        now = time.monotonic()
        self.seconds, self._began = self.seconds + now - self._began, now

    def _validate(self, plan: ValidationPlan, log: RunLog | None) -> None:
        """Score the saved weights (before their rounding to float16) and log the metrics."""
        model = self.average if self.average is not None else self.raw
        assert isinstance(model, (StreamPETR, SparseBEV))
        metrics = validate_model(plan, self.fabric, model, self.out / WEIGHTS_NAME, self.step)
        if log is not None and metrics is not None:
            log.write_validation(self.step, metrics)
            tqdm.write(f"step {self.step}: NDS {metrics['NDS']}, mAP {metrics['mAP']} on {metrics['split']}")
        self.fabric.barrier()

    def _loader(self, dataset: Dataset[Any], workers: int) -> DataLoader[Any]:
        """Return a loader of the remaining steps."""
        return DataLoader(
            dataset,
            batch_size=None,
            sampler=range(self.step, self.steps),
            num_workers=workers,
            prefetch_factor=4 if workers else None,
            pin_memory=self.fabric.device.type == "cuda",
            worker_init_fn=_limit_opencv_threads,
        )

    def start_training(self) -> None:
        """Set training mode, except for the frozen parts of the backbone and the teacher."""
        self.model.train()
        for module in eval_modules(self.raw.backbone, self.optim):
            module.eval()

    def train_step(self, batch: Any) -> tuple[dict[str, Tensor], Tensor]:
        """Run one optimiser step on one batch; return the loss terms and the gradient norm.

        Raises FloatingPointError, which names the part, if predictions, a term or a gradient are not finite;
        no weight has changed then.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = self.optim.rate(self.step, self.steps) * group["ratio"]
        step_seed = hash((self.seed, self.step, self.fabric.global_rank)) % 2**63
        torch.manual_seed(step_seed)  # dropout
        generator = torch.Generator().manual_seed(step_seed)
        self.optimizer.zero_grad(set_to_none=True)
        sums: dict[str, Tensor] = {}
        states: list[State] = []
        batches, before = split_batch(batch, self.accumulate), split_batch(self.state, self.accumulate)
        for part, (item, state) in enumerate(zip(batches, before, strict=True), start=1):
            with self.fabric.no_backward_sync(self.model, enabled=part < self.accumulate):
                terms, new_state = self._backward(item, state, generator)
            states.append(new_state)
            sums = {name: sums[name] + value if sums else value for name, value in terms.items()}
        norm = self._clip()
        self.optimizer.step()
        self._update_average()
        self.state = merge_states(states)
        return sums, norm.detach()

    def _backward(
        self, batch: Any, state: State, generator: torch.Generator
    ) -> tuple[dict[str, Tensor], State]:
        """Add the gradients of a part of the step's batch; return its share of the loss terms and its new
        state."""
        dtype = self.autocast or torch.bfloat16
        with torch.autocast(self.fabric.device.type, dtype, enabled=self.autocast is not None):
            try:
                terms, new_state = self.model(batch, state, generator)
            except FloatingPointError as error:  # the matching found a cost that is not finite
                raise self._not_finite(str(error)) from None
        if self.accumulate > 1:
            terms = {name: value / self.accumulate for name, value in terms.items()}
        loss = torch.stack(list(terms.values())).sum()
        if not torch.isfinite(loss):
            bad = ", ".join(name for name, value in terms.items() if not torch.isfinite(value))
            raise self._not_finite(f"loss term {bad} is not finite")
        self.fabric.backward(loss)
        return {name: value.detach() for name, value in terms.items()}, new_state

    def _clip(self) -> Tensor:
        """Clip the gradients and return their norm before clipping. Raise FloatingPointError if it is not
        finite."""
        try:
            norm = self.fabric.clip_gradients(self.model, self.optimizer, max_norm=MAX_GRADIENT_NORM)
        except RuntimeError:
            norms = {name: p.grad.norm() for name, p in self.task.named_parameters() if p.grad is not None}
            bad = [name for name, value in norms.items() if not torch.isfinite(value)]
            if not bad:  # another error
                raise
            others = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
            raise self._not_finite(f"the gradient of {bad[0]}{others} is not finite") from None
        assert norm is not None
        return norm

    def _not_finite(self, reason: str) -> FloatingPointError:
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

    def _log(
        self, log: RunLog | None, progress: "tqdm[Any]", terms: Mapping[str, Tensor], norm: Tensor,
        figures: Mapping[str, float],
    ) -> None:  # fmt: skip
        values = {name: float(value) for name, value in terms.items()}
        total = sum(values.values())
        progress.set_postfix(
            loss=f"{total:.2f}", class_=f"{values[self._last('class')]:.3f}",
            box=f"{values[self._last('box')]:.3f}", samples_s=f"{figures['samples_per_s']:.1f}",
            left=timedelta(seconds=round(figures["seconds_left"])),
        )  # fmt: skip
        if log is None:
            return
        detection = sum(value for name, value in values.items() if not is_distillation_term(name))
        distilled = {name: v for name, v in values.items() if is_distillation_term(name) and detection}
        ratios = {f"ratio/{name}": value / detection for name, value in distilled.items()}
        rate = {"lr": self.optimizer.param_groups[0]["lr"]}
        log.write(
            self.step, {**values, **ratios, "total": total, "gradient_norm": float(norm), **rate, **figures}
        )

    def save(self, keep: int = 1) -> None:
        """Write `weights.safetensors` (averaged, float16) and `state.pt` (everything needed to resume); keep
        those of the last `keep` checkpoints.

        Every process must call it; the first writes. Raises FloatingPointError if a weight is not finite or
        does not fit float16; nothing is written then.
        """
        states = self._gather_states()
        if not self.fabric.is_global_zero:
            return
        best = self.average if self.average is not None else self.raw
        notes = {"steps": self.step, "hours": round(self.seconds / 3600, 3), "seed": self.seed, **self.notes}
        cameras = canonical_cameras(nuscenes_rig()) if self.config.channels == CAMERA_CHANNELS else ()
        try:
            save_weights(
                self.out / WEIGHTS_NAME, best.state_dict(), self.config, notes=notes, cameras=cameras
            )
        except ValueError as error:
            raise self._not_finite(str(error)) from None
        checkpoint.write_checkpoint(
            self.out / checkpoint.FILE_NAME,
            {
                "step": self.step,
                "seconds": self.seconds,
                "task": self.task.state_dict(),
                "average": self.average.state_dict() if self.average is not None else None,
                "optimizer": self.optimizer.state_dict(),
                "states": states,
                "settings": json.dumps(self.task.settings),
            },
        )
        checkpoint.keep_copies(self.out, self.step, keep, (WEIGHTS_NAME, checkpoint.FILE_NAME))

    def _gather_states(self) -> list[list[Tensor]]:
        """Return the task states of all processes by rank. One file holds them, so all belong to the same
        step even if a run is killed."""
        processes = self.fabric.world_size
        if processes == 1:
            return [list(self.state)]
        states: list[list[Tensor]] = [[] for _ in range(processes)]
        for value in self.state:
            for state, gathered in zip(states, self.fabric.all_gather(value), strict=True):
                # Keep the strides: with contiguous ones the same values would be summed in another order.
                state.append(torch.empty_like(value).copy_(gathered))
        return states

    def resume(self, path: Path) -> None:
        """Resume from a checkpoint. Raise UserError if it has another configuration or another number of
        processes or streams."""
        saved = checkpoint.read_checkpoint(path, self.fabric.device)
        checkpoint.check_resumable(
            path, saved, self.task.settings, self.optimizer.state_dict()["param_groups"]
        )
        state = self._state_of_this_process(path, saved["states"])
        self.task.load_state_dict(saved["task"])
        if self.average is not None:  # start from the trained weights if the checkpoint has no average
            self.average.load_state_dict(saved["average"] or self.raw.state_dict())
        self.optimizer.load_state_dict(saved["optimizer"])
        self.state, self.step, self.seconds = state, saved["step"], saved["seconds"]

    def _state_of_this_process(self, path: Path, states: list[list[Tensor]]) -> State:
        """Return this process's task state. Raise UserError for another number of processes or streams."""
        saved_processes, processes = len(states), self.fabric.world_size
        if saved_processes != processes:
            raise UserError(
                f"{str(path)!r} was written by {saved_processes} process{'es' * (saved_processes > 1)}, this "
                f"run has {processes}; start as many, or give another --out"
            )
        state = states[self.fabric.global_rank]
        if [value.shape for value in state] != [value.shape for value in self.state]:
            saved_streams, streams = (len(values[0]) for values in (state, self.state))
            raise UserError(f"{str(path)!r} has {saved_streams} streams; this run has {streams}")
        return tuple(state)


def _limit_opencv_threads(worker: int) -> None:
    """Restrict OpenCV to one core in a loader worker, because the workers share the cores already."""
    # 0, not 1: with 1 a forked worker would wait forever for the parent's thread pool to end.
    cv2.setNumThreads(0)
