# SPDX-License-Identifier: Apache-2.0
"""Printing and writing of benchmark figures with their environment."""

import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import cv2
import torch

from ftkd_core.json_files import write_json
from ftkd_core.runtime.devices import processor_name


def report(figures: dict[str, Any], path: Path | None, note: str | None = None) -> None:
    """Print figures with the environment and write them to a file if a path is given. note: free text, for
    example other load on the machine."""
    figures = rounded(figures | {"environment": environment(note)})
    print(json.dumps(figures, indent=2))
    if path is not None:
        write_figures(path, figures)


def write_figures(path: Path, figures: dict[str, Any] | list[dict[str, Any]]) -> None:
    """Write figures as JSON, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, figures)


def environment(note: str | None) -> dict[str, Any]:
    """Return date, versions, processor and load of this machine."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "opencv": cv2.__version__,
        "processor": processor_name(),
        "load_average": round(os.getloadavg()[0], 2),
        "note": note,
    }


def rounded(value: Any) -> Any:
    """Round floats to six significant digits."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value
