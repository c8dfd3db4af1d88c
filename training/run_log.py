# SPDX-License-Identifier: Apache-2.0
"""Logs of a training run: TensorBoard, `log.jsonl`, `log.csv`, and optionally Weights & Biases or MLflow.

The files are appended to. A run that resumes first removes the lines after the step at which it resumes.
"""

import csv
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, Final, TypeVar, cast

from lightning_fabric.loggers.logger import Logger
from torch.utils.tensorboard import SummaryWriter

from ftkd_core.errors import UserError

JSON_NAME: Final = "log.jsonl"
CSV_NAME: Final = "log.csv"
ItemT = TypeVar("ItemT")
LOGGERS: Final = ("wandb", "mlflow")


def make_logger(name: str, folder: Path) -> Logger:
    """Return a logger of Fabric's interface by name. Raise UserError if its package is not installed."""
    try:
        if name == "wandb":
            module = import_module("wandb.integration.lightning.fabric")
            return cast(Logger, module.WandbLogger(name=folder.name, save_dir=str(folder), resume="allow"))
        if name == "mlflow":
            module = import_module("pytorch_lightning.loggers")
            made = module.MLFlowLogger(run_name=folder.name, save_dir=str(folder / "mlruns"))
            return cast(Logger, made)
    except ModuleNotFoundError as error:
        packages = {"wandb": "wandb", "mlflow": "mlflow pytorch-lightning"}[name]
        raise UserError(
            f"--logger {name}: {error.name} is not installed; run `pip install {packages}`, or leave it out"
        ) from None
    raise UserError(f"--logger {name!r}: expected one of {', '.join(LOGGERS)}")


class RunLog:
    """Writes the values of steps and validations of one run. Only the first process makes one."""

    def __init__(self, folder: Path, loggers: Sequence[Logger] = ()) -> None:
        self.folder, self.loggers = folder, tuple(loggers)
        self.board = SummaryWriter(folder / "tensorboard")

    def resume(self, step: int) -> None:
        """Remove the lines of later steps."""
        for name in (JSON_NAME, CSV_NAME):
            path = self.folder / name
            if not path.exists():
                continue
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if _step_of(line, name) <= step]
            path.write_text("".join(kept), encoding="utf-8")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Log the values of a training step."""
        for name, value in values.items():
            self.board.add_scalar(name, value, step)
        row = {"step": step, "time": round(time.time(), 1), **values}
        self._append_json({"kind": "train", **row})
        self._append_csv(row)
        for logger in self.loggers:
            logger.log_metrics(dict(values), step)

    def write_validation(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Log the metrics of a validation; numbers also go to TensorBoard and the loggers."""
        numbers = {
            f"validation/{name}": float(value)
            for name, value in metrics.items()
            if isinstance(value, (int, float)) and not isinstance(value, bool)
        }
        for name, value in numbers.items():
            self.board.add_scalar(name, value, step)
        self._append_json({"kind": "validation", "step": step, "time": round(time.time(), 1), **metrics})
        for logger in self.loggers:
            logger.log_metrics(numbers, step)

    def close(self) -> None:
        """Flush and close all logs."""
        self.board.close()
        for logger in self.loggers:
            logger.finalize("success")

    def _append_json(self, row: Mapping[str, Any]) -> None:
        with (self.folder / JSON_NAME).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def _append_csv(self, row: Mapping[str, Any]) -> None:
        """Append a row under the columns of the file; other names get a new header line."""
        path = self.folder / CSV_NAME
        columns = list(row)
        last_header: list[str] | None = None
        if path.exists():
            with path.open(encoding="utf-8", newline="") as file:
                last_header = next((line for line in csv.reader(file) if line[:1] == ["step"]), None)
        with path.open("a", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, last_header or columns, extrasaction="ignore")
            if last_header is None:
                writer.writeheader()
            writer.writerow(row)


def _step_of(line: str, name: str) -> int:
    """Return the step of a line of a log; 0 for the header of a CSV file."""
    if name == JSON_NAME:
        return int(json.loads(line)["step"])
    first = line.split(",", maxsplit=1)[0]
    return int(first) if first.isdigit() else 0


class Throughput:
    """Samples per second, share of the time spent waiting for data, and seconds left, since the start of this
    process, without validations."""

    def __init__(self, samples_per_step: int) -> None:
        self.samples_per_step = samples_per_step
        self.steps, self.waited, self.pauses = 0, 0.0, 0.0
        self.began = time.monotonic()

    def timed(self, batches: Iterable[ItemT]) -> Iterator[ItemT]:
        """Yield the batches of a loader; count them and the time spent waiting for them."""
        asked = time.monotonic()
        for batch in batches:
            self.waited += time.monotonic() - asked
            self.steps += 1
            yield batch
            asked = time.monotonic()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out the time spent inside."""
        began = time.monotonic()
        yield
        self.pauses += time.monotonic() - began

    def figures(self, steps_left: int) -> dict[str, float]:
        """Return the figures after at least one step."""
        seconds = max(time.monotonic() - self.began - self.pauses, 1e-9)
        return {
            "samples_per_s": self.steps * self.samples_per_step / seconds,
            "load_share": min(1.0, self.waited / seconds),
            "seconds_left": steps_left * seconds / self.steps,
        }
