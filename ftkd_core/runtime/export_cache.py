# SPDX-License-Identifier: Apache-2.0
"""Cache of exported models, for engines that run a file (`exported_engine.py`).

The folder holds the `KEPT` exports that were used last; an older one is removed when a new one is written.
One process writes at a time. Nothing that an interrupted export leaves behind is used or kept.
"""

import hashlib
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import torch
from filelock import FileLock, Timeout

from ftkd_core.errors import UserError
from ftkd_core.models.build import StreamingModel
from ftkd_core.runtime.export import GRAPH_VERSION, export_onnx, exported_files, rig_path

KEPT: Final = 4
"""Exports in the cache. One of `tiny` has 3 MB, one of a ResNet-50 detector 140 MB."""
WAIT_S: Final = 600.0
"""How long a process waits for another one that is exporting."""
_LOCK: Final = "export.lock"
_log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Return the folder of the cache: FTKD_CACHE, or `ftkd` in the user's cache folder."""
    given = os.environ.get("FTKD_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ftkd"


def cached_export(model: StreamingModel, weights_hash: str, max_detections: int) -> Path:
    """Return the model's ONNX file in the cache; export it first if it is missing (about half a minute).

    Errors: UserError if the folder cannot be written, or another process has been exporting for WAIT_S.
    """
    key = f"{weights_hash}-{max_detections}-{GRAPH_VERSION}-{torch.__version__}"
    name = f"{model.config.preset}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.onnx"
    path = cache_folder() / name
    if not _is_complete(path, model):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(path.parent):
                if not _is_complete(path, model):  # another process may have written it in the meantime
                    _write(model, path, weights_hash, max_detections)
        except OSError as error:
            raise UserError(
                f"cannot export {model.config.preset} into {str(path.parent)!r}: {error.strerror or error}; "
                "make room there, or name another folder with FTKD_CACHE"
            ) from None
    _mark_as_used(path)
    return path


def discard(path: Path) -> None:
    """Remove a cached export that cannot be read, so that the next call writes it again."""
    for file in (path, rig_path(path)):
        file.unlink(missing_ok=True)


def _write(model: StreamingModel, path: Path, weights_hash: str, max_detections: int) -> None:
    preset = model.config.preset
    for leftover in path.parent.glob("*.partial"):  # of an export that was interrupted: we hold the lock
        leftover.unlink(missing_ok=True)
    _log.warning("exporting %s to %s, once; this takes about half a minute", preset, path)
    export_onnx(model, path, weights_hash=weights_hash, max_detections=max_detections, replace=True)
    exports = [file for file in path.parent.glob("*.onnx") if not file.name.endswith(".rig.onnx")]
    others = sorted((file for file in exports if file != path), key=_last_use, reverse=True)
    for old in others[KEPT - 1 :]:
        _log.warning("removed %s from the cache: %d exports were used since", old.name, KEPT)
        discard(old)


def _is_complete(path: Path, model: StreamingModel) -> bool:
    return all(file.is_file() for file in exported_files(path, model.config))


def _mark_as_used(path: Path) -> None:
    """Set the file's time, by which `_write` chooses what to remove."""
    try:
        os.utime(path)
    except OSError as error:  # a read-only cache that somebody else fills
        _log.debug("cannot mark %s as used: %s", path, error)


def _last_use(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock of the cache. The lock ends with its process, and its file is removed while it is held,
    so none stays behind; a process that waits for a removed file opens a new one."""
    lock = FileLock(folder / _LOCK, timeout=WAIT_S)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(
            f"another process has been exporting into {str(folder)!r} for more than {WAIT_S / 60:g} minutes; "
            "end it, or name another folder with FTKD_CACHE"
        ) from None
    try:
        yield
    finally:
        (folder / _LOCK).unlink(missing_ok=True)
        lock.release()
