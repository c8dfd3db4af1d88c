# SPDX-License-Identifier: Apache-2.0
"""Exact back-to-front order of upright bodies with disjoint convex footprints."""

import heapq

import numpy as np
from numpy.typing import NDArray

from ftkd_core.geometry import rotate_about_z


def footprints(poses: NDArray[np.float64], sizes: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the corners (B, 4, 2), counter-clockwise, of footprints with poses (B, 3) x, y, yaw and sizes
    (B, 2) length, width."""
    signs = np.array([[1, -1], [1, 1], [-1, 1], [-1, -1]]) / 2
    local = signs * sizes[:, None]
    corners: NDArray[np.float64] = rotate_about_z(local, poses[:, None, 2]) + poses[:, None, :2]
    return corners


def painting_order(
    corners: NDArray[np.float64], camera: NDArray[np.float64], tolerance: float = 0.02
) -> list[int]:
    """Return the indices of bodies, back to front, for footprints (B, 4, 2) and a camera position (2,).

    If an edge line of one body has another body entirely on its far side, the body on the camera's side of
    that line may hide the other, and never the reverse. If no such line exists (overlapping footprints) or
    the relation is cyclic, the body with the farther centre is drawn first.
    """
    count = len(corners)
    edges = np.roll(corners, -1, axis=1) - corners
    normals = np.stack([edges[..., 1], -edges[..., 0]], axis=-1)  # (B, 4, 2) outwards
    normals /= np.maximum(np.linalg.norm(normals, axis=-1, keepdims=True), 1e-9)
    offsets = (normals * corners).sum(-1)  # (B, 4)
    reach = np.einsum("bed,ckd->beck", normals, corners) - offsets[..., None, None]
    separates = (reach >= -tolerance).all(-1)  # (B, 4, B) c lies entirely beyond the edge of b
    outside = (normals @ camera - offsets) > 0  # (B, 4)
    in_front = (separates & outside[..., None]).any(1)  # [b, c]: c is in front of b
    behind = (separates & ~outside[..., None]).any(1)  # [b, c]: c is behind b
    hides = in_front | behind.T  # [b, c]: c may hide b
    distance = np.linalg.norm(corners.mean(1) - camera, axis=-1)
    # If both hold, lines on contradicting sides separate the bodies, and neither hides the other.
    hides &= ~hides.T
    rank = np.empty(count, dtype=np.int64)
    farthest_first = np.argsort(-distance, kind="stable")
    rank[farthest_first] = np.arange(count)
    return _topological_order(hides, rank.tolist(), farthest_first.tolist())


def _topological_order(hides: NDArray[np.bool_], rank: list[int], by_rank: list[int]) -> list[int]:
    """Sort bodies so that each follows the bodies it may hide (hides[b, c]: c may hide b). Among the
    available bodies, and if a cycle blocks all, the lowest rank comes first."""
    waiting_for = hides.sum(axis=0).tolist()
    followers: list[list[int]] = [[] for _ in by_rank]
    for before, after in zip(*(index.tolist() for index in np.nonzero(hides)), strict=True):
        followers[before].append(after)
    ready = [rank[body] for body, need in enumerate(waiting_for) if need == 0]
    heapq.heapify(ready)
    order: list[int] = []
    done = [False] * len(by_rank)
    lowest_left = 0
    while len(order) < len(by_rank):
        if ready:
            chosen = by_rank[heapq.heappop(ready)]
        else:
            while done[by_rank[lowest_left]]:
                lowest_left += 1
            chosen = by_rank[lowest_left]
        done[chosen] = True
        order.append(chosen)
        for body in followers[chosen]:
            waiting_for[body] -= 1
            if waiting_for[body] == 0 and not done[body]:
                heapq.heappush(ready, rank[body])
    return order
