# SPDX-License-Identifier: Apache-2.0
"""Pictures: changed pixels compared with an independent projection of the same box."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ftkd_core.boxes import box_corners
from ftkd_core.classes import CAMERA_CHANNELS, CLASS_NAMES
from ftkd_core.geometry import invert_rigid, make_transform, transform_points, yaw_transform
from ftkd_core.lens import Lens, project_pixels
from ftkd_core.types import CameraRound, CameraView, ObjectList
from ftkd_core.visualization import CLASS_COLORS, draw_bird_eye, draw_boxes, draw_surround, moved_to

OPTICAL_FROM_BODY = np.array([[0.0, -1.0, 0.0], [0.0, 0.0, -1.0], [1.0, 0.0, 0.0]])
EGO_FROM_CAMERA = make_transform(OPTICAL_FROM_BODY.T, (1.5, 0.0, 1.5))
INTRINSICS = np.array([[200.0, 0.0, 160.0], [0.0, 200.0, 90.0], [0.0, 0.0, 1.0]])


def objects(*boxes: tuple[float, ...], score: float = 1.0, label: int = 0, stamp_ns: int = 0) -> ObjectList:
    count = len(boxes)
    return ObjectList(
        boxes=np.array(boxes, dtype=np.float64).reshape(-1, 9),
        scores=np.full(count, score),
        labels=np.full(count, label, dtype=np.int64),
        stamp_ns=stamp_ns,
    )


def surround_round(missing: tuple[int, ...] = (), speed_m_s: float = 0.0, delay_ns: int = 0) -> CameraRound:
    views: list[CameraView | None] = []
    for index in range(len(CAMERA_CHANNELS)):
        yaw = {0: 0.0, 1: -np.pi / 3, 2: np.pi / 3, 3: np.pi, 4: 2 * np.pi / 3, 5: -2 * np.pi / 3}[index]
        view = CameraView(
            image=np.zeros((180, 320, 3), dtype=np.uint8),
            intrinsics=INTRINSICS,
            ego_from_camera=yaw_transform(yaw) @ EGO_FROM_CAMERA,
            global_from_ego=make_transform(None, (-speed_m_s * delay_ns * 1e-9, 0.0, 0.0)),
            stamp_ns=10**9 - delay_ns,
        )
        views.append(None if index in missing else view)
    return CameraRound(views=tuple(views), reference_stamp_ns=10**9, global_from_ego=np.eye(4))


def changed(image: NDArray[np.uint8]) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of the pixels that are not black."""
    rows, columns = np.nonzero(image.max(axis=2) > 60)
    return int(columns.min()), int(rows.min()), int(columns.max()), int(rows.max())


def test_box_is_drawn_at_its_projected_corners() -> None:
    car = objects((20.0, 2.0, 1.0, 4.0, 2.0, 1.6, 0.3, 0.0, 0.0))
    canvas = np.zeros((180, 320, 3), dtype=np.uint8)
    drawn = draw_boxes(canvas, car, INTRINSICS, invert_rigid(EGO_FROM_CAMERA), thickness=1, show_scores=False)
    corners = box_corners(car.boxes)[0] - np.array([1.5, 0.0, 1.5])
    u = 160 - 200 * corners[:, 1] / corners[:, 0]
    v = 90 - 200 * corners[:, 2] / corners[:, 0]
    expected = (u.min(), v.min(), u.max(), v.max())
    np.testing.assert_allclose(changed(drawn), expected, atol=1.5)
    assert not canvas.any(), "the input image must not be drawn on"


