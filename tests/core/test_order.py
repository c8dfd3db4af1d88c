# SPDX-License-Identifier: Apache-2.0
"""Epoch order: every frame of every clip once per epoch, shuffled, for any clip lengths and any number of
processes."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftkd_core.data.clips import StreamDataset
from ftkd_core.data.order import EpochOrder
from ftkd_core.data.windows import WindowDataset
from tests.core.helpers import NO_AUGMENTATION, make_clip

LENGTHS = st.lists(st.integers(1, 50), min_size=1, max_size=8)


def shown(order: EpochOrder, epoch: int) -> "Counter[tuple[int, int]]":
    """Count how often each (clip, frame) occurs in an epoch."""
    first = epoch * order.segments_per_epoch
    served = [order(number) for number in range(first, first + order.segments_per_epoch)]
    frames = Counter[tuple[int, int]]()
    for clip, start in served:
        frames.update((clip, min(start + k, order.lengths[clip] - 1)) for k in range(order.segment))
    return frames


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 25), st.integers(0, 3))
def test_epoch_misses_or_repeats_at_most_half_a_segment_per_clip(
    lengths: list[int], segment: int, epoch: int
) -> None:
    frames = shown(EpochOrder(lengths, segment, seed=5), epoch)
    for clip, length in enumerate(lengths):
        seen = sorted(frame for number, frame in frames if number == clip)
        missing = length - len(seen)
        assert missing * 2 < max(segment, 2)
        if length >= segment:  # no frame is repeated in place of a missing one
            twice = sum(count - 1 for (number, _), count in frames.items() if number == clip)
            assert twice * 2 <= segment and not (missing and twice)
            assert seen == list(range(seen[0], seen[0] + len(seen)))
        else:
            assert not missing


def test_every_frame_occurs_once_if_segments_fill_the_clips() -> None:
    order = EpochOrder([40, 20, 60], 20, seed=1)
    assert order.segments_per_epoch == 6
    for epoch in range(3):
        assert set(shown(order, epoch).values()) == {1} and len(shown(order, epoch)) == 120


def test_order_depends_only_on_epoch_and_seed() -> None:
    orders = [EpochOrder([40] * 30, 20, seed) for seed in (1, 1, 2)]
    served = [[order(number) for number in range(120)] for order in orders]
    assert served[0] == served[1] != served[2]
    assert served[0][:60] != served[0][60:] and sorted(served[0][:60]) == sorted(served[0][60:])
    assert orders[1](7) == served[0][7]


def test_missed_frames_of_a_clip_vary_between_epochs() -> None:
    order = EpochOrder([41], 20, seed=0)
    missing = {next(f for f in range(41) if (0, f) not in shown(order, epoch)) for epoch in range(20)}
    assert missing == {0, 40}


def test_streams_of_all_processes_share_an_epoch() -> None:
    clips = [make_clip(frames=8, seed=seed) for seed in range(4)]
    order = EpochOrder([8] * 4, 4, seed=3)
    ranks = [
        StreamDataset(
            clips.__getitem__, 4, num_streams=2, segment=4, augment=NO_AUGMENTATION, seed=3,
            first_stream=first, all_streams=4, staggered=False, order=order,
        )
        for first in (0, 2)
    ]  # fmt: skip
    served = Counter[tuple[int, int]]()
    for step in range(8):  # 8 steps of 4 streams: the 32 frames of an epoch
        chosen = [rank.select_frame(stream, step) for rank in ranks for stream in rank.streams]
        served.update((choice.clip_index, choice.frame) for choice in chosen)
        assert [choice.is_first for choice in chosen] == [step % 4 == 0] * 4
    assert len(served) == 32 and set(served.values()) == {1}


def test_windows_of_all_processes_share_an_epoch() -> None:
    clips = [make_clip(frames=frames, seed=frames) for frames in (3, 5)]
    ranks = [
        WindowDataset(
            clips.__getitem__, 2, batch=2, num_past=1, num_future=1, augment=NO_AUGMENTATION, seed=3,
            rank=rank, ranks=2, order=EpochOrder([3, 5], 1, seed=3),
        )
        for rank in (0, 1)
    ]  # fmt: skip
    served = [rank[step] for step in range(2) for rank in ranks]
    boxes = [tuple(window.targets.boxes[place, 0].tolist()) for window in served for place in range(2)]
    assert len(set(boxes)) == 8  # every frame once


def test_order_of_other_clips_raises() -> None:
    order = EpochOrder([8], 4, seed=0)
    with pytest.raises(ValueError, match="order for 1 clips and segments of 4; expected 2 and 4"):
        order.require(2, 4)
    with pytest.raises(ValueError, match="0 clips, the shortest of 0 frames"):
        EpochOrder([], 4, seed=0)
