# SPDX-License-Identifier: Apache-2.0
"""Child processes of the node benchmarks: the simulated rig and the node, with DDS settings and memory."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from ftkd_core.errors import UserError
from ftkd_ros.launch_settings import dds_environment

ROOT: Final = Path(__file__).resolve().parents[1]
TRANSPORTS: Final = ("shared memory 128 MiB", "default")


def child_environment(transport: str) -> dict[str, str]:
    """Return the environment of the children, and set the DDS variables of this process as well."""
    chosen = dds_environment(ROOT / "config", os.environ) if transport == TRANSPORTS[0] else {}
    os.environ.update(chosen)
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}


class Rig:
    """The process of `benchmarks.camera_rig`."""

    def __init__(self, environment: Mapping[str, str], arguments: Sequence[str] = ()) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.camera_rig", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=dict(environment),
        )

    def set(self, **changes: Any) -> int:
        """Change fields of `Faults`; return the time (ns) from which they hold."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps({"set": changes}) + "\n")
        self._process.stdin.flush()
        return int(json.loads(self._process.stdout.readline())["time_ns"])

    def finish(self) -> list[list[int]]:
        """Stop the rig; return the stamps of each round."""
        output, _ = self._process.communicate(timeout=60)
        return [list(stamps) for stamps in json.loads(output.splitlines()[-1])["rounds"]]

    def kill(self) -> None:
        """End the process at once."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()


class NodeProcess:
    """The process of `benchmarks.stub_node`; its output goes to `log`."""

    def __init__(self, environment: Mapping[str, str], log: Path, parameters: Mapping[str, object]) -> None:
        given = [text for name, value in parameters.items() for text in ("-p", f"{name}:={value}")]
        self._output = log.open("w", encoding="utf-8")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.stub_node", "--ros-args", *given],
            stdout=self._output,
            stderr=subprocess.STDOUT,
            env=dict(environment),
        )

    @property
    def is_running(self) -> bool:
        """Return True until the process has ended."""
        return self._process.poll() is None

    def rss_mb(self) -> float:
        """Return the resident memory of the process without shared memory, in MB."""
        fields = Path(f"/proc/{self._process.pid}/statm").read_text(encoding="ascii").split()
        return (int(fields[1]) - int(fields[2])) * os.sysconf("SC_PAGE_SIZE") / 1e6

    def stop(self) -> None:
        """Send SIGINT and wait for exit code 0. Raises UserError for another code."""
        if self.is_running:
            self._process.send_signal(signal.SIGINT)
        code = self._process.wait(timeout=30)
        self._output.close()
        if code != 0:
            raise UserError(f"the node ended with exit code {code}; see {self._output.name}")

    def kill(self) -> None:
        """End the process at once."""
        if self.is_running:
            self._process.kill()
            self._process.wait()
        self._output.close()


class MemoryWatch:
    """Samples the memory of a node once per second."""

    def __init__(self, node: NodeProcess) -> None:
        self.samples_mb: list[float] = []
        self._node = node
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stopped.wait(1.0) and self._node.is_running:
            self.samples_mb.append(self._node.rss_mb())

    def growth_mb(self, share: float) -> float:
        """Return the growth over the last `share` of the time: difference of the minima of two tenths.

        The memory rises and falls by decoded images; a leak raises the minimum.
        """
        self._stopped.set()
        self._thread.join(5)
        count = len(self.samples_mb)
        start, width = int(count * (1 - share)), max(1, count // 10)
        if count < 3:
            raise UserError(f"the node ran for {count} s only; give more seconds")
        return round(min(self.samples_mb[-width:]) - min(self.samples_mb[start : start + width]), 2)


def wait_until(condition: Any, timeout_s: float, what: str) -> None:
    """Wait for a condition; raise UserError with `what` after the timeout."""
    end = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() >= end:
            raise UserError(f"{what} after {timeout_s:g} s")
        time.sleep(0.02)
