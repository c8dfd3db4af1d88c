# SPDX-License-Identifier: Apache-2.0
"""The fast engine compared with the plain one, and its reaction to changed rigs, masks and image sizes."""

import dataclasses

import numpy as np
import pytest
import torch

from ftkd_core.data.synthetic.rig import nuscenes_rig
from ftkd_core.evaluation.detector_benchmark import compare_detectors, driving_rounds
from ftkd_core.runtime.detector import Detector
from ftkd_core.runtime.fast import FastEngine
from ftkd_core.types import CameraRound
from tests.core.rounds import fast_detector, make_detector, make_round, turn_camera


def assert_same_detections(first: Detector, second: Detector, camera_round: CameraRound) -> None:
    a, b = first.step(camera_round), second.step(camera_round)
    assert np.array_equal(a.scores, b.scores)
    assert np.array_equal(a.boxes, b.boxes)


ENGINES = [
    {},
    {"device_images": True},
    pytest.param({"dtype": torch.float16}, id="float16"),
    pytest.param({"dtype": torch.bfloat16}, id="bfloat16"),
]
LEAST_WITHIN = {torch.float16: 0.99, torch.bfloat16: 0.8}
"""Lowest fraction of equal boxes. Measured: 0.89 in bfloat16 on a processor with native bfloat16 products
(AMX), where no box differs by more than 3 cm."""


@pytest.mark.parametrize("arguments", ENGINES)
def test_fast_engine_equals_the_plain_one_over_a_stream(arguments: dict[str, object]) -> None:
    rounds = [make_round(index) for index in range(6)]
    plain, fast = make_detector(runtime="plain"), fast_detector(**arguments)
    agreement = compare_detectors(plain, fast, rounds, top=20)
    assert agreement.compared == 120
    if "dtype" in arguments:
        assert agreement.unmatched <= 1
        assert agreement.within >= LEAST_WITHIN[arguments["dtype"]]  # type: ignore[index]
    else:
        assert agreement.unmatched == 0
        assert agreement.center_m < 0.02 and agreement.score < 0.002


def test_shipped_detector_equals_its_plain_twin() -> None:
    """Uses a rendered drive: in noise images many peaks have equal scores, and rounding would select among
    them."""
    fast, plain = (
        Detector.from_weights(device="cpu", runtime=runtime, score_threshold=0.0)
        for runtime in ("fast", "plain")
    )
    agreement = compare_detectors(plain, fast, driving_rounds(6, nuscenes_rig()))
    assert agreement.unmatched == 0 and agreement.within == 1
    assert agreement.center_m < 0.01 and agreement.score < 0.005


def test_rig_is_encoded_once_and_again_after_a_change() -> None:
    detector = make_detector()
    engine = detector.engine
    assert isinstance(engine, FastEngine)
    for index in range(3):  # the vehicle moves, the rig is constant
        detector.step(make_round(index))
    assert engine.rigs_encoded == 1
    turned = turn_camera(make_round(3))
    for camera_round, count in ((turned, 2), (turn_camera(make_round(4)), 2), (make_round(5, missing=1), 3)):
        detector.step(camera_round)
        assert engine.rigs_encoded == count


@pytest.mark.parametrize("device_images", [False, True])
@pytest.mark.parametrize(
    "change", [turn_camera, lambda _: make_round(1, missing=4), lambda _: make_round(1, size=(96, 80))]
)
def test_change_between_rounds_takes_effect_immediately(change: object, device_images: bool) -> None:
    """An engine that has seen another rig computes the same as a new engine."""
    used, fresh = (fast_detector(device_images=device_images) for _ in range(2))
    used.step(make_round(0))
    used.reset()
    changed = change(make_round(1))  # type: ignore[operator]
    assert_same_detections(used, fresh, changed)
    assert_same_detections(used, fresh, make_round(2))  # and back to the first rig


def test_reset_starts_a_new_stream_immediately() -> None:
    used, fresh = make_detector(), make_detector()
    for index in range(3):
        used.step(make_round(index))
    assert not np.array_equal(used.step(make_round(0)).scores, make_detector().step(make_round(0)).scores)
    used.reset()
    for index in range(2):
        assert_same_detections(used, fresh, make_round(index))


def test_started_step_can_be_fetched_later() -> None:
    detector = make_detector()
    wait = detector.start(make_round(0))
    assert np.array_equal(wait().scores, make_detector().step(make_round(0)).scores)


def test_read_only_and_mirrored_images_are_accepted() -> None:
    good = make_round(0)
    views = []
    for view in good.views:
        assert view is not None
        flipped = view.image[:, :, ::-1].copy()
        flipped.flags.writeable = False
        views.append(dataclasses.replace(view, image=flipped[:, :, ::-1]))
    strange = dataclasses.replace(good, views=tuple(views))
    plain, odd = (fast_detector(device_images=True).step(r) for r in (good, strange))
    assert np.array_equal(plain.scores, odd.scores)
