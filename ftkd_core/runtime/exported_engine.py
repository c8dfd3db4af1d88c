# SPDX-License-Identifier: Apache-2.0
"""The engine that runs an exported detector (`export.py`), whatever library executes its graphs.

The memory passes from round to round as arrays. Host code turns global poses into the motion since the
previous round, in float64."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from ftkd_core.config import DetectorConfig, SparseBEVConfig
from ftkd_core.errors import UserError
from ftkd_core.geometry import invert_rigid
from ftkd_core.runtime.engines import Rows
from ftkd_core.runtime.export import exported_files
from ftkd_core.runtime.header import RigKey, rig_key
from ftkd_core.runtime.preprocess import round_rig, stack_images, visible_tokens
from ftkd_core.runtime.streaming_graph import GEOMETRY, OUTPUTS, RIG_INPUTS
from ftkd_core.types import CameraRig, CameraRound

Arrays = Mapping[str, NDArray[Any]]


class Session(Protocol):
    """A graph that a library has loaded: `notes` is the file's metadata, `shapes` are those of its inputs."""

    notes: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]

    def run(self, outputs: Sequence[str], inputs: Arrays) -> list[NDArray[Any]]:
        """The named outputs."""
        ...


OpenSession = Callable[[Path], Session]


class ExportedEngine:
    """See `engines.Engine`. config: of the model that was exported; weights_hash: of its weights, "" for any.

    Errors: UserError if a file is missing or damaged, or was exported from another preset or other weights.
    """

    maps_images = False

    def __init__(
        self,
        path: Path,
        config: DetectorConfig | SparseBEVConfig,
        open_session: OpenSession,
        *,
        weights_hash: str = "",
    ) -> None:
        files = exported_files(path, config)
        for file in files:
            if not file.is_file():
                raise UserError(f"no file {str(file)!r}; write it with ftkd export --format onnx")
        self.device = torch.device("cpu")
        self.config, self.path = config, path
        self.session, *rig_sessions = (open_session(file) for file in files)
        for session, file in zip((self.session, *rig_sessions), files, strict=True):
            check_notes(session.notes, file, config.preset, weights_hash)
        self._rig_session = rig_sessions[0] if rig_sessions else None
        self._memory_names = [name for name in self.session.shapes if name.startswith("memory_")]
        self._empty = {name: self._zeros(name) for name in self._memory_names}
        self._memory: Arrays = self._empty
        self._geometry: Arrays = {}
        self._rig_key: RigKey | None = None
        self._previous: tuple[NDArray[np.float64], float] | None = None

    def start(self, camera_round: CameraRound, *, time_s: float, is_first: bool) -> Callable[[], Rows]:
        """See `Engine`; the work is done when this returns."""
        config = self.config
        rig = round_rig(camera_round, config.image, config.channels)  # refuses what cannot be used
        rig_inputs = dict(zip(RIG_INPUTS, (value[0].numpy() for value in rig), strict=True))
        if self._rig_session is not None:
            self._encode_rig(self._rig_session, camera_round, rig, rig_inputs)
        pose = camera_round.global_from_ego
        before, time_before = (pose, time_s) if is_first or self._previous is None else self._previous
        inputs: dict[str, NDArray[Any]] = {
            "images": stack_images(camera_round.views, config.image),
            "previous_from_current": (invert_rigid(before) @ pose).astype(np.float32),
            "elapsed_s": np.array([time_s - time_before], dtype=np.float32),
            "is_first": np.array([is_first]),
            **rig_inputs,
            **self._geometry,
            **(self._empty if is_first else self._memory),
        }
        results = self.session.run((*OUTPUTS, *(f"next_{name}" for name in self._memory_names)), inputs)
        boxes, scores, labels = results[: len(OUTPUTS)]
        self._memory = dict(zip(self._memory_names, results[len(OUTPUTS) :], strict=True))
        self._previous = (pose, time_s)
        rows = np.concatenate([boxes, scores[:, None], labels[:, None]], axis=1).astype(np.float64)
        return lambda: rows

    def memory(self) -> dict[str, NDArray[Any]]:
        """See `Engine`."""
        pose, time_s = self._previous or (np.zeros((0, 4)), 0.0)
        return {**self._memory, "previous_pose": pose, "previous_time": np.array(time_s)}

    def set_memory(self, memory: Mapping[str, NDArray[Any]]) -> None:
        """See `Engine`."""
        self._memory = {name: np.array(memory[name]) for name in self._memory_names}
        pose = np.array(memory["previous_pose"])
        self._previous = (pose, float(memory["previous_time"])) if len(pose) else None

    def _encode_rig(
        self, session: Session, camera_round: CameraRound, rig: CameraRig, inputs: Arrays
    ) -> None:
        """Compute the geometry of the image tokens again if the cameras have changed."""
        visible = visible_tokens(camera_round, self.config.image)
        key = rig_key(rig) + (b"" if visible is None else visible.tobytes())
        if key == self._rig_key:
            return
        found = dict(zip(GEOMETRY, session.run(GEOMETRY, inputs), strict=True))
        if visible is not None:
            found["token_mask"] = found["token_mask"] & visible
        self._geometry, self._rig_key = found, key

    def _zeros(self, name: str) -> NDArray[Any]:
        """Return an empty tensor of the memory."""
        kind = np.bool_ if name == "memory_mask" else np.float32
        return np.zeros(self.session.shapes[name], dtype=kind)


def check_notes(notes: Mapping[str, Any], path: Path, preset: str, weights_hash: str) -> None:
    """UserError if a file was exported from another preset or from other weights."""
    if notes["preset"] != preset:
        raise UserError(
            f"{str(path)!r} was exported from preset {notes['preset']!r}; expected {preset!r}: export it "
            "again"
        )
    if weights_hash and notes["weights_hash"] != weights_hash:
        raise UserError(
            f"{str(path)!r} was exported from other weights ({notes['weights_hash']}); expected "
            f"{weights_hash}: export it again"
        )
