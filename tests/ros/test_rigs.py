# SPDX-License-Identifier: Apache-2.0
"""Synchronization of rigs that are not nuScenes: rates, clocks, faults; pure logic and hypothesis."""

import dataclasses
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import sync
from benchmarks.sync import CAMERAS, MS, NUSCENES_MS, SECOND, START_NS, Case, Image
from ftkd_ros.sync.anchor import AnchorMatcher
from ftkd_ros.sync.clock_check import FROZEN, WRONG_CLOCK, ZERO, ClockCheck
from ftkd_ros.sync.phases import PhaseMonitor
from ftkd_ros.sync.surround import SurroundMatcher


def judge(case: Case) -> tuple[Any, dict[str, int], int]:
    """Return (matcher, figures, messages held) of policy auto."""
    images = sync.simulate(case)
    matcher = sync.make_auto()
    rounds, held = sync.play(matcher, images)
    return matcher, sync.score(case, images, rounds), held


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    rate=st.sampled_from((2.0, 5.0, 10.0, 12.0, 20.0, 30.0, 60.0)),
    span=st.floats(0, 0.6),  # of the period; the last of the six cameras is at 5/6 of it
    drop=st.floats(0, 0.05),
    absent=st.sampled_from(((), (0,), (3,), (1, 4))),
    seed=st.integers(0, 2**31),
)
def test_every_complete_round_is_found_at_any_rate(
    rate: float, span: float, drop: float, absent: tuple[int, ...], seed: int
) -> None:
    period = 1e3 / rate
    case = Case(
        name="",
        rates_hz=(rate,),
        seconds=40 / rate,
        offsets_ms=tuple(span * period * index / 6 for index in range(6)),
        jitter_ms=min(0.5, 0.02 * period),
        delay_ms=min(20.0, 0.5 * period),
        drop=drop,
        absent=absent,
        seed=seed,
    )
    matcher, figures, held = judge(case)
    assert matcher.policy == "surround"
    assert figures["mixed"] == 0
    assert figures["found"] >= figures["complete_rounds"] - (drop > 0)  # a drop in the first second costs one
    assert held <= 6 * 16


@pytest.mark.parametrize("rate", [2.0, 10.0, 19.0, 30.0, 60.0])
@pytest.mark.parametrize("absent", [(), (0,), (5,)])
def test_first_round_comes_within_a_second_even_without_one_camera(
    rate: float, absent: tuple[int, ...]
) -> None:
    images = sync.simulate(Case(name="", rates_hz=(rate,), seconds=3.0, absent=absent, delay_ms=2.0))
    matcher = sync.make_auto()
    clock = images[0].now_ns
    released = []
    for image in images:
        while not released and clock + 10 * MS < image.now_ns:
            clock += 10 * MS
            released += matcher.poll(clock)
        if not released:
            clock = image.now_ns
            released += matcher.add(image.camera, image.stamp_ns, image, image.now_ns)
        if released:
            assert clock - images[0].now_ns <= SECOND
            return
    raise AssertionError("no round")


def test_given_offsets_that_contradict_the_stamps_are_replaced_and_reported() -> None:
    images = sync.simulate(Case(name="", seconds=25.0))  # equal stamps
    matcher: SurroundMatcher[Image] = SurroundMatcher(
        CAMERAS,
        slop_ns=20 * MS,
        deadline_ns=100 * MS,
        offsets_ns=[round(offset * MS) for offset in NUSCENES_MS],
        min_cameras=3,
    )
    rounds, _ = sync.play(matcher, images)
    late = [matched for matched in rounds if max(filter(None, matched.stamps_ns)) > START_NS + 2 * SECOND]
    assert late and all(matched.is_complete for matched in late)
    assert any("camera_time_offsets_s contradicts the stamps" in text for text in matcher.warnings())
    assert any("does not fit its stamps" in event for event in matcher.take_events())


