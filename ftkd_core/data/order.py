# SPDX-License-Identifier: Apache-2.0
"""Sample order in which each training frame is used once per epoch."""

from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np


class Segment(NamedTuple):
    """Consecutive frames of a clip, beginning at `start`."""

    clip: int
    start: int


class EpochOrder:
    """`order(number)` is segment `number` of a run, counted over all streams and processes. Each epoch cuts
    every clip into segments of equal length and visits all of them once in random order. The result depends
    only on (seed, number).

    lengths: frames of each clip. If a clip's length is not a multiple of the segment length, it either loses
    less than half a segment at its ends (a different part in each epoch) or its segments overlap. A clip
    shorter than a segment is one segment. StreamPETR cuts scenes into halves and shuffles them; SparseBEV
    shuffles frames, which are segments of 1 [code]. With segment 0, segments are the halves of the clips: the
    first has half of the frames, rounded up. Raises ValueError for no clips or no frames.
    """

    def __init__(self, lengths: Sequence[int], segment: int, seed: int) -> None:
        if not lengths or min(lengths) < 1 or segment < 0:
            raise ValueError(
                f"{len(lengths)} clips, the shortest of {min(lengths, default=0)} frames, segments of "
                f"{segment}: expected at least 1 of each (segment 0: halves)"
            )
        self.lengths, self.segment, self.seed = tuple(lengths), segment, seed
        self._parts = [
            max(1, (length + segment // 2) // segment) if segment else min(length, 2) for length in lengths
        ]
        self._ends: dict[tuple[int, int], list[int]] = {}
        self.segments_per_epoch = sum(self._parts)
        self._epoch = lru_cache(maxsize=2)(self._shuffled)  # streams span at most two epochs

    def __call__(self, number: int) -> Segment:
        """Return segment `number` >= 0."""
        epoch, place = divmod(number, self.segments_per_epoch)
        clip, start = self._epoch(epoch)[place].tolist()
        return Segment(clip, start)

    def length(self, number: int) -> int:
        """Return the frames of segment `number`."""
        clip, start = self(number)
        if self.segment:
            return min(self.segment, self.lengths[clip] - start)
        half = -(-self.lengths[clip] // 2)
        return half if start == 0 else self.lengths[clip] - half

    def place(self, stream: int, streams: int, step: int) -> tuple[int, int]:
        """Return which of its segments a stream of `streams` is in at a step, and the position in it. Stream
        s takes segments s, s + streams, ... one after the other."""
        ends = self._ends.setdefault((stream, streams), [0])
        while ends[-1] <= step:
            ends.append(ends[-1] + self.length((len(ends) - 1) * streams + stream))
        index = bisect_right(ends, step) - 1
        return index, step - ends[index]

    def require(self, num_clips: int, segment: int) -> None:
        """Raise ValueError unless the order was made for this number of clips and this segment length."""
        if (len(self.lengths), self.segment) != (num_clips, segment):
            raise ValueError(
                f"order for {len(self.lengths)} clips and segments of {self.segment}; expected {num_clips} "
                f"and {segment}"
            )

    def _shuffled(self, epoch: int) -> "np.ndarray[tuple[int, int], np.dtype[np.int64]]":
        random = np.random.default_rng([self.seed, epoch])
        cut = [
            (clip, start)
            for clip, (length, parts) in enumerate(zip(self.lengths, self._parts, strict=True))
            for start in self._starts(length, parts, random)
        ]
        return random.permutation(np.array(cut, np.int64))

    def _starts(self, length: int, parts: int, random: np.random.Generator) -> list[int]:
        if not self.segment:
            return [0, -(-length // 2)][:parts]
        spare = length - parts * self.segment
        if spare >= 0:
            first = int(random.integers(spare + 1))
            return [first + part * self.segment for part in range(parts)]
        last = max(length - self.segment, 0)
        return [round(start) for start in np.linspace(0, last, parts)]
