# SPDX-License-Identifier: Apache-2.0
"""Progress of `ftkd detect` on disk, so that a killed run is resumed by the next one with the same input.

A hidden folder next to the output holds the detections so far and the memory of the detector. The bag is
written from it at the end, so a resumed run gives the same bytes as one without an interruption.
"""

import fcntl
import io
import json
import shutil
import struct
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ftkd_core.errors import UserError

_ROUND: Final = struct.Struct("<qII")
_STATE: Final = "state.npz"
_ROUNDS: Final = "rounds.bin"
_NOTES: Final = "__notes__"

Arrays = dict[str, NDArray[Any]]


class SavedRound(NamedTuple):
    """Serialized messages of one round."""

    stamp_ns: int
    detections: bytes
    velocities: bytes


class SavedState(NamedTuple):
    """State after some rounds: notes are JSON values, arrays are the memory of the detector."""

    notes: dict[str, Any]
    arrays: Arrays


class DetectionProgress:
    """Detections and detector state of a run; a context manager that keeps the folder after an error.

    key: what the result depends on; a folder of another key is removed. `state`: the last saved state of an
    earlier run, or None. Raises UserError if another process writes the same output.
    """

    def __init__(self, output: Path, key: Mapping[str, Any], *, interval_s: float = 5.0) -> None:
        self._folder = output.with_name(f".{output.name}.progress")
        self._interval_s = interval_s
        self._folder.mkdir(parents=True, exist_ok=True)
        self._lock = (self._folder / "lock").open("wb")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise UserError(f"another process is writing {str(output)!r}; wait for it or stop it") from None
        self.state = self._load(dict(key))
        self._rounds = (self._folder / _ROUNDS).open("r+b" if self.state else "w+b")
        if self.state is not None:
            self._rounds.truncate(self.state.notes["journal_bytes"])
        self._rounds.seek(0, io.SEEK_END)
        self._key = dict(key)
        self._saved_s = time.monotonic()

    def __enter__(self) -> "DetectionProgress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._rounds.close()
        if kind is None or issubclass(kind, UserError):  # such an error would repeat itself
            shutil.rmtree(self._folder, ignore_errors=True)
        self._lock.close()

    def add(self, saved: SavedRound) -> None:
        """Append the messages of one round."""
        self._rounds.write(_ROUND.pack(saved.stamp_ns, len(saved.detections), len(saved.velocities)))
        self._rounds.write(saved.detections)
        self._rounds.write(saved.velocities)

    @property
    def is_due(self) -> bool:
        """Whether the last save is long enough ago."""
        return time.monotonic() - self._saved_s >= self._interval_s

    def save(self, notes: Mapping[str, Any], arrays: Arrays) -> None:
        """Store the state after the rounds added so far."""
        self._rounds.flush()
        whole = {**notes, "key": self._key, "journal_bytes": self._rounds.tell()}
        content = np.frombuffer(json.dumps(whole).encode(), dtype=np.uint8)
        partial = self._folder / f"{_STATE}.partial"
        with partial.open("wb") as file:
            np.savez(file, **{_NOTES: content}, **arrays)
        partial.replace(self._folder / _STATE)
        self._saved_s = time.monotonic()

    def rounds(self) -> Iterator[SavedRound]:
        """Yield all rounds in order."""
        self._rounds.flush()
        self._rounds.seek(0)
        while header := self._rounds.read(_ROUND.size):
            stamp_ns, detections, velocities = _ROUND.unpack(header)
            yield SavedRound(stamp_ns, self._rounds.read(detections), self._rounds.read(velocities))

    def _load(self, key: dict[str, Any]) -> SavedState | None:
        try:
            with np.load(self._folder / _STATE, allow_pickle=False) as content:
                arrays = {name: content[name] for name in content.files}
            notes = json.loads(arrays.pop(_NOTES).tobytes())
            complete = (self._folder / _ROUNDS).stat().st_size >= notes["journal_bytes"]
        except (OSError, ValueError, KeyError, EOFError):  # no state, or one that the kill has damaged
            return None
        return SavedState(notes, arrays) if complete and notes["key"] == json.loads(json.dumps(key)) else None
