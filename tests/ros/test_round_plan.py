# SPDX-License-Identifier: Apache-2.0
"""Rounds of a bag: the policies of the node, without a deadline and with offsets from all stamps."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftkd_core.errors import UserError
from ftkd_ros.bag.round_plan import ImageStamp, iterate_with_contents, plan_rounds, select_rounds
from ftkd_ros.node.matchers import make_matcher
from ftkd_ros.node.parameters import DetectorParameters
from ftkd_ros.sync.matcher import MatchedRound

MS = 1_000_000
START = 1_700_000_000 * 1000 * MS
THREE = DetectorParameters(cameras=("a", "b", "c"))
TOPICS = ("/a/image", "/b/image", "/c/image")


def images(periods_ms: tuple[float, ...], *, seconds: float = 4.0, lag_ms: float = 30.0) -> list[ImageStamp]:
    """Return images of cameras with these periods, 5 ms apart, that arrive after `lag_ms`."""
    found = [
        ImageStamp(camera, stamp, stamp + round(lag_ms * MS))
        for camera, period in enumerate(periods_ms)
        for number in range(int(seconds * 1000 / period))
        if (stamp := START + round((number * period + 5 * camera) * MS))
    ]
    return sorted(found, key=lambda image: image.log_ns)


def test_equal_rates_use_surround_and_every_image() -> None:
    plan = plan_rounds(images((100, 100, 100)), THREE, TOPICS)
    assert (plan.policy, len(plan.rounds), plan.faults) == ("surround", 40, {})
    assert all(matched.is_complete for matched in plan.rounds)
    offsets = [offset for offset in plan.offsets_ns if offset is not None]
    assert np.diff(offsets).tolist() == [5 * MS, 5 * MS]


def test_different_rates_use_the_rounds_of_the_node() -> None:
    """Rounds of `auto` equal those of the node's matcher, fed in the order of arrival."""
    given_images = images((100, 50, 100))
    plan = plan_rounds(given_images, THREE, TOPICS)
    matcher = make_matcher(THREE)
    live = [
        matched
        for index, image in enumerate(given_images)
        for matched in matcher.add(image.camera, image.stamp_ns, index, image.log_ns)
    ]
    assert plan.policy == "anchor"
    assert plan.rounds == live and len(live) >= 35


def test_drifting_clock_is_followed() -> None:
    """At 500 ppm a clock drifts by more than the slop within a minute."""
    steady = images((100, 100, 100), seconds=90)
    drifting = [
        image._replace(stamp_ns=image.stamp_ns + round((image.stamp_ns - START) * 500e-6))
        if image.camera
        else image
        for image in steady
    ]
    plan = plan_rounds(drifting, replace(THREE, sync_policy="surround"), TOPICS)
    assert sum(matched.is_complete for matched in plan.rounds) >= 0.95 * 900


@pytest.mark.parametrize(("policy", "rounds"), [("exact", 0), ("approximate", 38)])
def test_stock_filters_can_be_selected(policy: str, rounds: int) -> None:
    plan = plan_rounds(images((100, 100, 100)), replace(THREE, sync_policy=policy), TOPICS)
    assert plan.policy == policy and len(plan.rounds) >= rounds
    assert bool(plan.rounds) == bool(rounds)


def test_minimum_of_cameras_is_required() -> None:
    without_c = [image for image in images((100, 100, 100)) if image.camera < 2]
    assert len(plan_rounds(without_c, THREE, TOPICS).rounds) == 40
    assert plan_rounds(without_c, replace(THREE, min_cameras=3), TOPICS).rounds == []


@given(
    rounds=st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=4, unique=True), max_size=12),
)
def test_contents_belong_to_their_rounds_in_any_order(rounds: list[list[int]]) -> None:
    matched = [MatchedRound(messages=tuple(r), stamps_ns=tuple(r)) for r in rounds]
    contents = ((index, f"image {index}") for index in range(31))
    found = list(iterate_with_contents(matched, contents))
    assert [list(r.messages) for r in found] == [[f"image {index}" for index in r] for r in rounds]


def test_jump_before_a_part_is_kept() -> None:
    rounds = [MatchedRound(messages=(n,), stamps_ns=(n,), after_jump=n == 3) for n in range(6)]
    stamps = [n * 1000 * MS for n in range(6)]
    chosen = select_rounds(rounds, stamps, 0.0, None, 2)
    assert [(r.stamps_ns[0], r.after_jump) for r in chosen] == [(0, False), (2, False), (4, True)]
    with pytest.raises(UserError, match="no round from 9 s on"):
        select_rounds(rounds, stamps, 9.0, None, 1)
