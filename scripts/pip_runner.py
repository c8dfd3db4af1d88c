# SPDX-License-Identifier: Apache-2.0
"""Run pip: full output to a log file, large downloads on the terminal, a failure as one sentence."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

from scripts.checks import NEEDED_GIGABYTES_CUDA, SetUpError, clean_environment

LARGE_DOWNLOAD = re.compile(r"Downloading (?P<file>\S+).*\((?P<size>[\d.]+ (?P<unit>[MG])B)\)")
SHOWN_MEGABYTES = 50
NO_ROOM = re.compile(r"No space left on device|Errno 28|Disk quota exceeded")
NO_NETWORK = re.compile(
    r"NewConnectionError|NameResolutionError|ConnectTimeoutError|ReadTimeoutError|Max retries exceeded"
    r"|Temporary failure in name resolution|Network is unreachable|SSLCertVerificationError|ProxyError"
)


class PipRunner:
    """pip of one virtual environment, with one log file."""

    def __init__(self, python: Path, log: Path) -> None:
        self.python = python
        self.log = log

    def install(self, *arguments: str) -> None:
        """Run `pip install` with these arguments; SetUpError gives the reason of a failure."""
        options = ["--no-input", "--disable-pip-version-check", "--no-compile", "--progress-bar", "off"]
        command = [str(self.python), "-m", "pip", "install", *options, *arguments]
        self.log.parent.mkdir(parents=True, exist_ok=True)
        lines: list[str] = []
        with open(self.log, "a") as log:
            log.write(f"$ {' '.join(command)}\n")
            with subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
                stdin=subprocess.DEVNULL, env=clean_environment(os.environ),
            ) as process:  # fmt: skip
                assert process.stdout is not None
                for line in process.stdout:
                    log.write(line)
                    lines.append(line.rstrip())
                    print_large_download(line)
        if process.returncode:
            raise SetUpError(f"{reason(lines)} The full output is in {self.log}.")


def print_large_download(line: str) -> None:
    """Print the name and size of a download of at least 50 MB, to explain the wait."""
    download = LARGE_DOWNLOAD.search(line)
    if not download:
        return
    megabytes = float(download["size"].split()[0]) * (1000 if download["unit"] == "G" else 1)
    if megabytes >= SHOWN_MEGABYTES:
        print(f"set-up:       downloading {Path(download['file']).name} ({download['size']})", flush=True)


def reason(lines: list[str]) -> str:
    """Return why pip failed, from its output, and the remedy, in one sentence."""
    text = "\n".join(lines)
    if NO_ROOM.search(text):
        return (
            "the disk filled up while pip was installing; make room (the CUDA build of PyTorch needs "
            f"{NEEDED_GIGABYTES_CUDA} GB) and run the same command again."
        )
    if NO_NETWORK.search(text):
        return (
            "pip could not reach its package index; check the network and pip's settings (`pip config list`) "
            "and run the same command again."
        )
    errors = [line for line in lines if line.startswith("ERROR:")]
    last = (errors or [line for line in lines if line.strip()] or ["it printed nothing"])[-1]
    return f"pip failed: {last.removeprefix('ERROR:').strip()[:300].rstrip('.')}."