@settings(max_examples=20, deadline=None)
@given(st.floats(-60, 60), st.floats(4, 20))
def test_box_in_a_raw_image_is_drawn_through_the_lens(bearing_deg: float, distance: float) -> None:
    lens = Lens("equidistant", (0.02, -0.006, 0.001, -0.0002))
    bearing = np.deg2rad(bearing_deg)
    place = (1.5 + distance * np.cos(bearing), distance * np.sin(bearing), 1.5)
    box = objects((*place, 0.4, 0.4, 0.4, 0.0, 0.0, 0.0))
    canvas = np.zeros((180, 320, 3), dtype=np.uint8)
    camera_from_ego = invert_rigid(EGO_FROM_CAMERA)
    intrinsics = np.array([[100.0, 0.0, 160.0], [0.0, 100.0, 90.0], [0.0, 0.0, 1.0]])
    drawn = draw_boxes(canvas, box, intrinsics, camera_from_ego, thickness=1, show_scores=False, lens=lens)
    corners = transform_points(camera_from_ego, box_corners(box.boxes)[0])
    pixels, _ = project_pixels(corners, intrinsics, lens)
    np.testing.assert_allclose(changed(drawn), [*pixels.min(axis=0), *pixels.max(axis=0)], atol=1.5)


def test_fisheye_shows_boxes_beside_and_behind_the_camera() -> None:
    lens = Lens("equidistant", (0.0, 0.0, 0.0, 0.0))
    canvas = np.zeros((180, 320, 3), dtype=np.uint8)
    beside = objects((1.0, 6.0, 1.5, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0))  # 95 degrees to the left
    intrinsics = np.array([[80.0, 0.0, 160.0], [0.0, 80.0, 90.0], [0.0, 0.0, 1.0]])
    drawn = draw_boxes(canvas, beside, intrinsics, invert_rigid(EGO_FROM_CAMERA), lens=lens)
    left, _, right, _ = changed(drawn)
    assert 10 < left < right < 60


def test_rig_with_other_names_is_shown_in_its_order() -> None:
    camera_round = surround_round()
    for index, view in enumerate(camera_round.views):
        assert view is not None
        view.image[:] = 20 + 30 * index
    names = tuple(f"CAM_{index}" for index in range(4))
    four = CameraRound(views=camera_round.views[:4], reference_stamp_ns=10**9, global_from_ego=np.eye(4))
    picture = draw_surround(four, objects(), width=300, channels=names)
    assert picture.shape == (112, 300, 3)
    tiles = [picture[28 + 56 * row, 50 + 100 * column, 0] for row in range(2) for column in range(3)]
    assert tiles[:4] == [20, 50, 80, 110] and tiles[4] == tiles[5]


def test_a_box_behind_the_camera_draws_nothing() -> None:
    canvas = np.zeros((180, 320, 3), dtype=np.uint8)
    behind = objects((-20.0, 0.0, 1.0, 4.0, 2.0, 1.6, 0.0, 0.0, 0.0))
    assert not draw_boxes(canvas, behind, INTRINSICS, invert_rigid(EGO_FROM_CAMERA)).any()


def test_edges_behind_the_camera_are_clipped_not_mirrored() -> None:
    """A long box next to the camera that extends behind it must not appear on the other side of the image."""
    canvas = np.zeros((180, 320, 3), dtype=np.uint8)
    trailer = objects((1.5, 3.0, 1.5, 30.0, 2.0, 3.0, 0.0, 0.0, 0.0))
    drawn = draw_boxes(canvas, trailer, INTRINSICS, invert_rigid(EGO_FROM_CAMERA), show_scores=False)
    assert drawn[:, :150].any()
    assert not drawn[:, 162:].any()


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(
            *[st.floats(-60, 60)] * 2,
            st.floats(-3, 5),
            *[st.floats(0.05, 20)] * 3,
            st.floats(-4, 4),
            *[st.one_of(st.floats(-40, 40), st.just(float("nan")))] * 2,
        ),
        max_size=5,
    )
)
def test_any_box_can_be_drawn(boxes: list[tuple[float, ...]]) -> None:
    found = objects(*boxes)
    assert draw_surround(surround_round(), found, found, width=300).shape == (2 * 56, 300, 3)
    assert draw_bird_eye(found, found, size=200).shape == (200, 200, 3)


