# SPDX-License-Identifier: Apache-2.0
"""Hidden folder in which an output is written before it gets its name.

A killed process leaves such a folder. It is locked while its process lives, so the next run of the same
output removes the folders of processes that have ended, and no others.
"""

import fcntl
import re
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import IO, Final
from uuid import uuid4

_LOCK_NAME: Final = ".lock"
_UNLOCKED_FOR_S: Final = 60.0
"""Age from which a folder without a lock file counts as left behind; its creation takes milliseconds."""


class UnfinishedFolder:
    """A new hidden folder next to `output`; write to `content`, then `publish` or `discard`.

    Removes the folders that killed runs of the same output left behind. Raises OSError if the folder cannot
    be created.
    """

    def __init__(self, output: Path) -> None:
        self.output = output
        self.path = output.with_name(f".{output.name}-{uuid4().hex[:8]}")
        self.content = self.path / output.name
        remove_leftovers(output)
        self.path.mkdir(parents=True)
        self._lock = (self.path / _LOCK_NAME).open("wb")
        _try_lock(self._lock)

    def publish(self) -> None:
        """Rename the content to the output. Raises OSError if the output is a folder that is not empty."""
        self.content.rename(self.output)
        self.discard()

    def discard(self) -> None:
        """Remove the hidden folder and its content."""
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()


def remove_leftovers(output: Path) -> list[Path]:
    """Remove the hidden folders of an output whose process has ended; return them."""
    name = re.compile(rf"\.{re.escape(output.name)}-[0-9a-f]{{8}}")
    parent = output.parent
    found = [entry for entry in parent.iterdir() if name.fullmatch(entry.name)] if parent.is_dir() else []
    removed = [entry for entry in found if entry.is_dir() and _is_left_behind(entry)]
    for entry in removed:
        shutil.rmtree(entry, ignore_errors=True)
    return removed


def _is_left_behind(folder: Path) -> bool:
    try:
        with (folder / _LOCK_NAME).open("rb") as lock:
            return _try_lock(lock)
    except FileNotFoundError:
        with suppress(OSError):  # the owner may remove the folder at this moment
            return time.time() - folder.stat().st_mtime > _UNLOCKED_FOR_S
    except OSError:  # not ours to read
        pass
    return False


def _try_lock(file: IO[bytes]) -> bool:
    """Lock an open file; return False if another process holds the lock or the file system has no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
