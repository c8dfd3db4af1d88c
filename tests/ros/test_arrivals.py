# SPDX-License-Identifier: Apache-2.0
"""Images decoded and scaled on arrival: the same rounds, each image decoded once, bounded memory."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftkd_core.errors import UserError
from ftkd_core.types import PreparedImage
from ftkd_ros.convert.calibration import CameraGeometry
from ftkd_ros.convert.images import RgbImage, encode_jpeg
from ftkd_ros.sync.arrivals import SLOTS, ArrivingImages
from ftkd_ros.sync.assembly import RoundBuilder
from ftkd_ros.sync.matcher import MatchedRound

CAMERAS = ("a", "b", "c")


class PlainRig:
    """A rig whose geometry is always known."""

    cameras = CAMERAS

    def global_from_ego(self, stamp_ns: int, wait_until: float) -> Any:
        return np.eye(4)

    def geometry(self, *_: Any) -> CameraGeometry:
        return CameraGeometry(intrinsics=np.eye(3), ego_from_camera=np.eye(4), global_from_ego=np.eye(4))


def jpeg_message(seed: int) -> Any:
    random = np.random.default_rng(seed)
    content = encode_jpeg(random.integers(0, 256, (8, 16, 3), dtype=np.uint8))
    return SimpleNamespace(header=SimpleNamespace(frame_id="x"), data=content, format="jpeg")


def make_builder(prepared: list[int] | None = None) -> RoundBuilder:
    def prepare(camera: int, image: RgbImage) -> tuple[PreparedImage, ...]:
        assert prepared is not None
        prepared.append(camera)
        return (PreparedImage(None, image[:4, :4]),)

    return RoundBuilder(
        PlainRig(), topics=CAMERAS, num_views=3, prepare=None if prepared is None else prepare
    )


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as executor:
        yield executor


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 5)), max_size=12))
def test_rounds_are_the_same_whatever_arrived_before(arrivals: list[tuple[int, int]]) -> None:
    messages = [[jpeg_message(10 * camera + index) for index in range(6)] for camera in range(3)]
    early, late = make_builder(), make_builder()
    for camera, index in arrivals:
        early.arrive(camera, messages[camera][index])
    for index in (5, 3, 5):
        matched = MatchedRound(messages=tuple(m[index] for m in messages), stamps_ns=(1, 2, 3))
        pairs = zip(
            early.build(matched).camera_round.views, late.build(matched).camera_round.views, strict=True
        )
        for a, b in pairs:
            assert a is not None and b is not None and np.array_equal(a.image, b.image)
    early.close()
    late.close()


def test_an_image_that_arrived_is_decoded_and_prepared_once() -> None:
    prepared: list[int] = []
    builder, messages = make_builder(prepared), [jpeg_message(camera) for camera in range(3)]
    builder.arrive(0, messages[0])
    builder.arrive(2, messages[2])
    matched = MatchedRound(messages=tuple(messages), stamps_ns=(1, 2, 3))
    views = builder.build(matched).camera_round.views
    builder.build(matched)  # one image may be in several rounds
    builder.close()
    assert sorted(prepared) == [0, 1, 1, 2]  # camera 1 did not arrive before its round
    assert all(view is not None and view.prepared[0].image.shape == (4, 4, 3) for view in views)


def test_a_damaged_image_masks_its_camera_only() -> None:
    builder, messages = make_builder(), [jpeg_message(camera) for camera in range(3)]
    messages[1].data = messages[1].data[:40]
    for camera, message in enumerate(messages):
        builder.arrive(camera, message)
    built = builder.build(MatchedRound(messages=tuple(messages), stamps_ns=(1, 2, 3)))
    builder.close()
    assert list(built.faults) == ["b"] and "truncated" in built.faults["b"]
    assert [view is None for view in built.camera_round.views] == [False, True, False]


def test_newer_images_replace_older_ones(pool: ThreadPoolExecutor) -> None:
    gate, decoded = threading.Event(), []

    def decode(camera: int, message: object) -> object:
        gate.wait(5)
        decoded.append(message)
        return message

    arriving = ArrivingImages(pool, decode, 1)
    messages = [object() for _ in range(20)]
    for message in messages:
        arriving.add(0, message)
    gate.set()
    newest = [arriving.take(0, message).result(5) for message in messages[-SLOTS:]]
    assert newest == messages[-SLOTS:]
    assert len(decoded) <= 2 + SLOTS  # the pool's two threads had begun; the others were cancelled
    assert arriving.take(0, messages[5]).result(5) is messages[5]  # dropped, so decoded now
    arriving.clear()


def test_errors_of_preparation_are_errors_of_the_round() -> None:
    def fail(camera: int, image: RgbImage) -> tuple[PreparedImage, ...]:
        raise UserError("no")

    builder = RoundBuilder(PlainRig(), topics=CAMERAS, num_views=3, prepare=fail)
    with pytest.raises(UserError, match="no"):
        builder.build(MatchedRound(messages=(jpeg_message(0), None, None), stamps_ns=(1, None, None)))
    builder.close()
