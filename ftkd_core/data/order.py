# SPDX-License-Identifier: Apache-2.0
"""The order in which training is shown its scenes when every frame is to come once an epoch."""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np


class Segment(NamedTuple):
    """Frames `start` and on of a clip."""

    clip: int
    start: int


class EpochOrder:
    """`order(number)` is the segment that is served as the `number`-th of a run, by all its streams and
    processes together: in each epoch every clip is cut into segments of the same length, and all of them
    come once, shuffled. A function of (seed, number) alone.

    lengths: frames of each clip. A clip whose length is no multiple of a segment's leaves out less than
    half of one, at its ends, others in each epoch; or, where half or more would be left, its segments
    overlap. A clip shorter than a segment is one. (StreamPETR cuts scenes into halves and shuffles these;
    SparseBEV shuffles frames, segments of 1 [code].) Errors: ValueError for no clips or no frames.
    """

    def __init__(self, lengths: Sequence[int], segment: int, seed: int) -> None:
        if not lengths or min(lengths) < 1 or segment < 1:
            raise ValueError(
                f"{len(lengths)} clips, the shortest of {min(lengths, default=0)} frames, segments of "
                f"{segment}: expected at least 1 of each"
            )
        self.lengths, self.segment, self.seed = tuple(lengths), segment, seed
        self._parts = [max(1, (length + segment // 2) // segment) for length in lengths]
        self.segments_an_epoch = sum(self._parts)
        self._epoch = lru_cache(maxsize=2)(self._shuffled)  # streams are in one epoch or in two

    def __call__(self, number: int) -> Segment:
        """The segment of that number, 0 and up."""
        epoch, place = divmod(number, self.segments_an_epoch)
        clip, start = self._epoch(epoch)[place].tolist()
        return Segment(clip, start)

    def require(self, num_clips: int, segment: int) -> None:
        """ValueError where it is the order of other clips or segments than these."""
        if (len(self.lengths), self.segment) != (num_clips, segment):
            raise ValueError(
                f"an order of {len(self.lengths)} clips and segments of {self.segment}; expected {num_clips} "
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
        spare = length - parts * self.segment
        if spare >= 0:
            first = int(random.integers(spare + 1))
            return [first + part * self.segment for part in range(parts)]
        last = max(length - self.segment, 0)
        return [round(start) for start in np.linspace(0, last, parts)]
