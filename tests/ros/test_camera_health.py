# SPDX-License-Identifier: Apache-2.0
"""State of the cameras: images that are missing between stamps, and loss in the transport."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftkd_ros.node.camera_health import CameraHealth, missed_share, transport_warning

CAMERAS = ("front", "left", "right", "back")
MS = 1_000_000


def stamps(loss: float, seed: int, *, alternating: bool = False, rate_hz: float = 12.0) -> list[int]:
    random = np.random.default_rng(seed)
    periods = np.tile([50.0, 100.0], 60) if alternating else np.full(120, 1e3 / rate_hz)
    times = np.cumsum(periods) + random.uniform(-1, 1, 120)
    return [round(t * MS) for t in times[random.random(120) >= loss]]


@settings(max_examples=40, deadline=None)
@given(loss=st.floats(0, 0.2), seed=st.integers(0, 999), rate=st.floats(5, 60), alternating=st.booleans())
def test_share_of_missing_images_is_measured(loss: float, seed: int, rate: float, alternating: bool) -> None:
    kept = stamps(loss, seed, rate_hz=rate, alternating=alternating)
    true = 1 - len(kept) / 120
    found = missed_share(kept)
    # A gap of one short interval of an alternating trigger looks like a long interval.
    assert found == pytest.approx(true, abs=0.02) or (alternating and found <= true + 0.02)
    if len(kept) == 120:
        assert found == 0


def health(losses: dict[str, float]) -> CameraHealth:
    cameras = CameraHealth(CAMERAS)
    for number, camera in enumerate(CAMERAS):
        for stamp in stamps(losses.get(camera, 0.0), number):
            cameras.add(camera, stamp * 1e-9, stamp)
    return cameras


@pytest.mark.parametrize(
    ("losses", "named"),
    [
        ({}, False),
        (dict.fromkeys(CAMERAS, 0.11), True),
        ({"front": 0.3}, False),  # one driver that drops
        (dict.fromkeys(CAMERAS[:3], 0.1), True),
    ],
)
def test_loss_in_the_transport_is_named(losses: dict[str, float], named: bool) -> None:
    cameras = health(losses)
    warning = transport_warning(cameras.states(10.0, 10 * 10**9, 10.0, {}))
    assert (warning is not None) is named
    if warning is not None:
        assert "the transport seems to lose images" in warning


def test_an_outage_is_not_loss_in_the_transport() -> None:
    cameras = CameraHealth(CAMERAS)
    for camera in CAMERAS:
        for stamp in stamps(0.0, 1):
            if not 3_000 * MS < stamp < 5_500 * MS:
                cameras.add(camera, stamp * 1e-9, stamp)
    assert transport_warning(cameras.states(10.0, 10 * 10**9, 10.0, {})) is None
