# SPDX-License-Identifier: Apache-2.0
"""Stability of detections between frames, without ground truth: flicker and jitter.

Each detection is predicted to the next frame by its velocity and the ego motion, and matched one to one to
the detections of its class there (smallest sum of distances, at most 2 m). Flicker is the number of
detections that appear for one frame only or are missing in one frame only, divided by the number of
detections with a frame before and after. Jitter is the distance between prediction and match. Only
neighbouring frames that are at most 1 s apart are compared. Source: ours.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from ftkd_core.geometry import invert_rigid, transform_points
from ftkd_core.types import ObjectList

MATCH_WITHIN_M: Final = 2.0
MIN_SCORE: Final = 0.25
_MAX_GAP_NS: Final = 1_000_000_000

Pairs = NDArray[np.int64]


class PosedFrame(NamedTuple):
    """Detections of one frame and global_from_ego (4, 4) at their stamp."""

    objects: ObjectList
    global_from_ego: NDArray[np.float64]


@dataclass
class StabilityCounts:
    """Sums over frames; add the counts of several recordings to get their common figures. judged: detections
    with a frame before and after."""

    frames: int = 0
    detections: int = 0
    judged: int = 0
    flashes: int = 0
    dropouts: int = 0
    position_m: list[float] = field(default_factory=list)
    heading_rad: list[float] = field(default_factory=list)
    size_share: list[float] = field(default_factory=list)
    score: list[float] = field(default_factory=list)

    def __add__(self, other: "StabilityCounts") -> "StabilityCounts":
        return StabilityCounts(
            *(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True))
        )

    def summary(self) -> dict[str, Any]:
        """Return flicker (share) and jitter (medians and 95th percentiles); None without detections."""
        changes = self.flashes + self.dropouts
        return {
            "frames": self.frames,
            "detections": self.detections,
            "flicker": changes / self.judged if self.judged else None,
            "flashes": self.flashes,
            "dropouts": self.dropouts,
            "jitter_m": _percentile(self.position_m, 50),
            "jitter_p95_m": _percentile(self.position_m, 95),
            "heading_jitter_rad": _percentile(self.heading_rad, 50),
            "size_jitter": _percentile(self.size_share, 50),
            "score_jitter": _percentile(self.score, 50),
        }


def count_stability(frames: Sequence[PosedFrame], *, min_score: float = MIN_SCORE) -> StabilityCounts:
    """Count flicker and jitter of frames in order of time; detections below `min_score` are left out."""
    kept = [
        frame._replace(objects=frame.objects.select(frame.objects.scores >= min_score)) for frame in frames
    ]
    counts = StabilityCounts(frames=len(kept), detections=sum(len(frame.objects.boxes) for frame in kept))
    pairs = [match_frames(first, second) for first, second in itertools.pairwise(kept)]
    for index, matched in enumerate(pairs):
        _add_jitter(counts, kept[index], kept[index + 1], matched)
    for index in range(1, len(kept) - 1):
        if not (
            _are_neighbours(kept[index - 1], kept[index]) and _are_neighbours(kept[index], kept[index + 1])
        ):
            continue
        counts.judged += len(kept[index].objects.boxes)
        before, after = set(pairs[index - 1][:, 1].tolist()), set(pairs[index][:, 0].tolist())
        counts.flashes += len(kept[index].objects.boxes) - len(before | after)
        skipped = match_frames(kept[index - 1], kept[index + 1])
        lost = set(range(len(kept[index - 1].objects.boxes))) - set(pairs[index - 1][:, 0].tolist())
        new = set(range(len(kept[index + 1].objects.boxes))) - set(pairs[index][:, 1].tolist())
        counts.dropouts += sum(int(a) in lost and int(b) in new for a, b in skipped)
    return counts


def match_frames(first: PosedFrame, second: PosedFrame) -> Pairs:
    """Return pairs (K, 2) of indices of the same object in two frames; none for frames far apart in time."""
    if not _are_neighbours(first, second, steps=2):
        return np.zeros((0, 2), dtype=np.int64)
    distance = np.linalg.norm(
        _predicted(first, second)[:, None, :2] - second.objects.boxes[None, :, :2], axis=-1
    )
    same = first.objects.labels[:, None] == second.objects.labels[None, :]
    cost = np.where(same & (distance <= MATCH_WITHIN_M), distance, 1e3)
    if not cost.size:
        return np.zeros((0, 2), dtype=np.int64)
    rows, columns = linear_sum_assignment(cost)
    allowed = cost[rows, columns] <= MATCH_WITHIN_M
    pairs: Pairs = np.stack([rows[allowed], columns[allowed]], axis=1).astype(np.int64)
    return pairs


def _are_neighbours(first: PosedFrame, second: PosedFrame, steps: int = 1) -> bool:
    return 0 < second.objects.stamp_ns - first.objects.stamp_ns <= steps * _MAX_GAP_NS


def _predicted(first: PosedFrame, second: PosedFrame) -> NDArray[np.float64]:
    """Return the centres (M, 3) of the first frame, moved to the time and ego frame of the second one."""
    elapsed_s = (second.objects.stamp_ns - first.objects.stamp_ns) * 1e-9
    centers = first.objects.boxes[:, :3].copy()
    centers[:, :2] += np.nan_to_num(first.objects.boxes[:, 7:9]) * elapsed_s
    second_from_first = invert_rigid(second.global_from_ego) @ first.global_from_ego
    return transform_points(second_from_first, centers)


def _add_jitter(counts: StabilityCounts, first: PosedFrame, second: PosedFrame, pairs: Pairs) -> None:
    if not len(pairs) or not _are_neighbours(first, second):
        return
    old, new = first.objects.boxes[pairs[:, 0]], second.objects.boxes[pairs[:, 1]]
    moved = _predicted(first, second)[pairs[:, 0]]
    second_from_first = invert_rigid(second.global_from_ego) @ first.global_from_ego
    turn = np.arctan2(second_from_first[1, 0], second_from_first[0, 0])
    heading = (new[:, 6] - old[:, 6] - turn + np.pi) % (2 * np.pi) - np.pi
    counts.position_m += np.linalg.norm(moved[:, :2] - new[:, :2], axis=1).tolist()
    counts.heading_rad += np.abs(heading).tolist()
    counts.size_share += np.abs(new[:, 3:6] / old[:, 3:6] - 1).max(axis=1).tolist()
    scores = second.objects.scores[pairs[:, 1]] - first.objects.scores[pairs[:, 0]]
    counts.score += np.abs(scores).tolist()


def _percentile(values: Sequence[float], share: float) -> float | None:
    return float(np.percentile(values, share)) if values else None
