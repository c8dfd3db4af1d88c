# SPDX-License-Identifier: Apache-2.0
"""Child processes with log files: waiting for what they say, and errors that carry their last words."""

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final

from ftkd_core.errors import UserError

_POLL_S: Final = 0.05
_TAIL_LINES: Final = 12


class Process:
    """A running child whose output goes to `log`."""

    def __init__(self, name: str, command: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
        self.name = name
        self.log = log
        with log.open("wb") as output:
            self._child = subprocess.Popen(
                list(command),
                stdout=output,
                stderr=subprocess.STDOUT,
                env=dict(environment),
                start_new_session=True,
            )

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        return self._child.poll()

    def said(self) -> str:
        """What it wrote so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def wait_for(self, text: str, timeout_s: float) -> None:
        """Wait until the output holds `text`. Raises UserError where it ends first or takes too long."""
        deadline = time.monotonic() + timeout_s
        while text not in self.said():
            if self.exit_code is not None:
                raise self.failure(f"ended with exit code {self.exit_code} before it was ready")
            if time.monotonic() > deadline:
                raise self.failure(f"did not get ready within {timeout_s:g} s")
            time.sleep(_POLL_S)

    def wait(self, timeout_s: float) -> None:
        """Wait for a successful end. Raises UserError where it fails or takes too long."""
        try:
            code = self._child.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise self.failure(f"did not end within {timeout_s:g} s") from None
        if code != 0:
            raise self.failure(f"ended with exit code {code}")

    def interrupt(self, timeout_s: float) -> None:
        """Ask it to end as Ctrl-C does and wait for a successful end. Raises UserError as `wait`."""
        if self.exit_code is None:
            self._child.send_signal(signal.SIGINT)
        self.wait(timeout_s)

    def kill(self) -> None:
        """End it at once, with its own children."""
        if self.exit_code is None:
            os.killpg(self._child.pid, signal.SIGKILL)
            self._child.wait()

    def failure(self, what: str) -> UserError:
        """An error that names the process, what happened and its last lines."""
        last = " | ".join(line.strip() for line in self.said().splitlines()[-_TAIL_LINES:] if line.strip())
        return UserError(f"the {self.name} {what}; it said: {last or 'nothing'} (all of it in {self.log})")


class ProcessGroup:
    """Children that end with the group, however it ends. Context manager."""

    def __init__(self, log_folder: Path, environment: Mapping[str, str]) -> None:
        self._log_folder = log_folder
        self._environment = environment
        self._processes: list[Process] = []
        log_folder.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> "ProcessGroup":
        # Started in the background of a script, this process ignores Ctrl-C; its children would inherit it.
        if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in reversed(self._processes):
            process.kill()

    def start(self, name: str, command: Sequence[str]) -> Process:
        """Start a child whose log is NAME.log."""
        process = Process(name, command, self._log_folder / f"{name}.log", self._environment)
        self._processes.append(process)
        return process