def test_surround_tiles_are_arranged_by_viewing_direction() -> None:
    pictures = {}
    for name, yaw in (("front", 0.0), ("left back", 2 * np.pi / 3), ("back", np.pi)):
        box = (15 * np.cos(yaw), 15 * np.sin(yaw), 1.0, 4.0, 2.0, 1.6, yaw, 0.0, 0.0)
        empty = draw_surround(surround_round(), objects(), width=960)
        picture = draw_surround(surround_round(), objects(box), width=960)
        rows, columns = np.nonzero(np.abs(picture.astype(int) - empty).max(axis=2) > 60)
        pictures[name] = (int(rows.mean()) // 180, int(columns.mean()) // 320)
    assert pictures == {"front": (0, 1), "left back": (1, 0), "back": (1, 1)}


def test_surround_accounts_for_motion_between_exposure_and_reference() -> None:
    """Ego and car drive side by side at 20 m/s, the exposure is 50 ms old, and the box is drawn at the car's
    position at exposure."""
    car = (15.0, 0.0, 1.0, 4.0, 2.0, 1.6, 0.0, 20.0, 0.0)
    moving = draw_surround(surround_round(speed_m_s=20.0, delay_ns=50_000_000), objects(car, stamp_ns=10**9))
    parked = draw_surround(surround_round(), objects((*car[:7], 0.0, 0.0), stamp_ns=10**9))
    np.testing.assert_array_equal(moving, parked)


def test_missing_view_is_a_tile_with_text() -> None:
    picture = draw_surround(surround_round(missing=(0,)), objects(), width=960)
    tile = picture[:180, 320:640]
    assert tile[70:110, 100:220].max() > 150, "the text 'no image'"
    assert draw_surround(surround_round(missing=tuple(range(6))), objects(), width=960).shape == (360, 960, 3)


def test_weak_detections_are_left_out() -> None:
    weak = objects((15.0, 0.0, 1.0, 4.0, 2.0, 1.6, 0.0, 0.0, 0.0), score=0.1)
    np.testing.assert_array_equal(
        draw_surround(surround_round(), weak), draw_surround(surround_round(), objects())
    )
    np.testing.assert_array_equal(draw_bird_eye(weak), draw_bird_eye(objects()))


def test_bird_eye_has_forward_up_and_left_on_the_left() -> None:
    for label, center in ((0, (30.0, 20.0)), (8, (-30.0, -10.0))):
        picture = draw_bird_eye(
            objects((*center, 0.0, 4.0, 4.0, 1.5, 0.0, 0.0, 0.0), label=label), size=400, range_m=50
        )
        color = np.array(CLASS_COLORS[CLASS_NAMES[label]])
        rows, columns = np.nonzero(np.abs(picture[:370].astype(int) - color).max(axis=2) < 30)
        assert abs(rows.mean() - (50 - center[0]) * 4) < 8
        assert abs(columns.mean() - (50 - center[1]) * 4) < 5


def test_moved_to_keeps_objects_of_unknown_velocity_in_place() -> None:
    nan = float("nan")
    two = objects((1.0, 2.0, 0, 4, 2, 1, 0, 3.0, -1.0), (5.0, 6.0, 0, 4, 2, 1, 0, nan, nan))
    moved = moved_to(two, 500_000_000)
    np.testing.assert_allclose(moved.boxes[:, :2], [[2.5, 1.5], [5.0, 6.0]])
    assert moved.stamp_ns == 500_000_000


@pytest.mark.parametrize("name", CLASS_NAMES)
def test_class_colours_are_distinct(name: str) -> None:
    others = [CLASS_COLORS[other] for other in CLASS_NAMES if other != name]
    distances = [np.abs(np.array(CLASS_COLORS[name]) - np.array(other)).sum() for other in others]
    assert min(distances) > 60


def test_legend_shows_every_present_class() -> None:
    found = objects(*[(20.0, 0.0, 0.0, 4.0, 2.0, 1.5, 0.0, 0.0, 0.0)] * len(CLASS_NAMES))
    found.labels[:] = np.arange(len(CLASS_NAMES))
    picture = draw_bird_eye(found)
    bottom = picture[-60:].reshape(-1, 3)
    for name in CLASS_NAMES:
        assert (bottom == CLASS_COLORS[name]).all(axis=1).sum() >= 100, name  # a square of 11 x 11 pixels
