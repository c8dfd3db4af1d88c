# SPDX-License-Identifier: Apache-2.0
"""What a figure was made with: device, commit, versions, day."""

import platform
import subprocess
import time

import torch

from ftkd_core.runtime.devices import device_name


def made_with(device: torch.device) -> dict[str, str]:
    """Notes for a file of figures."""
    return {
        "device": device_name(device), "commit": commit(), "torch": torch.__version__,
        "python": platform.python_version(), "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip


def commit() -> str:
    """The commit of the working directory, `-dirty` where its tracked files differ from it; `unknown` where
    there is none."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]  # by the commit's name, not by a tag
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        found = ""
    return found or "unknown"
