# SPDX-License-Identifier: Apache-2.0
"""Stop a training run when the system asks for it: SIGTERM, which Slurm sends before it takes a node."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Final

import torch
from lightning_fabric import Fabric

EXIT_CODE: Final = 128 + signal.SIGTERM
"""Exit code of a run that was stopped by SIGTERM and has saved a checkpoint."""


class StoppedError(Exception):
    """Training was stopped by SIGTERM after a checkpoint was written."""


class StopRequest:
    """Becomes true when any process of the run has received SIGTERM."""

    def __init__(self, fabric: Fabric) -> None:
        self.fabric, self._received = fabric, False

    @contextmanager
    def listen(self) -> Iterator[None]:
        """Record SIGTERM instead of ending the process. Outside the main thread, signals are not recorded."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before: Any = signal.signal(signal.SIGTERM, self._record)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def _record(self, _number: int, _frame: FrameType | None) -> None:
        self._received = True

    def __bool__(self) -> bool:
        """Return whether any process has received the signal. All processes must ask at the same step."""
        if self.fabric.world_size == 1:
            return self._received
        flag = torch.tensor(float(self._received), device=self.fabric.device)
        return bool(self.fabric.all_reduce(flag, reduce_op="sum"))
