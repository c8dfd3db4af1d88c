# SPDX-License-Identifier: Apache-2.0
"""Train a SparseBEV on prepared scenes until a given time, for machines that are available for minutes.

    python -m training.timed --preset sparse_bev_small_offline --scenes DIR --until UNIX_SECONDS --out DIR

`benchmarks.gpu_study` prepares the scenes; the command waits for the file `ready` in DIR. Scenes stay in the
memory of the device (`device_windows.py`). The learning rate follows the share of the time that has passed.
Averaged weights and the log (losses, number of windows) are written every --save-s seconds and at the end.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
from lightning_fabric import Fabric

from ftkd_core.config import SparseBEVConfig, override
from ftkd_core.data.augmentation import AugmentConfig
from ftkd_core.errors import UserError
from ftkd_core.models.sparse_bev import build_sparse_bev
from ftkd_core.presets import sparse_bev_preset
from ftkd_core.weights import save_weights, start_from
from training.config import OptimConfig
from training.device_windows import DeviceWindows, read_scenes
from training.tasks import WindowTask
from training.trainer import WEIGHTS_NAME, Trainer

READY: Final = "ready"
_MAX_SKIPPED_STEPS: Final = 20
_MAX_TIME_RATIO: Final = 1.4  # of step times, for twice the batch
_AUGMENT: Final = AugmentConfig(camera_dropout=0.0)


class TimedTrainer(Trainer):
    """A trainer whose schedule follows the clock. It averages all weights in a few kernels."""

    def follow(self, share: float) -> None:
        """Set the number of steps of the run from the share of the time that has passed."""
        self.steps = max(self.step + 1, round(self.step / max(share, 1e-3)))

    @torch.no_grad()
    def _update_average(self) -> None:
        if self.average is None:
            return
        decay = min(self.optim.ema, (1 + self.step) / (10 + self.step))
        pairs = list(zip(self.average.state_dict().values(), self.raw.state_dict().values(), strict=True))
        floats = [(mean, value) for mean, value in pairs if mean.is_floating_point()]
        torch._foreach_lerp_([mean for mean, _ in floats], [value for _, value in floats], 1 - decay)
        for mean, value in pairs:
            if not mean.is_floating_point():
                mean.copy_(value)


class TimedRun:
    """A training run: trainer, data and log."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        fabric = Fabric(accelerator=options.device, devices=1)
        torch.manual_seed(options.seed)
        torch.backends.cudnn.benchmark = True
        self.config: SparseBEVConfig = override(sparse_bev_preset(options.preset), options.set)
        model = build_sparse_bev(self.config)
        parts = [name for name in options.init_parts.split(",") if name]
        missing = [] if options.init is None else start_from(options.init, model, self.config, parts)
        for part in (model.backbone, model.neck):
            part.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        optim = OptimConfig(
            lr=options.lr, warmup_steps=options.warmup, backbone_ratio=options.backbone_ratio, ema=options.ema
        )
        half = torch.bfloat16 if fabric.device.type == "cuda" else None
        self.trainer = TimedTrainer(
            fabric, WindowTask(model), optim, options.out, steps=1, seed=options.seed, autocast=half
        )
        self.trainer.start_training()
        self.device, self.windows = fabric.device, 0
        self.log: dict[str, Any] = {
            "preset": options.preset, "batch": options.batch, "hide_future": options.hide_future,
            "seed": options.seed, "lr": options.lr, "init": str(options.init), "init_missing": len(missing),
            "device": torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu", "losses": [],
            "skipped_steps": [],
        }  # fmt: skip

    def run(self) -> None:
        """Train until the given time; write weights and log. The log contains the error of a failed step."""
        options = self.options
        folders = _wait_for_scenes(options.scenes, options.until)
        began = time.time()
        data = DeviceWindows(
            read_scenes(folders, self.device), batch=options.batch, num_past=self.config.num_past,
            num_future=self.config.num_future, augment=_AUGMENT, seed=options.seed,
            hide_future=options.hide_future,
        )  # fmt: skip
        self.log |= {"scenes": len(folders), "seconds_to_read": round(time.time() - began, 1)}
        self._train(data, began)
        self._save(time.time() - began)

    def _train(self, data: DeviceWindows, began: float) -> None:
        options, trainer = self.options, self.trainer
        total, saved, timed = options.until - began, time.time(), time.time()
        seconds: dict[int, float] = {}
        while (now := time.time()) < options.until:
            trainer.follow((now - began) / total)
            found = self._step(data)
            if len(self.log["skipped_steps"]) >= _MAX_SKIPPED_STEPS:
                return
            if found is None:
                continue
            terms, norm = found
            self.windows += data.batch
            every = self.options.log_every
            if trainer.step % every == 0:
                step_s = (time.time() - timed) / every
                self._note(terms, float(norm), time.time() - began, step_s)
                seconds[data.batch] = step_s
                self._choose_batch(data, seconds)
                timed = time.time()
            if time.time() - saved > options.save_s:
                self._save(time.time() - began)
                saved = time.time()

    def _step(self, data: DeviceWindows) -> tuple[dict[str, torch.Tensor], torch.Tensor] | None:
        """Run one step and return its loss terms and gradient norm.

        Return None if the step was skipped, because a value was not finite or because the batch did not fit
        the memory. The batch is halved in the second case.
        """
        trainer = self.trainer
        found = None
        try:
            found = trainer.train_step(data[trainer.step])
        except (FloatingPointError, torch.OutOfMemoryError) as error:
            self.log["skipped_steps"].append(f"step {trainer.step}, batch {data.batch}: {error}"[:200])
            if isinstance(error, torch.OutOfMemoryError):
                data.batch = max(1, data.batch // 2)
                self.options.batch = data.batch
        if found is None and self.device.type == "cuda":
            trainer.optimizer.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
        trainer.step += 1
        return found

    def _choose_batch(self, data: DeviceWindows, seconds: dict[int, float]) -> None:
        """Try half the batch after the first steps, which warm up the device, and keep it if a step is much
        shorter, because more steps train better than larger ones."""
        step, full, half = self.trainer.step, self.options.batch, self.options.batch // 2
        if step == 2 * self.options.log_every and half:
            data.batch = half
        elif step == 4 * self.options.log_every and half in seconds:
            data.batch = full if seconds[full] < _MAX_TIME_RATIO * seconds[half] else half
            self.log["batch_chosen"] = data.batch
            self.log["step_s_by_batch"] = {str(size): round(value, 4) for size, value in seconds.items()}

    def _note(self, terms: dict[str, torch.Tensor], norm: float, seconds: float, step_s: float) -> None:
        last = f"layer{self.config.decoder.num_layers - 1}"
        values = {name: float(value) for name, value in terms.items()}
        entry = {
            "step": self.trainer.step, "seconds": round(seconds, 1), "step_ms": round(1e3 * step_s, 1),
            "windows": self.windows, "total": round(sum(values.values()), 4),
            "class": round(values[f"{last}/class"], 4),
            "box": round(values[f"{last}/box"], 4), "gradient_norm": round(norm, 2),
        }  # fmt: skip
        self.log["losses"].append(entry)
        print(f"{self.options.out.name}: {entry}", flush=True)

    def _save(self, seconds: float) -> None:
        """Write the log and, after the first step, the weights."""
        trainer, out = self.trainer, self.options.out
        self.log |= {"steps": trainer.step, "windows": self.windows, "seconds": round(seconds, 1)}
        if self.device.type == "cuda":
            self.log["peak_memory_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
        out.mkdir(parents=True, exist_ok=True)
        (out / "log.json").write_text(json.dumps(self.log, indent=1) + "\n")
        if trainer.step == 0:
            return
        model = trainer.average if trainer.average is not None else trainer.raw
        notes = {"steps": trainer.step, "windows": self.windows, "seed": self.options.seed}
        try:
            save_weights(out / WEIGHTS_NAME, model.state_dict(), self.config, notes=notes)
        except ValueError as error:
            self.log["error"] = str(error)


def _wait_for_scenes(folder: Path, until: float) -> list[Path]:
    """Wait for the prepared scenes and return their folders. Raise UserError if the time ends first."""
    while not (folder / READY).exists():
        if time.time() > until:
            raise UserError(f"no prepared scenes in {str(folder)!r} in time")
        time.sleep(0.1)
    return sorted(path for path in folder.glob("seed-*") if path.suffix != ".partial")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Bad input is reported in one sentence with exit code 2."""
    parser = argparse.ArgumentParser(
        prog="python -m training.timed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--preset", required=True, help="SparseBEV preset")
    add("--scenes", type=Path, required=True, metavar="DIR", help="prepared scenes")
    add("--until", type=float, required=True, help="time at which training stops, in seconds since 1970")
    add("--out", type=Path, required=True, metavar="DIR", help="folder for weights.safetensors and log.json")
    add("--batch", type=int, default=16, help="windows per step (default 16)")
    add("--hide-future", type=float, default=0.0, help="share of windows whose future is hidden (default 0)")
    add("--init", type=Path, metavar="FILE", help="weights to start from")
    add("--init-parts", default="", help="comma-separated parts of the model to load")
    add("--lr", type=float, default=6e-4)
    add("--warmup", type=int, default=100, help="steps of linear warm-up (default 100)")
    add(
        "--backbone-ratio",
        type=float,
        default=0.5,
        help="learning rate of the backbone, as a share (default 0.5)",
    )
    add("--ema", type=float, default=0.99, help="decay of the averaged weights (default 0.99)")
    add("--seed", type=int, default=0)
    add("--save-s", type=float, default=40.0, help="seconds between two saves (default 40)")
    add("--log-every", type=int, default=10, help="steps between two lines of the log (default 10)")
    add("--device", default="auto", help="auto, cpu or cuda (default auto)")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting of the model")
    options = parser.parse_args(argv)
    try:
        TimedRun(options).run()
    except UserError as error:
        print(f"training: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
