# SPDX-License-Identifier: Apache-2.0
"""A streaming detector as two pure functions of float32 tensors, the form in which it is exported.

`RigGraph` encodes the cameras; its outputs stay the same as long as the cameras do. `FrameGraph` runs one
round. The memory is an input and an output. It is kept relative to the vehicle: positions in the vehicle
frame of the previous round and times relative to it. So float32 is exact enough anywhere on Earth, which
TensorRT needs: it has no float64. The network itself is unchanged: the previous vehicle frame takes the place
of the global frame. Symbols: N cameras, H/W network image, M memory slots, C channels, K classes, D
detections."""

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor, nn

from ftkd_core.models.memory import Memory
from ftkd_core.models.position import EncodedRays, TokenGeometry
from ftkd_core.models.predictions import decode
from ftkd_core.models.stream_petr import StreamPETR
from ftkd_core.runtime.preprocess import normalise
from ftkd_core.types import CameraRig, Frame

RIG_INPUTS: Final = ("intrinsics", "ego_from_camera", "camera_mask")
GEOMETRY: Final = (
    "frustum", "cone", "rays", "camera_centers", "token_mask", "ray_embedding", "ray_gain", "ray_offset",
)  # fmt: skip
MEMORY: Final = tuple(f"memory_{name}" for name in (
    "embedding", "centers", "velocity", "shape", "logits", "time", "ego_from_past",
))  # fmt: skip
FRAME_INPUTS: Final = ("images", "previous_from_current", "elapsed_s", "is_first")
OUTPUTS: Final = ("boxes", "scores", "labels")


class RigGraph(nn.Module):
    """intrinsics (N, 3, 3) in pixels of the network image, ego_from_camera (N, 4, 4) in the current vehicle
    frame, camera_mask (N,) bool -> the geometry of the image tokens, named as in GEOMETRY."""

    def __init__(self, model: StreamPETR) -> None:
        super().__init__()
        self.model = model

    def forward(self, intrinsics: Tensor, ego_from_camera: Tensor, camera_mask: Tensor) -> tuple[Tensor, ...]:
        rig = CameraRig(intrinsics[None], ego_from_camera[None], camera_mask[None])
        *own, _ = self.model.geometry(rig)
        encoded = self.model.position.encode(TokenGeometry(*own))  # type: ignore[arg-type]
        return (*own, *encoded)


class FrameGraph(nn.Module):
    """One round: images (N, H, W, 3) uint8 RGB; the rig's inputs; previous_from_current (4, 4), the current
    vehicle frame in that of the previous round; elapsed_s (1,) since then; is_first (1,) bool; the geometry
    of RigGraph; the memory -> boxes (D, 9) in the current vehicle frame, scores (D,), labels (D,) int64, and
    the memory for the next round."""

    def __init__(self, model: StreamPETR, max_detections: int) -> None:
        super().__init__()
        self.model, self.max_detections = model, max_detections

    def forward(
        self, images: Tensor, previous_from_current: Tensor, elapsed_s: Tensor, is_first: Tensor,
        intrinsics: Tensor, ego_from_camera: Tensor, camera_mask: Tensor, *values: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        geometry = read_geometry(values[: len(GEOMETRY)])
        memory = Memory(*values[len(GEOMETRY) :])
        rig = CameraRig(intrinsics[None], ego_from_camera[None], camera_mask[None])
        pose = previous_from_current[None]
        frame = Frame(normalise(images)[None], rig, pose, elapsed_s, is_first)
        predictions, after = self.model(frame, memory, geometry=geometry)
        found = decode(predictions, self.max_detections)
        return found.boxes[0], found.scores[0], found.labels[0], *relative_to(after, pose, elapsed_s)


def read_geometry(values: Sequence[Tensor]) -> TokenGeometry:
    """The inverse of what `RigGraph` returns."""
    *own, embedding, gain, offset = values
    return TokenGeometry(*own, EncodedRays(embedding, gain, offset))  # type: ignore[arg-type, call-arg]


def relative_to(memory: Memory, pose: Tensor, time: Tensor) -> Memory:
    """Move a memory (1, M, ...) into the frame whose pose (1, 4, 4) in the memory's own frame is given, and
    count its times from `time` (1,); all float32."""
    turn, shift = pose[:, :3, :3].float(), pose[:, :3, 3].float()
    inverse = turn.mT
    centers = (memory.centers_global.float() - shift[:, None]) @ turn
    velocity = memory.velocity_global.float() @ turn[:, :2, :2]
    heading = memory.shape_global[..., 3:5].flip(-1) @ turn[:, :2, :2]
    shape = torch.cat([memory.shape_global[..., :3], heading.flip(-1)], dim=-1)
    past = memory.global_from_ego.float()
    moved = inverse[:, None] @ (past[..., :3, :] - _shift_of(past, shift))
    return Memory(
        memory.embedding, centers, velocity, shape, memory.logits, (memory.time - time[:, None]).float(),
        torch.cat([moved, past[..., 3:, :]], dim=-2),
    )  # fmt: skip


def _shift_of(past: Tensor, shift: Tensor) -> Tensor:
    """The translation (1, M, 3, 4) that is taken from the poses `past`; none from an empty slot, whose bottom
    row is 0."""
    weight = past[..., 3:, :]  # (1, M, 1, 4), 0 0 0 1 or zeros
    return shift[:, None, :, None] * weight


def start_memory(model: StreamPETR) -> Memory:
    """The memory before the first round, float32."""
    return Memory(*(value.float() for value in model.start_memory()))
