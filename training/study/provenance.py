# SPDX-License-Identifier: Apache-2.0
"""Provenance of a result: device, commit, versions and date."""

import platform
import subprocess
import time
from pathlib import Path

import torch

from ftkd_core.runtime.devices import device_name


def made_with(device: torch.device) -> dict[str, str]:
    """Return provenance entries for a result file."""
    return {
        "device": device_name(device), "commit": commit(), "torch": torch.__version__,
        "python": platform.python_version(), "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip


def commit(folder: Path | None = None) -> str:
    """Return the commit of a folder (default: the working directory), with `-dirty` if tracked files differ
    from it; `unknown` outside a repository."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]  # the commit's hash, not a tag
    try:
        found = subprocess.run(
            command, capture_output=True, text=True, check=False, cwd=folder
        ).stdout.strip()
    except OSError:
        found = ""
    return found or "unknown"
