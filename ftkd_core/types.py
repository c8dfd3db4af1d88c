# SPDX-License-Identifier: Apache-2.0
"""What flows through the system.

NamedTuples of tensors (inside the network: safe for `torch.compile` and CUDA graphs) and frozen dataclasses
of numpy arrays (at the edges: images as they arrive, detections as they leave).

Symbols: B batch, T frames, N cameras, H/W image size, Q queries, G ground-truth slots, M boxes.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class CameraRig(NamedTuple):
    """Geometry of N cameras in pixels of the network input, ego motion between exposures already accounted
    for.

    intrinsics (B, N, 3, 3); ego_from_camera (B, N, 4, 4), ego being the vehicle at the *reference* stamp
    and camera the optical frame at its own exposure; mask (B, N) bool, False where a camera is missing.
    """

    intrinsics: Tensor
    ego_from_camera: Tensor
    mask: Tensor


class Frame(NamedTuple):
    """One round of cameras as the network sees it.

    images (B, N, 3, H, W) normalised; rig; global_from_ego (B, 4, 4) float64 at the reference stamp; time
    (B,) float64 seconds relative to the stream; is_first (B,) bool, True where a stream starts and its
    memory must be reset.
    """

    images: Tensor
    rig: CameraRig
    global_from_ego: Tensor
    time: Tensor
    is_first: Tensor


class FrameWindow(NamedTuple):
    """T frames around the current one, in the order current, past 1, 2, ... (newest first), future 1, 2, ...

    images (B, T, N, 3, H, W) normalised; rig as `CameraRig` with shapes (B, T, N, ...), ego being the vehicle
    at the *current* reference stamp for all frames; time (B, T) float32 seconds relative to the current
    frame, negative in the past. Where a scene ends, its last frame is repeated, time included.
    """

    images: Tensor
    rig: CameraRig
    time: Tensor


class Targets(NamedTuple):
    """Ground truth of one frame, padded to G slots.

    boxes (B, G, 9) house form in ego at the reference stamp (velocity may be nan where unknown); labels (B,
    G) int64, places in CLASS_NAMES until `losses.answerable` makes them a model's; mask (B, G) bool, True for
    real objects. The 2-D part, for the training-only auxiliary head, is per camera: boxes_2d (B, N, G, 4)
    `[x1, y1, x2, y2]` network pixels clipped to the image, centers_2d (B, N, G, 2) projected 3-D centre,
    depths (B, N, G) metres along the optical axis, mask_2d (B, N, G) bool, True where object g is seen.
    """

    boxes: Tensor
    labels: Tensor
    mask: Tensor
    boxes_2d: Tensor
    centers_2d: Tensor
    depths: Tensor
    mask_2d: Tensor


def pad_targets(targets: Targets, slots: int) -> Targets:
    """The same targets with G = slots; padding is masked, its boxes have unit sizes so that their
    logarithms stay finite."""
    padded = {}
    for name, value in zip(Targets._fields, targets, strict=True):
        axis = 1 if name in ("boxes", "labels", "mask") else 2
        shape = list(value.shape)
        shape[axis] = slots - shape[axis]
        padded[name] = torch.cat([value, value.new_full(shape, 1 if name == "boxes" else 0)], dim=axis)
    return Targets(**padded)


class DenoisingQueries(NamedTuple):
    """Noisy copies of the ground truth, from which a decoder in training must recover the boxes (DN-DETR).

    R = groups * G. points_ego (B, R, 3) noisy centres in metres; target (B, R) index of the ground truth;
    positive (B, R) bool, True if the noise is small enough for the box to be recovered; real (B, R) bool,
    False for padding; codes (B, R, 10) of the true boxes, velocity 0 if unknown, and labels (B, R) int64,
    half of them random: SparseBEV's denoising queries start from both, StreamPETR's from the centres alone.
    """

    points_ego: Tensor
    target: Tensor
    positive: Tensor
    real: Tensor
    groups: int
    codes: Tensor
    labels: Tensor


class Detections(NamedTuple):
    """Decoded answer of the network, best first: boxes (B, Q, 9) in ego, scores (B, Q) in 0..1, labels (B,
    Q) int64."""

    boxes: Tensor
    scores: Tensor
    labels: Tensor


@dataclass(frozen=True, kw_only=True)
class CameraView:
    """One camera image with its geometry, as it arrived.

    image (H, W, 3) uint8 RGB; intrinsics (3, 3) pixels of that image; ego_from_camera (4, 4), the extrinsic
    calibration; global_from_ego (4, 4), the vehicle at the moment of exposure; stamp_ns, that moment.
    """

    image: NDArray[np.uint8]
    intrinsics: NDArray[np.float64]
    ego_from_camera: NDArray[np.float64]
    global_from_ego: NDArray[np.float64]
    stamp_ns: int


@dataclass(frozen=True, kw_only=True)
class CameraRound:
    """One round of N cameras in the order of `classes.CAMERA_CHANNELS` (or of the node's parameter); None
    where missing.

    reference_stamp_ns and global_from_ego (4, 4) say for which moment, and where, the detections shall be
    given.
    """

    views: tuple[CameraView | None, ...]
    reference_stamp_ns: int
    global_from_ego: NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class ObjectList:
    """Boxes at one moment: what a detector gives and what ground truth is.

    boxes (M, 9) float64 house form in ego (base_link) at stamp_ns; scores (M,) (1 for ground truth); labels
    (M,) int64 index into CLASS_NAMES; ids, one string an object ("" where unknown).
    """

    boxes: NDArray[np.float64]
    scores: NDArray[np.float64]
    labels: NDArray[np.int64]
    stamp_ns: int
    ids: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        count = len(self.boxes)
        if self.boxes.shape != (count, 9) or self.scores.shape != (count,) or self.labels.shape != (count,):
            raise ValueError(
                f"object list of shapes {self.boxes.shape}, {self.scores.shape}, {self.labels.shape}; "
                "expected (M, 9), (M,), (M,)"
            )
        if self.ids and len(self.ids) != count:
            raise ValueError(f"{len(self.ids)} ids for {count} boxes; expected one each, or none")

    def select(self, keep: NDArray[Any]) -> "ObjectList":
        """The objects chosen by a boolean mask or index array."""
        indices = np.arange(len(self.boxes))[keep]
        ids = tuple(self.ids[i] for i in indices) if self.ids else ()
        return ObjectList(
            boxes=self.boxes[indices],
            scores=self.scores[indices],
            labels=self.labels[indices],
            stamp_ns=self.stamp_ns,
            ids=ids,
        )
