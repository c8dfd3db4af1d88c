# SPDX-License-Identifier: Apache-2.0
"""CameraInfo: which matrix fits the images, distortion, binning and regions of interest."""

import numpy as np
import pytest
from sensor_msgs.msg import CameraInfo

from ftkd_core.errors import UserError
from ftkd_core.lens import Lens
from ftkd_ros.convert.calibration import read_calibration
from ftkd_ros.convert.images import decode_compressed, encode_jpeg

SIZE = (640, 480)
K = [400.0, 0.0, 320.0, 0.0, 410.0, 240.0, 0.0, 0.0, 1.0]
P = [340.0, 0.0, 310.0, 0.0, 0.0, 350.0, 235.0, 0.0, 0.0, 0.0, 1.0, 0.0]
D = [-0.28, 0.09, 0.001, -0.002, 0.0]


def info(**changes: object) -> CameraInfo:
    message = CameraInfo(width=640, height=480, k=K, p=P, d=D, distortion_model="plumb_bob")
    for name, value in changes.items():
        setattr(message, name, value)
    return message


@pytest.mark.parametrize(
    ("geometry", "topic", "changes", "focal", "distorted"),
    [
        ("auto", "/cam/image_rect_color", {}, 340, False),
        ("auto", "/cam/image_rect/compressed", {}, 340, False),
        ("auto", "/cam/image_raw", {}, 400, True),
        ("auto", "/cam/image/compressed", {}, 400, True),
        ("auto", "/cam/image/compressed", {"d": []}, 340, False),
        ("auto", "/cam/image_raw", {"d": []}, 400, False),
        ("auto", "/cam/image_unrectified", {}, 400, True),
        ("auto", "/cam/image", {"d": [0.0] * 4, "distortion_model": "equidistant"}, 400, True),
        ("rectified", "/cam/image_raw", {}, 340, False),
        ("rectified", "/cam/image", {"p": [0.0] * 12}, 400, False),
        ("raw", "/cam/image_rect", {}, 400, True),
    ],
)
def test_matrix_that_fits_the_images(
    geometry: str, topic: str, changes: dict[str, object], focal: float, distorted: bool
) -> None:
    found = read_calibration(info(**changes), "cam", SIZE, image_geometry=geometry, topic=topic)
    assert found.intrinsics[0, 0] == focal
    assert (found.lens is not None) == distorted
    assert found.reason


def test_lens_and_rectifying_rotation_of_raw_images() -> None:
    turn = [0.0, -1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0]
    found = read_calibration(info(r=turn), "cam", SIZE, image_geometry="raw")
    assert found.lens == Lens("plumb_bob", tuple(D))
    np.testing.assert_array_equal(found.frame_from_camera[:3, :3], np.reshape(turn, (3, 3)))
    rectified = read_calibration(info(r=turn), "cam", SIZE, image_geometry="rectified")
    np.testing.assert_array_equal(rectified.frame_from_camera, np.eye(4))
    with pytest.raises(UserError, match=r"cam: R .* is not a rotation"):
        read_calibration(info(r=[2.0] * 9), "cam", SIZE, image_geometry="raw")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"distortion_model": "thin_prism"}, "cam: distortion model 'thin_prism' is unknown"),
        ({"distortion_model": ""}, "cam: distortion model '' is unknown"),
        ({"d": [0.1, 0.2]}, r"cam: distortion coefficients \[0.1, 0.2\] of plumb_bob"),
    ],
)
def test_unknown_distortion_is_refused_by_name(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_calibration(info(**changes), "cam", SIZE, topic="/cam/image_raw")
    assert read_calibration(info(**changes), "cam", SIZE, image_geometry="rectified").lens is None


def test_binning_and_region_of_interest_are_applied() -> None:
    message = info(binning_x=2, binning_y=4)
    message.roi.x_offset, message.roi.y_offset = 40, 80
    message.roi.width, message.roi.height = 400, 200
    found = read_calibration(message, "cam", (200, 50), image_geometry="raw")
    np.testing.assert_allclose(found.intrinsics, [[200, 0, 140], [0, 102.5, 40], [0, 0, 1]])


@pytest.mark.parametrize("size", [(320, 240), (641, 480), (640, 360)])
def test_image_of_another_size_is_refused(size: tuple[int, int]) -> None:
    with pytest.raises(UserError, match=r"cam: camera_info is for 640 x 480 pixels but the image has"):
        read_calibration(info(), "cam", size)
    with pytest.raises(UserError, match="binning 2 x 2"):
        read_calibration(info(binning_x=2, binning_y=2), "cam", SIZE)


def test_unknown_image_geometry_is_refused() -> None:
    with pytest.raises(UserError, match="image_geometry 'flat': expected one of auto, rectified, raw"):
        read_calibration(info(), "cam", SIZE, image_geometry="flat")


def test_jpeg_with_a_foreign_marker_in_its_data_is_refused() -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (256, 256, 3), dtype=np.uint8)
    content = bytearray(encode_jpeg(pixels, quality=100))
    stuffed = content.find(b"\xff\x00", content.rfind(b"\xff\xda"))
    assert stuffed > 0
    content[stuffed + 1] ^= 1 << 6  # one flipped bit makes a marker of it
    with pytest.raises(UserError, match="/cam/image: compressed image of .* is truncated or damaged"):
        decode_compressed(bytes(content), "/cam/image")
