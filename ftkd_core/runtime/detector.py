# SPDX-License-Identifier: Apache-2.0
"""Streaming detector: takes a round of camera images, returns objects, keeps the memory inside."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ftkd_core.canonical_cameras import CanonicalCamera
from ftkd_core.classes import our_labels
from ftkd_core.config import DetectorConfig, SparseBEVConfig
from ftkd_core.errors import UserError
from ftkd_core.models.build import StreamingModel, build_streaming
from ftkd_core.runtime.engine_choice import EngineOptions, select_engine
from ftkd_core.runtime.engines import Engine, Rows
from ftkd_core.runtime.thresholds import DEFAULT_THRESHOLD, ScoreThreshold, class_thresholds
from ftkd_core.runtime.virtual_camera import VirtualCameras
from ftkd_core.types import CameraRound, CameraView, ObjectList, PreparedImage
from ftkd_core.weights import (
    SHIPPED,
    load_into,
    read_cameras,
    read_streaming_weights,
    read_thresholds,
    weights_hash,
)


class Detector:
    """`objects = detector.step(camera_round)`; `reset()` starts a new stream. Not thread-safe.

    score_threshold: for all classes or by class name (see `thresholds`). runtime: an engine, or auto, the
    fastest proven one (`engine_choice`); attributes `runtime` and `runtime_reason` hold the choice. exported:
    an ONNX file for the engines that run one; None exports the model once into a cache. threads: of these
    engines (0: the library's choice). training: description of the weights' training.
    camera_model: virtual, as_is or auto (see `virtual_camera`); cameras: how they are seen, and which of them
    are masked and why; assigns_by_yaw: whether the names and the order of the cameras do not matter.
    recommended_thresholds: by class, for users of all scores; not applied here.
    """

    def __init__(
        self,
        model: StreamingModel,
        *,
        weights_name: str,
        device: torch.device,
        score_threshold: ScoreThreshold = DEFAULT_THRESHOLD,
        max_detections: int = 300,
        runtime: str = "auto",
        training: str = "",
        weights_hash: str = "",
        exported: Path | None = None,
        threads: int = 0,
        camera_model: str = "auto",
        canonical_cameras: Sequence[CanonicalCamera] = (),
        recommended_thresholds: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        self._thresholds = class_thresholds(score_threshold, model.config.class_names)
        self._our_labels = np.array(our_labels(model.config.class_names), dtype=np.int64)
        if max_detections < 1:
            raise UserError(f"max_detections {max_detections}: expected at least 1")
        self.model = model.eval().requires_grad_(False)
        self.config: DetectorConfig | SparseBEVConfig = model.config
        self.preset = model.config.preset
        self.channels = model.config.channels
        self.input_size = (model.config.image.width, model.config.image.height)
        self.weights_name = weights_name
        self.training = training
        self.device = device
        self.score_threshold = score_threshold
        self.max_detections = max_detections
        self.cameras = VirtualCameras(
            canonical_cameras, model.config.image, model.config.channels, camera_model
        )
        self.recommended_thresholds = dict(recommended_thresholds)
        self.engine: Engine
        options = EngineOptions(max_detections, weights_hash, exported, threads)
        self.engine, (self.runtime, self.runtime_reason) = select_engine(runtime, model, device, options)
        self._start_ns: int | None = None
        self.assigns_by_yaw = self.cameras.camera_model != "as_is"

    @classmethod
    def from_weights(
        cls,
        weights: str | Path | None = None,
        *,
        preset: str | None = None,
        device: str = "auto",
        score_threshold: ScoreThreshold = DEFAULT_THRESHOLD,
        max_detections: int = 300,
        runtime: str = "auto",
        threads: int = 0,
        camera_model: str = "auto",
    ) -> "Detector":
        """Load a detector from a weights file (None: the shipped one).

        Engines that run an exported graph take FILE.onnx next to FILE.safetensors, if `ftkd export` wrote it;
        otherwise they export the model once into a cache.

        UserError if the file is missing, damaged or of another preset than requested, the device does not
        exist, or an argument is out of range.
        """
        path = SHIPPED if weights is None or str(weights) == "" else Path(weights)
        state, config, notes = read_streaming_weights(path)
        if preset and preset != config.preset:
            raise UserError(f"weights {str(path)!r} belong to preset {config.preset!r}; expected {preset!r}")
        model = build_streaming(config)
        load_into(model, state, str(path))
        exported = path.with_suffix(".onnx")
        return cls(
            model,
            weights_name=path.name,
            device=resolve_device(device),
            score_threshold=score_threshold,
            max_detections=max_detections,
            runtime=runtime,
            training=describe_training(notes),
            weights_hash=weights_hash(path),
            exported=exported if exported.is_file() else None,
            threads=threads,
            camera_model=camera_model,
            canonical_cameras=read_cameras(path),
            recommended_thresholds=read_thresholds(path),
        )

    @property
    def faults(self) -> dict[str, str]:
        """By camera name, why the detector masks it: mount, lens or a repeated view."""
        return dict(self.cameras.faults)

    @property
    def warnings(self) -> list[str]:
        """What harms the detections of all cameras, one sentence each; [] before the first round."""
        return self.cameras.warnings

    def reset(self) -> None:
        """Start a new stream: the next step uses the initial memory of training."""
        self._start_ns = None

    def warm_up(self, image_size: tuple[int, int] | None = None) -> None:
        """Run one empty round, so that the first real one is not slow; resets the detector.

        image_size: width and height of the cameras, if known. On a GPU the first round of an image size
        prepares its scaling, which takes seconds.
        """
        width, height = image_size or self.input_size
        view = CameraView(
            image=np.zeros((height, width, 3), dtype=np.uint8),
            intrinsics=np.array([[width / 2, 0, width / 2], [0, width / 2, height / 2], [0, 0, 1.0]]),
            ego_from_camera=np.eye(4),
            global_from_ego=np.eye(4),
            stamp_ns=0,
        )
        views: tuple[CameraView | None, ...] = (view,) * len(self.channels)
        empty = CameraRound(views=views, reference_stamp_ns=0, global_from_ego=np.eye(4))
        self.engine.start(empty, time_s=0.0, is_first=True)()
        self.reset()

    def step(self, camera_round: CameraRound) -> ObjectList:
        """Return objects in ego at the reference stamp, best first, with scores at or above the threshold of
        their class.

        A camera that is None is masked. UserError for images or calibration that cannot be used; the memory
        is unchanged then.
        """
        return self.start(camera_round)()

    def start(self, camera_round: CameraRound) -> Callable[[], ObjectList]:
        """Start a step and return a function that waits for its objects, so that a GPU works while the caller
        continues. Call it before the next round is started. Errors as in `step`."""
        is_first = self._start_ns is None
        start_ns = camera_round.reference_stamp_ns if self._start_ns is None else self._start_ns
        time_s = (camera_round.reference_stamp_ns - start_ns) * 1e-9
        seen = self.cameras.see(camera_round, leave_to_engine=self.engine.maps_images)
        wait = self.engine.start(seen, time_s=time_s, is_first=is_first)
        self._start_ns = start_ns
        return lambda: self._objects(wait(), camera_round.reference_stamp_ns)

    def state(self) -> tuple[dict[str, Any], dict[str, np.ndarray[Any, Any]]]:
        """Return the state of the stream, as JSON values and arrays, for `restore` in another process."""
        return {"start_ns": self._start_ns}, self.engine.memory()

    def restore(self, notes: Mapping[str, Any], memory: Mapping[str, np.ndarray[Any, Any]]) -> None:
        """Continue a stream from its `state`. First pass a recent image of each camera to `observe`."""
        self._start_ns = notes["start_ns"]
        self.engine.set_memory(memory)

    def observe(self, camera_round: CameraRound) -> None:
        """Note the cameras of a round without detecting objects."""
        self.cameras.see(camera_round)

    def prepare(self, camera: int, image: NDArray[np.uint8]) -> tuple[PreparedImage, ...]:
        """Return network images of a camera's image for `CameraView.prepared`, so that a step does not have
        to compute them; () if nothing can be prepared. camera is the index in the round.

        Other threads may call this. An engine that maps images itself needs none.
        """
        if self.engine.maps_images:
            return ()
        return self.cameras.prepare(camera, image, scale=self.device.type == "cpu")

    def _objects(self, rows: Rows, stamp_ns: int) -> ObjectList:
        labels = rows[:, 10].astype(np.int64)
        keep = rows[:, 9] >= self._thresholds[labels]
        ours = self._our_labels[labels[keep]]
        return ObjectList(boxes=rows[keep, :9], scores=rows[keep, 9], labels=ours, stamp_ns=stamp_ns)


def describe_training(notes: Mapping[str, Any]) -> str:
    """Describe the training of a weights file from its notes, for example "500 steps, distilled by ftkd"."""
    parts = [f"{notes['steps']} steps"] if "steps" in notes else []
    if notes.get("method"):
        parts.append(f"distilled by {notes['method']}")
    if notes.get("format"):
        parts.append(f"imported from {notes['format']}")
    return ", ".join(parts)


def resolve_device(name: str) -> torch.device:
    """Return the named device; `auto` is the first GPU or else the CPU. UserError if the device does not
    exist."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device {name!r}: expected auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device {name!r}: this machine has no usable CUDA GPU; use auto or cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        last = torch.cuda.device_count() - 1
        raise UserError(f"device {name!r}: this machine's last CUDA GPU is cuda:{last}")
    return device
