# SPDX-License-Identifier: Apache-2.0
"""The detector as a node or an offline runner uses it: a round of cameras in, objects out, memory kept
inside."""

from pathlib import Path

import numpy as np
import torch

from ftkd_core.config import DetectorConfig
from ftkd_core.errors import UserError
from ftkd_core.models.stream_petr import StreamPETR, build_stream_petr, decode
from ftkd_core.runtime.preprocess import round_to_frame
from ftkd_core.types import CameraRound, CameraView, ObjectList
from ftkd_core.weights import SHIPPED, load_into, read_weights


class Detector:
    """`objects = detector.step(camera_round)`; `reset()` starts a new stream. Not thread-safe: one thread
    steps it."""

    def __init__(
        self,
        model: StreamPETR,
        *,
        weights_name: str,
        device: torch.device,
        score_threshold: float = 0.05,
        max_detections: int = 300,
    ) -> None:
        if not 0.0 <= score_threshold <= 1.0:
            raise UserError(f"score_threshold {score_threshold}: expected 0 .. 1")
        if max_detections < 1:
            raise UserError(f"max_detections {max_detections}: expected at least 1")
        self.model = model.to(device).eval().requires_grad_(False)
        self.config: DetectorConfig = model.config
        self.preset = model.config.preset
        self.channels = model.config.channels
        self.input_size = (model.config.image.width, model.config.image.height)
        self.weights_name = weights_name
        self.device = device
        self.score_threshold = score_threshold
        self.max_detections = max_detections
        self._memory = model.start_memory()
        self._start_ns: int | None = None

    @classmethod
    def from_weights(
        cls,
        weights: str | Path | None = None,
        *,
        preset: str | None = None,
        device: str = "auto",
        score_threshold: float = 0.05,
        max_detections: int = 300,
    ) -> "Detector":
        """A detector from a weights file (None: the shipped one).

        UserError where the file is missing, damaged or of another preset than asked for, or the device is
        not there.
        """
        path = SHIPPED if weights is None or str(weights) == "" else Path(weights)
        state, config, _ = read_weights(path)
        if preset and preset != config.preset:
            raise UserError(f"weights {str(path)!r} are of preset {config.preset!r}; expected {preset!r}")
        model = build_stream_petr(config)
        load_into(model, state, str(path))
        return cls(
            model,
            weights_name=path.name,
            device=resolve_device(device),
            score_threshold=score_threshold,
            max_detections=max_detections,
        )

    def reset(self) -> None:
        """Forget the stream: the next step starts from the trained first state."""
        self._start_ns = None

    def warm_up(self) -> None:
        """Run one empty round, so that the first real one is not slow; leaves the detector reset."""
        width, height = self.input_size
        view = CameraView(
            image=np.zeros((height, width, 3), dtype=np.uint8),
            intrinsics=np.array([[width / 2, 0, width / 2], [0, width / 2, height / 2], [0, 0, 1.0]]),
            ego_from_camera=np.eye(4),
            global_from_ego=np.eye(4),
            stamp_ns=0,
        )
        views: tuple[CameraView | None, ...] = (view,) * len(self.channels)
        self.step(CameraRound(views=views, reference_stamp_ns=0, global_from_ego=np.eye(4)))
        self.reset()

    @torch.inference_mode()
    def step(self, camera_round: CameraRound) -> ObjectList:
        """Objects in ego at the reference stamp, best first, scores at or above the threshold.

        A camera that is None is masked. Errors: UserError for images or calibration that cannot be used;
        the stream's memory is untouched then.
        """
        is_first = self._start_ns is None
        start_ns = camera_round.reference_stamp_ns if self._start_ns is None else self._start_ns
        frame = round_to_frame(
            camera_round,
            self.config.image,
            self.channels,
            time_s=(camera_round.reference_stamp_ns - start_ns) * 1e-9,
            is_first=is_first,
            device=self.device,
        )
        predictions, self._memory = self.model(frame, self._memory)
        self._start_ns = start_ns
        detections = decode(predictions, self.max_detections)
        scores = detections.scores[0].double().cpu().numpy()
        keep = scores >= self.score_threshold
        return ObjectList(
            boxes=detections.boxes[0].double().cpu().numpy()[keep],
            scores=scores[keep],
            labels=detections.labels[0].cpu().numpy()[keep],
            stamp_ns=camera_round.reference_stamp_ns,
        )


def resolve_device(name: str) -> torch.device:
    """`auto` is the first GPU or else the CPU; UserError where the named device is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device {name!r}: expected auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device {name!r}: this machine has no usable CUDA GPU; use auto or cpu")
    return device