def test_given_offsets_that_fit_are_kept() -> None:
    images = sync.simulate(Case(name="", nuscenes=True, offsets_ms=NUSCENES_MS, seconds=20.0, drop=0.05))
    given_ns = [round(offset * MS) for offset in NUSCENES_MS]
    matcher: SurroundMatcher[Image] = SurroundMatcher(
        CAMERAS, slop_ns=20 * MS, deadline_ns=100 * MS, offsets_ns=given_ns, min_cameras=3
    )
    sync.play(matcher, images)
    assert matcher.warnings() == []
    differences = [
        now - given for now, given in zip(matcher.offsets_ns, given_ns, strict=True) if now is not None
    ]
    assert max(differences) - min(differences) < MS


@pytest.mark.parametrize("drift_ppm", [50.0, -200.0])
def test_drift_of_a_clock_is_tracked_and_reported(drift_ppm: float) -> None:
    case = Case(
        name="",
        rates_hz=(10.0,),
        seconds=1200.0,
        drift_ppm=(0.0, drift_ppm, 0.0, 0.0, 0.0, 0.0),
        jitter_ms=1.0,
    )
    matcher, figures, _ = judge(case)
    assert matcher.policy == "surround"
    assert figures["found"] == figures["complete_rounds"] and figures["mixed"] == 0
    (warning,) = matcher.warnings()
    assert warning.startswith("front_right: its stamps have drifted by")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"clock_shift_s": {2: 3600.0}}, "3600.0 s ahead of those of the other cameras"),
        ({"clock_shift_s": {2: -2.0}}, "2.0 s behind those of the other cameras"),
        ({"frozen": (2,)}, "its stamp has not changed for"),
    ],
)
def test_wrong_clock_is_left_out_and_named(change: dict[str, Any], text: str) -> None:
    case = dataclasses.replace(Case(name="", seconds=10.0), **change)
    matcher, figures, _ = judge(case)
    assert figures["found"] == figures["complete_rounds"] and figures["mixed"] == 0
    assert text in matcher.fault(2)
    assert all(matcher.fault(camera) is None for camera in (0, 1, 3, 4, 5))


@pytest.mark.parametrize("stamp", [0, START_NS])
def test_zero_or_frozen_stamps_of_all_cameras_are_named(stamp: int) -> None:
    matcher = sync.make_auto()
    for number in range(20):
        for camera in range(6):
            image = Image(START_NS + number * 83 * MS, camera, stamp, number)
            assert len(matcher.add(camera, stamp, image, image.now_ns)) <= 1
    text = "its stamps are zero" if stamp == 0 else "its stamp has not changed"
    assert all(text in str(matcher.fault(camera)) for camera in range(6))
    assert matcher.held <= 6 * 3


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (Case(name="", rates_hz=(10.0, 20.0, 30.0), seconds=10.0), "sends an image every"),
        (
            Case(name="", rates_hz=(10.0,), free_running=True, seconds=60.0),
            "no common trigger|no constant offset",
        ),
    ],
)
def test_auto_chooses_anchor_and_logs_why(case: Case, reason: str) -> None:
    matcher, figures, _ = judge(case)
    assert matcher.policy == "anchor"
    assert figures["found"] >= 0.98 * figures["complete_rounds"] and figures["mixed"] == 0
    (event,) = [
        event for event in matcher.take_events() if event.startswith("sync_policy auto: anchor at the")
    ]
    assert any(part in event for part in reason.split("|"))


def make_anchor(min_cameras: int = 2) -> AnchorMatcher[int]:
    return AnchorMatcher(CAMERAS[:3], anchor=0, max_difference_ns=150 * MS, min_cameras=min_cameras)


