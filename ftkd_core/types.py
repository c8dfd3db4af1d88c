# SPDX-License-Identifier: Apache-2.0
"""Data types that are passed between modules.

NamedTuples of tensors inside the network (compatible with `torch.compile` and CUDA graphs), frozen
dataclasses of numpy arrays outside. Symbols: B batch, T frames, N cameras, H/W image size, Q queries, R
denoising queries, G ground-truth slots, M boxes.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ftkd_core.lens import Lens

if TYPE_CHECKING:
    from ftkd_core.runtime.remap import ImageRemap


class CameraRig(NamedTuple):
    """Geometry of N cameras, compensated for ego motion between exposures.

    intrinsics (B, N, 3, 3) in pixels of the network input; ego_from_camera (B, N, 4, 4) from the optical
    frame of the camera at its own exposure to the ego frame at the *reference* stamp; mask (B, N) bool, False
    for missing cameras.
    """

    intrinsics: Tensor
    ego_from_camera: Tensor
    mask: Tensor


class Frame(NamedTuple):
    """Network input of one round of cameras.

    images (B, N, 3, H, W) normalised; rig; global_from_ego (B, 4, 4) float64 at the reference stamp; time
    (B,) float64 seconds relative to the stream; is_first (B,) bool, True if a stream starts and its memory
    must be reset.
    """

    images: Tensor
    rig: CameraRig
    global_from_ego: Tensor
    time: Tensor
    is_first: Tensor


class FrameWindow(NamedTuple):
    """T frames in the order current, past 1, 2, ... (newest first), future 1, 2, ...

    images (B, T, N, 3, H, W) normalised; rig with shapes (B, T, N, ...), in the ego frame at the *current*
    reference stamp for all frames; time (B, T) float32 seconds relative to the current frame, negative in the
    past. At the ends of a scene, its first or last frame is repeated with its time.
    """

    images: Tensor
    rig: CameraRig
    time: Tensor


class Targets(NamedTuple):
    """Ground truth of one frame, padded to G slots.

    boxes (B, G, 9) as in boxes.py, in ego at the reference stamp, velocity nan if unknown; labels (B, G)
    int64, indices into CLASS_NAMES (after `target_filter.filter_targets`, into the class names of a model);
    mask (B, G) bool, True for real objects. For the 2-D head, per camera: boxes_2d (B, N, G, 4) `[x1, y1, x2,
    y2]` in network pixels, clipped to the image; centers_2d (B, N, G, 2) projected 3-D centres; depths (B, N,
    G) metres along the optical axis; mask_2d (B, N, G) bool, True if the camera sees the object.
    """

    boxes: Tensor
    labels: Tensor
    mask: Tensor
    boxes_2d: Tensor
    centers_2d: Tensor
    depths: Tensor
    mask_2d: Tensor


def pad_targets(targets: Targets, slots: int) -> Targets:
    """Return the targets with G = slots. Padding is masked; its boxes have unit sizes, so that their
    logarithms are finite."""
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
    """Decoded output of a network, best first: boxes (B, Q, 9) in ego, scores (B, Q) in 0..1, labels (B, Q)
    int64."""

    boxes: Tensor
    scores: Tensor
    labels: Tensor


class PreparedImage(NamedTuple):
    """A network image (H, W, 3) uint8 that was computed before its round: by scaling and cropping (remap
    None), or by a virtual camera's `remap.ImageRemap`. It is used only where the same would be computed."""

    remap: object | None
    image: NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class CameraView:
    """One camera image with its geometry.

    image (H, W, 3) uint8 RGB; intrinsics (3, 3) in pixels of that image; ego_from_camera (4, 4), the
    extrinsic calibration; global_from_ego (4, 4) at the time of exposure; stamp_ns, the time of exposure;
    lens, the distortion of the image, None for a rectified image; name, for messages; visible, the share
    (H/16, W/16) of the cells of the *network* image that the camera sees, None if it sees all of it;
    prepared, network images of this image; remap, the map to the network image if it was left to the engine:
    then intrinsics and ego_from_camera are those of the network image.
    """

    image: NDArray[np.uint8]
    intrinsics: NDArray[np.float64]
    ego_from_camera: NDArray[np.float64]
    global_from_ego: NDArray[np.float64]
    stamp_ns: int
    lens: Lens | None = None
    name: str = ""
    visible: NDArray[np.float32] | None = None
    prepared: tuple[PreparedImage, ...] = ()
    remap: "ImageRemap | None" = None

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the image that intrinsics refer to."""
        return (self.image.shape[1], self.image.shape[0]) if self.remap is None else self.remap.output


@dataclass(frozen=True, kw_only=True)
class CameraRound:
    """One round of N cameras, None for missing ones.

    The order is that of `classes.CAMERA_CHANNELS`, or of the node parameter. Detections refer to
    reference_stamp_ns and to the pose global_from_ego (4, 4) at that time.
    """

    views: tuple[CameraView | None, ...]
    reference_stamp_ns: int
    global_from_ego: NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class ObjectList:
    """Boxes at one time: detections or ground truth.

    boxes (M, 9) float64 as in boxes.py, in ego (base_link) at stamp_ns; scores (M,) (1 for ground truth);
    labels (M,) int64, indices into CLASS_NAMES; ids and attributes (nuScenes names), one string per object,
    "" if unknown, or empty.
    """

    boxes: NDArray[np.float64]
    scores: NDArray[np.float64]
    labels: NDArray[np.int64]
    stamp_ns: int
    ids: tuple[str, ...] = ()
    attributes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        count = len(self.boxes)
        if self.boxes.shape != (count, 9) or self.scores.shape != (count,) or self.labels.shape != (count,):
            raise ValueError(
                f"object list of shapes {self.boxes.shape}, {self.scores.shape}, {self.labels.shape}; "
                "expected (M, 9), (M,), (M,)"
            )
        if self.ids and len(self.ids) != count:
            raise ValueError(f"{len(self.ids)} ids for {count} boxes; expected one each, or none")
        if self.attributes and len(self.attributes) != count:
            raise ValueError(f"{len(self.attributes)} attributes for {count} boxes; expected one each")

    def select(self, keep: NDArray[Any]) -> "ObjectList":
        """Return the objects selected by a boolean mask or index array."""
        indices = np.arange(len(self.boxes))[keep]
        ids = tuple(self.ids[i] for i in indices) if self.ids else ()
        attributes = tuple(self.attributes[i] for i in indices) if self.attributes else ()
        return ObjectList(
            boxes=self.boxes[indices],
            scores=self.scores[indices],
            labels=self.labels[indices],
            stamp_ns=self.stamp_ns,
            ids=ids,
            attributes=attributes,
        )
