# SPDX-License-Identifier: Apache-2.0
"""Child processes with log files: wait for their output, report their last lines in errors."""

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
    """A running child process whose output goes to the file `log`."""

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
        """Exit code, or None while the process runs."""
        return self._child.poll()

    def output(self) -> str:
        """Return the output so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def wait_for(self, text: str, timeout_s: float) -> None:
        """Wait until the output contains `text`. Raises UserError if the process ends first or on timeout."""
        deadline = time.monotonic() + timeout_s
        while text not in self.output():
            if self.exit_code is not None:
                raise self.failure(f"ended with exit code {self.exit_code} before it was ready")
            if time.monotonic() > deadline:
                raise self.failure(f"did not get ready within {timeout_s:g} s")
            time.sleep(_POLL_S)

    def wait(self, timeout_s: float) -> None:
        """Wait for exit code 0. Raises UserError for another exit code or on timeout."""
        try:
            code = self._child.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise self.failure(f"did not end within {timeout_s:g} s") from None
        if code != 0:
            raise self.failure(f"ended with exit code {code}")

    def interrupt(self, timeout_s: float) -> None:
        """Send SIGINT, as Ctrl-C does, and wait for exit code 0. Raises UserError as `wait` does."""
        if self.exit_code is None:
            self._child.send_signal(signal.SIGINT)
        self.wait(timeout_s)

    def kill(self) -> None:
        """Kill the process and its own children."""
        if self.exit_code is None:
            os.killpg(self._child.pid, signal.SIGKILL)
            self._child.wait()

    def failure(self, problem: str) -> UserError:
        """Return an error that names the process, the problem and the last lines of output."""
        last = " | ".join(line.strip() for line in self.output().splitlines()[-_TAIL_LINES:] if line.strip())
        return UserError(f"the {self.name} {problem}; last output: {last or 'none'} (full log: {self.log})")


class ProcessGroup:
    """Context manager that kills its child processes on exit."""

    def __init__(self, log_folder: Path, environment: Mapping[str, str]) -> None:
        self._log_folder = log_folder
        self._environment = environment
        self._processes: list[Process] = []
        log_folder.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> "ProcessGroup":
        # A process started in the background of a script ignores SIGINT, and its children would inherit that.
        if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in reversed(self._processes):
            process.kill()

    def start(self, name: str, command: Sequence[str]) -> Process:
        """Start a child process that logs to NAME.log."""
        process = Process(name, command, self._log_folder / f"{name}.log", self._environment)
        self._processes.append(process)
        return process
