# SPDX-License-Identifier: Apache-2.0
"""Matching of rounds: stamps of nuScenes, drops, delays and jumps of time; mostly without ROS."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import NamedTuple

import message_filters
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ftkd_ros.convert.message_factory import RCLPY
from ftkd_ros.convert.to_ros import make_header
from ftkd_ros.sync.matcher import MatchedRound, RoundMatcher
from ftkd_ros.sync.surround import SurroundMatcher
from ftkd_ros.sync.synchronizer import SurroundSynchronizer
from ftkd_ros.sync.time_offsets import different_rates, estimate_offset_ns, estimate_offsets_ns

MS = 1_000_000
CAMERAS = ("front", "front_right", "front_left", "back", "back_left", "back_right")
OFFSETS = tuple(int(ms * MS) for ms in (7.6, 15.5, 0.0, 32.7, 42.6, 23.0))
START = 1_532_402_927 * 1_000_000_000


class Arrival(NamedTuple):
    now_ns: int
    camera: int
    stamp_ns: int
    truth: int  # number of its round


def nuscenes_rhythm(
    rounds: int, *, seed: int = 0, drop: float = 0.0, jitter_ms: float = 1.0, delay_ms: float = 20.0
) -> list[Arrival]:
    """Simulate six cameras with periods of 50 and 100 ms, exposure offsets, drops and transport delays."""
    random = np.random.default_rng(seed)
    triggers = START + np.cumsum(np.tile([50, 100], rounds)[:rounds]) * MS
    arrivals = []
    for number, trigger in enumerate(triggers.tolist()):
        for camera, offset in enumerate(OFFSETS):
            if random.random() < drop:
                continue
            stamp = trigger + offset + int(random.uniform(-jitter_ms, jitter_ms) * MS)
            arrivals.append(Arrival(stamp + int(random.uniform(0, delay_ms) * MS), camera, stamp, number))
    # Transport keeps the order of the messages of a camera.
    for camera in range(6):
        times = [arrival.now_ns for arrival in arrivals if arrival.camera == camera]
        assert times == sorted(times) or delay_ms > 50
    return sorted(arrivals)


def make_matcher(
    *, offsets: Sequence[int] | None = OFFSETS, slop_ms: float = 20, min_cameras: int = 3
) -> SurroundMatcher[int]:
    return SurroundMatcher(
        CAMERAS, slop_ns=int(slop_ms * MS), deadline_ns=100 * MS, offsets_ns=offsets, min_cameras=min_cameras
    )


def play(
    matcher: SurroundMatcher[int], arrivals: Sequence[Arrival], poll_ms: int = 10
) -> list[MatchedRound[int]]:
    """Add messages, whose payload is the true round number, and poll in between as the node does."""
    rounds: list[MatchedRound[int]] = []
    clock = arrivals[0].now_ns
    for arrival in arrivals:
        while clock + poll_ms * MS < arrival.now_ns and arrival.now_ns - clock < 10_000 * MS:
            clock += poll_ms * MS
            rounds += matcher.poll(clock)
        clock = max(clock, arrival.now_ns)
        rounds += matcher.add(arrival.camera, arrival.stamp_ns, arrival.truth, arrival.now_ns)
    return rounds + matcher.poll(clock + 1000 * MS)


def truths(matched: MatchedRound[int]) -> set[int]:
    return {number for number in matched.messages if number is not None}


def complete_rounds(arrivals: Sequence[Arrival]) -> set[int]:
    seen: dict[int, set[int]] = {}
    for arrival in arrivals:
        seen.setdefault(arrival.truth, set()).add(arrival.camera)
    return {number for number, cameras in seen.items() if len(cameras) == 6}


@pytest.mark.parametrize("estimated", [False, True])
@pytest.mark.parametrize("drop", [0.0, 0.02, 0.05])
def test_nuscenes_rhythm_gives_every_complete_round_unmixed(drop: float, estimated: bool) -> None:
    arrivals = nuscenes_rhythm(1200, seed=7, drop=drop)
    matcher = make_matcher(offsets=None if estimated else OFFSETS)
    rounds = play(matcher, arrivals)
    assert all(len(truths(matched)) == 1 for matched in rounds)
    numbers = [truths(matched).pop() for matched in rounds if matched.is_complete]
    assert sorted(numbers) == sorted(complete_rounds(arrivals))
    everything = [truths(matched).pop() for matched in rounds]
    assert everything == sorted(set(everything)), "each round is released once, in order of time"
    assert len(everything) >= 1199
    assert matcher.counts["late"] == matcher.counts["duplicate"] == 0


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    drop=st.floats(0, 0.2),
    jitter_ms=st.floats(0, 5),
    delay_ms=st.floats(0, 45),
    slop_ms=st.floats(12, 20),
)
def test_no_round_is_mixed_or_repeated(
    seed: int, drop: float, jitter_ms: float, delay_ms: float, slop_ms: float
) -> None:
    arrivals = nuscenes_rhythm(60, seed=seed, drop=drop, jitter_ms=jitter_ms, delay_ms=delay_ms)
    for camera in range(6):
        seen = [-1, *(a.truth for a in arrivals if a.camera == camera), 60]
        assume(np.diff(seen).max() <= 5)  # otherwise the camera counts as lost and rounds do not wait for it
    rounds = play(make_matcher(slop_ms=slop_ms), arrivals)
    numbers = [truths(matched) for matched in rounds]
    assert all(len(number) == 1 for number in numbers)
    flat = [number.pop() for number in numbers]
    assert flat == sorted(set(flat))
    assert {n for n, matched in zip(flat, rounds, strict=True) if matched.is_complete} == complete_rounds(
        arrivals
    )
    for number, matched in zip(flat, rounds, strict=True):
        sent = {a.camera: a.stamp_ns for a in arrivals if a.truth == number}
        assert dict(enumerate(matched.stamps_ns)) == {camera: sent.get(camera) for camera in range(6)}


def test_round_keeps_the_true_stamps() -> None:
    arrivals = nuscenes_rhythm(3, jitter_ms=0)
    first = play(make_matcher(), arrivals)[0]
    assert first.stamps_ns == tuple(START + 50 * MS + offset for offset in OFFSETS)


def test_incomplete_round_is_released_at_the_deadline() -> None:
    matcher = make_matcher()
    for camera in range(5):
        assert matcher.add(camera, START + OFFSETS[camera], 0, 1000 * MS) == []
    assert matcher.poll(1099 * MS) == []
    (partial,) = matcher.poll(1100 * MS)
    assert partial.messages == (0, 0, 0, 0, 0, None)
    assert matcher.poll(2000 * MS) == []
    assert matcher.add(5, START + OFFSETS[5], 0, 1101 * MS) == []
    assert matcher.counts["late"] == 1


def test_round_that_cannot_become_complete_is_released_immediately() -> None:
    matcher = make_matcher()
    for camera in range(5):
        matcher.add(camera, START + OFFSETS[camera], 0, 1000 * MS)
    (partial,) = matcher.add(5, START + 50 * MS + OFFSETS[5], 1, 1001 * MS)
    assert partial.messages[5] is None


def test_lost_camera_delays_only_five_rounds() -> None:
    arrivals = [arrival for arrival in nuscenes_rhythm(40) if arrival.camera != 3]
    matcher = make_matcher()
    waits = []
    for arrival in arrivals:
        # Without polling, no round is released by its deadline.
        rounds = matcher.add(arrival.camera, arrival.stamp_ns, arrival.truth, arrival.now_ns)
        waits += [matched.messages[4] for matched in rounds if arrival.truth == matched.messages[4]]
    assert len(waits) >= 34


def test_unusable_messages_are_counted_and_have_no_effect() -> None:
    arrivals = nuscenes_rhythm(40)
    extra = [
        Arrival(arrivals[60].now_ns, 1, 0, -1),  # no stamp
        Arrival(arrivals[61].now_ns, *arrivals[60][1:]),  # duplicate
        Arrival(arrivals[100].now_ns, 2, arrivals[0].stamp_ns, -1),  # too late
        Arrival(arrivals[150].now_ns, 4, START + 10**15, -1),  # one stamp in the far future
    ]
    matcher = make_matcher()
    rounds = play(matcher, sorted([*arrivals, *extra]))
    assert sum(matched.is_complete for matched in rounds) >= 39
    assert all(len(truths(matched)) == 1 for matched in rounds)
    assert not any(matched.after_jump for matched in rounds[1:])
    counts = matcher.counts
    assert counts["zero_stamp"] == 1
    assert counts["duplicate"] + counts["late"] >= 2
    assert counts["backward_jump"] == 0


def test_looped_bag_continues_immediately_even_after_a_camera_was_lost() -> None:
    loop = nuscenes_rhythm(30)
    silent = [a for a in loop if not (a.camera == 2 and a.truth >= 15)]
    span = 3000 * MS
    again = [Arrival(a.now_ns + span, a.camera, a.stamp_ns, 100 + a.truth) for a in loop]
    matcher = make_matcher()
    rounds = play(matcher, sorted([*silent, *again]))
    second = [matched for matched in rounds if min(truths(matched)) >= 100]
    assert [truths(matched) for matched in second] == [{100 + n} for n in range(30)]
    assert [matched.after_jump for matched in second] == [True] + [False] * 29
    assert matcher.counts["backward_jump"] == 1


def test_late_messages_of_the_previous_loop_are_dropped() -> None:
    loop = nuscenes_rhythm(30)
    again = [
        Arrival(loop[-1].now_ns + 5 * MS + a.now_ns - loop[0].now_ns, a.camera, a.stamp_ns, 100 + a.truth)
        for a in loop
    ]
    # The end of the previous loop of camera 4 arrives after the others have started the next loop.
    tail = [
        Arrival(again[4].now_ns + i, *a[1:])
        for i, a in enumerate(x for x in loop if x.camera == 4 and x.truth > 27)
    ]
    head = [a for a in loop if not (a.camera == 4 and a.truth > 27)]
    matcher = make_matcher()
    rounds = play(matcher, sorted([*head, *tail, *again]))
    numbers = [truths(matched) for matched in rounds]
    assert all(len(number) == 1 for number in numbers)
    assert sum(matched.is_complete and min(truths(matched)) > 100 for matched in rounds) == 29
    assert matcher.counts["backward_jump"] == 1
    assert matcher.counts["stale"] == 2


def test_camera_with_a_wrong_clock_is_excluded_and_reported() -> None:
    arrivals = nuscenes_rhythm(60)
    shifted = [a._replace(stamp_ns=a.stamp_ns + 10**12) if a.camera == 3 else a for a in arrivals]
    for offsets in (None, OFFSETS):
        matcher = make_matcher(offsets=offsets)
        rounds = play(matcher, shifted)
        assert len(rounds) >= 59
        assert all(matched.messages[3] is None and len(truths(matched)) == 1 for matched in rounds)
        assert matcher.counts["wrong_clock"] > 0
        assert "back: its stamps are 1000.0 s ahead of those of the other cameras" in matcher.warnings()[0]


def test_clock_step_of_one_camera_does_not_start_a_new_stream() -> None:
    arrivals = nuscenes_rhythm(60)
    stepped = [
        a._replace(stamp_ns=a.stamp_ns - 2000 * MS) if a.camera == 3 and a.truth >= 30 else a
        for a in arrivals
    ]
    matcher = make_matcher()
    rounds = play(matcher, stepped)
    assert len(rounds) == 60
    assert sum(matched.is_complete for matched in rounds) == 30
    assert matcher.counts["backward_jump"] == 0


def test_clock_step_of_two_cameras_does_not_block_the_others() -> None:
    arrivals = nuscenes_rhythm(120)
    stepped = [
        a._replace(stamp_ns=a.stamp_ns - 2000 * MS) if a.camera < 2 and a.truth >= 30 else a for a in arrivals
    ]
    rounds = play(make_matcher(), stepped)
    assert truths(rounds[-1]) == {119}


def test_camera_that_starts_late_joins() -> None:
    arrivals = [a for a in nuscenes_rhythm(120) if a.camera != 5 or a.truth >= 70]
    rounds = play(make_matcher(offsets=None), arrivals)
    assert [truths(matched) for matched in rounds] == [{n} for n in range(120)]
    assert sum(matched.is_complete for matched in rounds) == 120 - 70 - 5


def test_slop_that_is_too_large_is_limited() -> None:
    matcher = make_matcher(slop_ms=30)
    play(matcher, nuscenes_rhythm(20))
    assert matcher.slop_ns <= 0.45 * 50 * MS
    assert [event for event in matcher.take_events() if "sync_slop_s of 30 ms is limited to 2" in event]
    good = make_matcher(slop_ms=15)
    play(good, nuscenes_rhythm(20))
    assert good.slop_ns == 15 * MS and good.take_events() == []


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    offset_ms=st.floats(0, 43),
    drop=st.floats(0, 0.15),
    regular=st.booleans(),
)
def test_offset_is_estimated_from_stamps(seed: int, offset_ms: float, drop: float, regular: bool) -> None:
    random = np.random.default_rng(seed)
    triggers = START + np.cumsum([500] * 20 if regular else [50, 100] * 10) * MS

    def stamps(offset: float) -> list[int]:
        jittered = triggers + np.round((offset + random.uniform(-1, 1, 20)) * MS).astype(np.int64)
        return [int(stamp) for stamp in jittered if random.random() >= drop]

    estimate = estimate_offset_ns(stamps(0.0), stamps(offset_ms))
    assert estimate is not None
    assert abs(estimate - offset_ms * MS) < 2.1 * MS


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    period_ms=st.sampled_from((33, 50, 100, 200, 500)),
    shares=st.lists(st.floats(0, 0.45), min_size=2, max_size=6),
    stamps=st.integers(2, 12),
)
def test_offsets_of_a_round_fit_in_the_shortest_time(
    seed: int, period_ms: int, shares: list[float], stamps: int
) -> None:
    """The pairwise offset of half a period has two signs; a third camera between both decides."""
    random = np.random.default_rng(seed)
    true_ms = [0.0, *(share * period_ms for share in shares), 0.25 * period_ms, 0.5 * period_ms]
    triggers = START + np.arange(stamps) * period_ms * MS
    rows = [
        [int(t) for t in triggers + np.round((ms + random.uniform(-0.4, 0.4, stamps)) * MS).astype(np.int64)]
        for ms in true_ms
    ]
    found = estimate_offsets_ns(rows, 2)
    assert None not in found
    errors = [(offset or 0) - ms * MS for offset, ms in zip(found, true_ms, strict=True)]
    assert max(errors) - min(errors) < 2 * MS


def test_one_delayed_image_is_not_another_rate() -> None:
    regular = [START + number * 83 * MS for number in range(6)]
    delayed = [*regular[:3], regular[3] + 32 * MS, *regular[4:]]  # intervals 115 and 51 ms
    assert different_rates(["a", "b"], [regular, delayed]) is None
    fast = [START + number * 40 * MS for number in range(12)]
    assert different_rates(["a", "b"], [regular, fast]) == "b sends an image every 40 ms and a every 83 ms"


def test_offsets_are_relative_to_the_camera_with_the_most_stamps() -> None:
    triggers = [START + k * 100 * MS for k in range(10)]
    offsets = estimate_offsets_ns(
        [triggers[:7], [t + 8 * MS for t in triggers], triggers[:2], [t * 3 for t in triggers]]
    )
    assert offsets == [-8 * MS, 0, None, None]


def test_invalid_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="5 time offsets for 6 cameras"):
        make_matcher(offsets=OFFSETS[:5])
    with pytest.raises(ValueError, match="min_cameras 7 of 6"):
        make_matcher(min_cameras=7)
    with pytest.raises(ValueError, match="deadline 0 ns"):
        RoundMatcher(num_cameras=1, slop_ns=0, deadline_ns=0)


class Source(message_filters.SimpleFilter):  # type: ignore[misc]
    def send(self, stamp_ns: int) -> None:
        message = SimpleNamespace(header=make_header(RCLPY, stamp_ns, ""))
        self.signalMessage(message)


def test_filter_continues_after_a_callback_raises() -> None:
    sources = [Source() for _ in CAMERAS]
    errors: list[Exception] = []
    rounds: list[MatchedRound[object]] = []
    clock = [0]
    surround = SurroundSynchronizer(sources, make_matcher(), now_ns=lambda: clock[0], on_error=errors.append)

    def fail_first(matched: MatchedRound[object]) -> None:
        rounds.append(matched)
        if len(rounds) == 1:
            raise RuntimeError("broken callback")

    surround.registerCallback(fail_first)
    for number in range(2):
        for source, offset in zip(sources, OFFSETS, strict=True):
            source.send(START + number * 100 * MS + offset)
    assert [matched.is_complete for matched in rounds] == [True, True]
    assert [str(error) for error in errors] == ["broken callback"]
    for source, offset in zip(sources[:4], OFFSETS[:4], strict=True):
        source.send(START + 200 * MS + offset)
    clock[0] = 100 * MS
    surround.poll()
    assert [matched.is_complete for matched in rounds] == [True, True, False]
