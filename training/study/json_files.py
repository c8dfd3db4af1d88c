# SPDX-License-Identifier: Apache-2.0
"""JSON files of a study: written atomically, read with one clear error."""

import json
import os
from pathlib import Path
from typing import Any

from ftkd_core.errors import UserError


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON. The file is replaced as a whole, so a killed process never truncates it."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def read_json(path: Path, remedy: str) -> Any:
    """Return the value of a JSON file. Raise UserError, which ends with the remedy, if it is missing or
    damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{str(path)!r} cannot be read ({error}); {remedy}") from None
