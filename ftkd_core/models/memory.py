# SPDX-License-Identifier: Apache-2.0
"""The streaming memory: what the student keeps from earlier frames, in global coordinates.

Source: StreamPETR code (method.md section 4), as an explicit value instead of module attributes.
Symbols: B batch, M memory slots, Q queries, C channels, P propagated slots, K classes.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ftkd_core.geometry import full_precision, invert_rigid, transform_points
from ftkd_core.types import Frame


class Memory(NamedTuple):
    """Newest first: embedding (B, M, C); centers_global (B, M, 3) float64 metres; velocity_global (B, M, 2)
    m/s; shape_global (B, M, 5) log w, log l, log h, sin, cos of the heading; logits (B, M, K); time (B, M)
    float64 seconds of the stream; global_from_ego (B, M, 4, 4) float64, the vehicle when it was stored.
    Upstream keeps no shape and no logits; only anchored queries read them. Logits are counted from the
    classifier's prior, so that 0 is no evidence."""

    embedding: Tensor
    centers_global: Tensor
    velocity_global: Tensor
    shape_global: Tensor
    logits: Tensor
    time: Tensor
    global_from_ego: Tensor


class AlignedMemory(NamedTuple):
    """The memory as the current frame sees it: embedding (B, M, C); centers_ego (B, M, 3) metres;
    velocity_ego (B, M, 2); shape_ego (B, M, 5); logits (B, M, K); age (B, M) seconds; ego_from_past (B, M,
    4, 4) the past vehicle frame in the current one. All float32."""

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
    """A memory of zeros; the first frame (`frame.is_first`) never reads it."""
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
    """The memory moved into the current ego frame; where a stream starts, the trained first state instead.

    pseudo_centers (P, 3) metres in ego fill the first P slots of that state; its other slots are zeros at
    the origin, with a pose of zeros, as upstream trains them. velocity_as_answered: velocities stay along the
    axes of the vehicle when it answered them (upstream), not turned into the current ones.
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
    local: AlignedMemory,
    frame: Frame,
    features: Tensor,
    codes: Tensor,
    logits: Tensor,
    num_kept: int,
    interval_s: float = 0.0,
) -> Memory:
    """The memory after this frame: the num_kept best queries in front, the oldest slots dropped; detached.

    features (B, Q, C), codes (B, Q, 10) in ego, logits (B, Q, K) of the last layer; best by class score.
    Where the stream started with this frame, the older slots are the first state's (`local`), not those of
    another stream.
    """
    scores = logits.detach().float().amax(-1)
    best = scores.topk(num_kept, dim=1).indices[..., None]  # (B, P, 1)
    kept_features, kept_codes, kept_logits = (
        values.detach().float().gather(1, best.expand(-1, -1, values.shape[-1]))
        for values in (features, codes, logits)
    )
    pose = frame.global_from_ego.double()
    first = frame.is_first
    centers = torch.where(
        first[:, None, None], transform_points(pose, local.centers_ego.double()), memory.centers_global
    )
    past_poses = torch.where(
        first[:, None, None, None], pose[:, None] @ local.ego_from_past.double(), memory.global_from_ego
    )
    time = torch.where(first[:, None], frame.time[:, None], memory.time)
    new_pose = pose[:, None].expand(-1, num_kept, -1, -1)
    new_time = frame.time[:, None].expand(-1, num_kept)
    updated = Memory(
        embedding=_push(local.embedding, kept_features.to(local.embedding.dtype)),
        centers_global=_push(centers, transform_points(pose, kept_codes[..., :3].double())),
        velocity_global=_push(
            torch.where(first[:, None, None], local.velocity_ego, memory.velocity_global),
            kept_codes[..., 8:10] @ pose[:, :2, :2].mT.float(),
        ),
        shape_global=_push(
            torch.where(first[:, None, None], local.shape_ego, memory.shape_global),
            _rotate_shape(kept_codes[..., 3:8], pose),
        ),
        logits=_push(local.logits, kept_logits),
        time=_push(time, new_time),
        global_from_ego=_push(past_poses, new_pose),
    )
    return keep_interval(memory, updated, frame, interval_s) if interval_s else updated


def keep_interval(before: Memory, after: Memory, frame: Frame, interval_s: float) -> Memory:
    """`after`, or `before` where this frame came less than interval_s after the newest one in it: an answer
    that is not remembered. A stream that starts, or that time turned back in, is remembered at once."""
    gap = frame.time - before.time[:, 0]
    due = frame.is_first | (gap >= interval_s) | (gap < 0)  # (B,)
    return Memory(
        *(
            torch.where(due.view(-1, *[1] * (new.ndim - 1)), new, old)
            for old, new in zip(before, after, strict=True)
        )
    )


def _velocity_in_past_axes(velocity_global: Tensor, global_from_past: Tensor) -> Tensor:
    """Velocities (B, M, 2) as they were before `memorise` turned them: the exact inverse, also on a slope; 0
    where there is no pose."""
    (a, b), (c, d) = (row.unbind(-1) for row in global_from_past[..., :2, :2].double().unbind(-2))
    scale = a * d - b * c
    x, y = velocity_global.double().unbind(-1)
    turned = torch.stack([d * x - b * y, a * y - c * x], dim=-1)
    known = (scale != 0)[..., None]
    return torch.where(known, turned / torch.where(known, scale[..., None], 1.0), 0.0).float()


def _rotate_shape(shape_src: Tensor, dst_from_src: Tensor) -> Tensor:
    """Sizes and heading (B, M, 5) of frame src with the heading in frame dst; dst_from_src (B, 4, 4)."""
    heading = shape_src[..., 3:5].flip(-1) @ dst_from_src[:, :2, :2].mT.float()  # (cos, sin)
    return torch.cat([shape_src[..., :3], heading.flip(-1)], dim=-1)


def _push(old: Tensor, new: Tensor) -> Tensor:
    return torch.cat([new, old.detach()[:, : old.shape[1] - new.shape[1]]], dim=1)
