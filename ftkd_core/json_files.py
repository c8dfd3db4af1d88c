# SPDX-License-Identifier: Apache-2.0
"""Atomic JSON files."""

import json
import uuid
from pathlib import Path


def write_json(path: Path, value: object, *, indent: int = 2, allow_nan: bool = True) -> None:
    """Write a value as JSON through a temporary file in the same folder, so that a reader never sees a part.

    A pipe or a device is written directly. Raises OSError if the file cannot be written and ValueError for a
    number that is not finite unless allow_nan is True.
    """
    text = json.dumps(value, indent=indent, allow_nan=allow_nan) + "\n"
    target = path.resolve()
    if target.exists() and not target.is_file():
        target.write_text(text, encoding="utf-8")
        return
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
