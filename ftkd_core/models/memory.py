# SPDX-License-Identifier: Apache-2.0
"""Streaming memory: queries of earlier frames in global coordinates.

Source: exiawsh/StreamPETR, as an explicit value instead of module attributes. Symbols: B batch, M memory
slots, Q queries, C channels, P propagated slots, K classes.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ftkd_core.geometry import full_precision, invert_rigid, transform_points
from ftkd_core.types import Frame


class Memory(NamedTuple):
    """Memory slots, newest first.

    embedding (B, M, C); centers_global (B, M, 3) float64 metres; velocity_global (B, M, 2) m/s; shape_global
    (B, M, 5) log w, log l, log h, sin and cos of the heading; logits (B, M, K) relative to the classifier's
    prior, so that 0 means no evidence; time (B, M) float64 seconds; global_from_ego (B, M, 4, 4) float64 at
    that time. Shape and logits are used by anchored queries only; StreamPETR's code does not store them.
    """

    embedding: Tensor
    centers_global: Tensor
    velocity_global: Tensor
    shape_global: Tensor
    logits: Tensor
    time: Tensor
    global_from_ego: Tensor


class AlignedMemory(NamedTuple):
    """Memory in the current ego frame, float32.

    embedding (B, M, C); centers_ego (B, M, 3) metres; velocity_ego (B, M, 2); shape_ego (B, M, 5); logits (B,
    M, K); age (B, M) seconds; ego_from_past (B, M, 4, 4), from the ego frame of the slot to the current one.
    """

    embedding: Tensor
    centers_ego: Tensor
    velocity_ego: Tensor
    shape_ego: Tensor
    logits: Tensor
    age: Tensor
    ego_from_past: Tensor


def empty_memory(
    batch: int, length: int, channels: int, num_classes: int, device: torch.device | str = "cpu"
) -> Memory:
    """Return a memory of zeros, which the first frame of a stream (`frame.is_first`) ignores."""
    identity = torch.eye(4, dtype=torch.float64, device=device).expand(batch, length, 4, 4).clone()
    return Memory(
        embedding=torch.zeros(batch, length, channels, device=device),
        centers_global=torch.zeros(batch, length, 3, dtype=torch.float64, device=device),
        velocity_global=torch.zeros(batch, length, 2, device=device),
        shape_global=torch.zeros(batch, length, 5, device=device),
        logits=torch.zeros(batch, length, num_classes, device=device),
        time=torch.zeros(batch, length, dtype=torch.float64, device=device),
        global_from_ego=identity,
    )


@full_precision
def align_memory(
    memory: Memory, frame: Frame, pseudo_centers: Tensor, *, rotate_velocity: bool = True
) -> AlignedMemory:
    """Return the memory in the current ego frame, or the initial state if a stream starts with this frame.

    In the initial state, pseudo_centers (P, 3) in metres fill the first P slots; other slots are zeros with a
    zero pose, as in StreamPETR's training. With rotate_velocity=False velocities keep the axes of the ego
    frame that predicted them, as in StreamPETR's code.
    """
    ego_from_global = invert_rigid(frame.global_from_ego.double())
    centers = transform_points(ego_from_global, memory.centers_global.double()).float()
    if rotate_velocity:
        velocity = memory.velocity_global @ ego_from_global[:, :2, :2].mT.float()
    else:
        velocity = _velocity_in_past_axes(memory.velocity_global, memory.global_from_ego)
    shape = _rotate_shape(memory.shape_global, ego_from_global)
    age = (frame.time[:, None] - memory.time).float()
    ego_from_past = (ego_from_global[:, None] @ memory.global_from_ego.double()).float()

    count = pseudo_centers.shape[0]
    first = frame.is_first
    start_centers = torch.cat([pseudo_centers, pseudo_centers.new_zeros(centers.shape[1] - count, 3)])
    start_pose = torch.zeros_like(ego_from_past[0])
    start_pose[:count] = torch.eye(4, device=centers.device)
    return AlignedMemory(
        embedding=torch.where(first[:, None, None], torch.zeros_like(memory.embedding), memory.embedding),
        centers_ego=torch.where(first[:, None, None], start_centers, centers),
        velocity_ego=torch.where(first[:, None, None], torch.zeros_like(velocity), velocity),
        shape_ego=torch.where(first[:, None, None], torch.zeros_like(shape), shape),
        logits=torch.where(first[:, None, None], torch.zeros_like(memory.logits), memory.logits),
        age=torch.where(first[:, None], torch.zeros_like(age), age),
        ego_from_past=torch.where(first[:, None, None, None], start_pose, ego_from_past),
    )


@full_precision
def update_memory(
    memory: Memory,
    aligned: AlignedMemory,
    frame: Frame,
    features: Tensor,
    codes: Tensor,
    logits: Tensor,
    num_kept: int,
    interval_s: float = 0.0,
) -> Memory:
    """Return the memory after this frame, without gradients: the best queries in front, oldest slots dropped.

    num_kept queries are kept, best by class score. features (B, Q, C), codes (B, Q, 10) in ego and logits (B,
    Q, K) are those of the last layer. If the stream starts with this frame, older slots are those of the
    initial state (`aligned`). A frame less than interval_s after the newest slot leaves the memory unchanged
    (`keep_interval`).
    """
    scores = logits.detach().float().amax(-1)
    best = scores.topk(num_kept, dim=1).indices[..., None]  # (B, P, 1)
    kept_features, kept_codes, kept_logits = (
        values.detach().float().gather(1, best.expand(-1, -1, values.shape[-1]))
        for values in (features, codes, logits)
    )
    pose = frame.global_from_ego.double()
    older = _older_slots(memory, aligned, frame)
    updated = Memory(
        embedding=_push(older.embedding, kept_features.to(older.embedding.dtype)),
        centers_global=_push(older.centers_global, transform_points(pose, kept_codes[..., :3].double())),
        velocity_global=_push(older.velocity_global, kept_codes[..., 8:10] @ pose[:, :2, :2].mT.float()),
        shape_global=_push(older.shape_global, _rotate_shape(kept_codes[..., 3:8], pose)),
        logits=_push(older.logits, kept_logits),
        time=_push(older.time, frame.time[:, None].expand(-1, num_kept)),
        global_from_ego=_push(older.global_from_ego, pose[:, None].expand(-1, num_kept, -1, -1)),
    )
    return keep_interval(memory, updated, frame, interval_s) if interval_s else updated


def _older_slots(memory: Memory, aligned: AlignedMemory, frame: Frame) -> Memory:
    """Return the memory before this frame; for streams that start with it, the initial state in global."""
    pose, first = frame.global_from_ego.double(), frame.is_first
    centers = transform_points(pose, aligned.centers_ego.double())
    poses = pose[:, None] @ aligned.ego_from_past.double()
    return Memory(
        embedding=aligned.embedding,
        centers_global=torch.where(first[:, None, None], centers, memory.centers_global),
        velocity_global=torch.where(first[:, None, None], aligned.velocity_ego, memory.velocity_global),
        shape_global=torch.where(first[:, None, None], aligned.shape_ego, memory.shape_global),
        logits=aligned.logits,
        time=torch.where(first[:, None], frame.time[:, None], memory.time),
        global_from_ego=torch.where(first[:, None, None, None], poses, memory.global_from_ego),
    )


def keep_interval(before: Memory, after: Memory, frame: Frame, interval_s: float) -> Memory:
    """Return `before` for streams whose frame comes less than interval_s after its newest slot, else `after`.

    The first frame of a stream, and a frame older than the newest slot, always updates the memory.
    """
    gap = frame.time - before.time[:, 0]
    due = frame.is_first | (gap >= interval_s) | (gap < 0)  # (B,)
    return Memory(
        *(
            torch.where(due.view(-1, *[1] * (new.ndim - 1)), new, old)
            for old, new in zip(before, after, strict=True)
        )
    )


def _velocity_in_past_axes(velocity_global: Tensor, global_from_past: Tensor) -> Tensor:
    """Return velocities (B, M, 2) in the axes of the ego frame that predicted them; 0 for slots without a
    pose.

    This inverts the rotation in `update_memory` exactly, also on slopes.
    """
    (a, b), (c, d) = (row.unbind(-1) for row in global_from_past[..., :2, :2].double().unbind(-2))
    scale = a * d - b * c
    x, y = velocity_global.double().unbind(-1)
    rotated = torch.stack([d * x - b * y, a * y - c * x], dim=-1)
    known = (scale != 0)[..., None]
    return torch.where(known, rotated / torch.where(known, scale[..., None], 1.0), 0.0).float()


def _rotate_shape(shape_src: Tensor, dst_from_src: Tensor) -> Tensor:
    """Return sizes and heading (B, M, 5) of frame src with the heading in frame dst; dst_from_src is (B, 4,
    4)."""
    heading = shape_src[..., 3:5].flip(-1) @ dst_from_src[:, :2, :2].mT.float()  # (cos, sin)
    return torch.cat([shape_src[..., :3], heading.flip(-1)], dim=-1)


def _push(old: Tensor, new: Tensor) -> Tensor:
    return torch.cat([new, old.detach()[:, : old.shape[1] - new.shape[1]]], dim=1)