@settings(max_examples=60, deadline=None)
@given(
    periods=st.tuples(*[st.integers(17, 200)] * 3),
    phases=st.tuples(*[st.integers(0, 200)] * 3),
)
def test_anchor_round_has_the_newest_image_of_each_camera(
    periods: tuple[int, int, int], phases: tuple[int, int, int]
) -> None:
    images = sorted(
        (START_NS + (phase + number * period) * MS, camera)
        for camera, (period, phase) in enumerate(zip(periods, phases, strict=True))
        for number in range(3000 // period)
    )
    matcher = make_anchor(min_cameras=1)
    newest: dict[int, int] = {}
    for stamp, camera in images:
        newest[camera] = stamp
        rounds = matcher.add(camera, stamp, stamp, stamp)
        assert len(rounds) == (camera == 0) or matcher.acting_anchor != CAMERAS[0]
        for matched in rounds:
            expected = tuple(s if (s := newest.get(c)) and stamp - s <= 150 * MS else None for c in range(3))
            assert matched.stamps_ns == expected == matched.messages
            assert matched.anchor_ns == stamp
    assert matcher.held <= 3


def test_another_camera_takes_the_place_of_a_dead_anchor_until_it_is_back() -> None:
    matcher = make_anchor()
    anchors = []
    for number in range(60):
        for camera in range(3):
            if camera == 0 and 10 <= number < 40:
                continue
            now = START_NS + (number * 100 + camera) * MS
            anchors += [(number, matcher.acting_anchor) for _ in matcher.add(camera, now, number, now)]
    assert {anchor for number, anchor in anchors if 20 <= number < 40} <= {"front_right", "front_left"}
    assert {anchor for number, anchor in anchors if number > 41} == {"front"}
    assert len([number for number, _ in anchors if 20 <= number < 40]) == 20
    assert len(matcher.take_events()) == 2


def test_clock_check_forgives_a_loop_and_a_short_delay() -> None:
    check = ClockCheck(3)
    for number in range(40):
        for camera in range(3):
            stamp = START_NS + (number % 20) * 100 * MS
            assert check.add(camera, stamp, START_NS + number * 100 * MS + camera) is None
    for number in range(5):
        assert check.add(0, START_NS + (21 + number) * 100 * MS, START_NS + 10 * SECOND + number) is None
    assert check.fault(0) is None


def test_clock_check_names_its_reasons() -> None:
    check = ClockCheck(2)
    assert check.add(0, 0, START_NS) == ZERO
    reasons = [check.add(0, START_NS, START_NS + number * 100 * MS) for number in range(6)]
    assert reasons[0] is None and reasons[-1] == FROZEN
    check.clear()
    found = []
    for number in range(10):
        now = START_NS + number * 100 * MS
        check.add(0, now, now)
        found.append(check.add(1, now + 5 * SECOND, now))
    assert found[-1] == WRONG_CLOCK and found[0] is None


def test_phases_tell_a_clock_from_a_free_running_camera() -> None:
    clock, free = PhaseMonitor(2), PhaseMonitor(2)
    clock_moved, free_moved = 0.0, 0.0
    for number in range(400):
        shift = number * MS // 10
        for camera in range(2):
            clock.add(camera, 10 * MS - camera * shift)
            free.add(camera, 10 * MS)
        clock_moved = clock.moved_ns([0.0, float(shift)]).get(1, 0.0)
        free_moved = free.moved_ns([0.0, float(shift)]).get(1, 0.0)
    assert abs(clock_moved) < 3 * MS < 15 * MS < free_moved


def test_benchmark_reports_the_fields_of_the_contract(tmp_path: Any) -> None:
    small = [Case(name="12 Hz", seconds=3.0), Case(name="drop", seconds=3.0, drop=0.05)]
    assert sync.main(["--json", str(tmp_path / "sync.json")], lambda: small) == 0
    import json

    rows = json.loads((tmp_path / "sync.json").read_text())
    fields = {"case", "policy", "complete_rounds", "found", "mixed", "partial", "held_max"}
    assert [set(row) for row in rows] == [fields] * 4
    assert [row["policy"] for row in rows] == ["surround", "approximate"] * 2
