# SPDX-License-Identifier: Apache-2.0
"""What the prepared GPU runs share: their options, and how they end processes."""

import argparse
import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch

from ftkd_core.errors import UserError


def base_parser(
    program: str, description: str | None, *, minutes: float, out: str
) -> argparse.ArgumentParser:
    """Return a parser with --minutes, --out and --rehearse; `out` says what the folder is for."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {program}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--minutes", type=float, default=minutes, help="minutes of the whole run (default %(default)g)")
    add("--out", type=Path, required=True, metavar="DIR", help=f"folder for {out}")
    add("--rehearse", action="store_true", help="small sizes on a CPU, to find errors before a GPU run")
    return parser


def choose(option: str, text: str, names: Sequence[str], minutes: float) -> list[str]:
    """Return the names in comma-separated text, all if it is empty.

    Errors: UserError for an unknown name, or minutes that are not positive.
    """
    chosen = [name for name in text.split(",") if name] or list(names)
    unknown = sorted(set(chosen) - set(names))
    if unknown:
        raise UserError(f"{option} {', '.join(unknown)}: expected some of {', '.join(names)}")
    if not minutes > 0:
        raise UserError(f"--minutes {minutes}: expected more than 0")
    return chosen


def require_gpu(*, rehearse: bool) -> None:
    """Raise UserError without a CUDA GPU, unless the run is a rehearsal."""
    if not (rehearse or torch.cuda.is_available()):
        raise UserError("no CUDA GPU; give --rehearse to try the run on a CPU")


def end(process: "subprocess.Popen[bytes]") -> None:
    """Kill a process and all that it started, if it still runs."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
