# SPDX-License-Identifier: Apache-2.0
"""Conversion between arrays and messages: round trips, image encodings, damaged input."""

import array
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from rclpy.serialization import deserialize_message, serialize_message
from sensor_msgs.msg import CompressedImage, Image, PointCloud2
from vision_msgs.msg import Detection3DArray
from visualization_msgs.msg import Marker

from ftkd_core.classes import CLASS_NAMES
from ftkd_core.errors import UserError
from ftkd_core.geometry import yaw_transform
from ftkd_core.types import ObjectList
from ftkd_ros.bag.message_definitions import ROSBAGS, message_types
from ftkd_ros.convert import cv_bridge_images, to_ros
from ftkd_ros.convert.cv_bridge_images import load_cv_bridge
from ftkd_ros.convert.from_ros import detections_to_objects, stamp_to_ns
from ftkd_ros.convert.images import encode_jpeg, image_to_rgb
from ftkd_ros.convert.markers import objects_to_markers
from ftkd_ros.convert.message_factory import RCLPY, MessageFactory
from ftkd_ros.node.publishing import make_image

TOPIC = "/cam_front/image"


def random_objects(seed: int, count: int) -> ObjectList:
    random = np.random.default_rng(seed)
    boxes = random.uniform(-50, 50, (count, 9))
    boxes[:, 3:6] = random.uniform(0.1, 12, (count, 3))
    boxes[:, 6] = random.uniform(-np.pi, np.pi, count)
    return ObjectList(
        boxes=boxes,
        scores=random.uniform(0, 1, count),
        labels=random.integers(0, len(CLASS_NAMES), count),
        stamp_ns=int(random.integers(0, 2**31 - 1)) * 1_000_000_000 + int(random.integers(0, 10**9)),
        ids=tuple(f"object-{i}" for i in range(count)),
    )


def smooth_image(height: int = 24, width: int = 32) -> NDArray[np.uint8]:
    rows, columns = np.mgrid[0:height, 0:width]
    return np.stack([rows * 8, columns * 6, 200 - rows * 3], axis=-1).astype(np.uint8)


def raw_image(
    encoding: str, pixels: NDArray[np.uint8], *, padding: int = 0, big_endian: bool = False
) -> Image:
    """Return an Image whose rows are the bytes of `pixels` (H, row bytes) and `padding` more bytes."""
    rows = np.pad(pixels.reshape(pixels.shape[0], -1), ((0, 0), (0, padding)), constant_values=77)
    message = Image(height=pixels.shape[0], width=pixels.shape[1], encoding=encoding, step=rows.shape[1])
    message.is_bigendian = int(big_endian)
    message.data = array.array("B", rows.tobytes())
    return message


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(0, 12))
def test_objects_round_trip_through_serialized_messages(seed: int, count: int) -> None:
    objects = random_objects(seed, count)
    detections = to_ros.objects_to_detections(RCLPY, objects, "base_link")
    velocities = to_ros.objects_to_velocities(RCLPY, objects, "base_link")
    detections = deserialize_message(serialize_message(detections), Detection3DArray)
    velocities = deserialize_message(serialize_message(velocities), PointCloud2)
    found = detections_to_objects(detections, velocities)
    np.testing.assert_allclose(found.boxes[:, :7], objects.boxes[:, :7], atol=1e-9)
    np.testing.assert_allclose(found.boxes[:, 7:], objects.boxes[:, 7:], rtol=1e-6)
    np.testing.assert_array_equal(found.scores, objects.scores)
    np.testing.assert_array_equal(found.labels, objects.labels)
    assert (found.ids, found.stamp_ns) == (objects.ids, objects.stamp_ns)


def test_detection_message_follows_the_conventions_of_viewers() -> None:
    boxes = np.array([[1.0, 2.0, 3.0, 4.5, 1.9, 1.6, np.pi / 2, 5.0, 0.0]])
    objects = ObjectList(boxes=boxes, scores=np.array([0.5]), labels=np.array([8]), stamp_ns=1_500_000_002)
    message = to_ros.objects_to_detections(RCLPY, objects, "base_link")
    detection = message.detections[0]
    assert (message.header.stamp.sec, message.header.stamp.nanosec, message.header.frame_id) == (
        1,
        500_000_002,
        "base_link",
    )
    assert detection.results[0].hypothesis.class_id == "pedestrian"
    assert (detection.bbox.size.x, detection.bbox.size.y, detection.bbox.size.z) == (4.5, 1.9, 1.6)
    assert detection.bbox.center.orientation.z == pytest.approx(np.sqrt(0.5))
    assert detection.results[0].pose.pose.position.y == 2.0


def test_velocity_is_nan_without_cloud_and_for_unknown_velocity() -> None:
    objects = random_objects(0, 3)
    objects.boxes[1, 7:] = np.nan
    detections = to_ros.objects_to_detections(RCLPY, objects, "base_link")
    cloud = to_ros.objects_to_velocities(RCLPY, objects, "base_link")
    assert np.isnan(detections_to_objects(detections).boxes[:, 7:]).all()
    assert np.isnan(detections_to_objects(detections, cloud).boxes[:, 7:]).all(axis=1).tolist() == [
        0,
        1,
        0,
    ]
    assert not cloud.is_dense


def test_velocities_of_another_message_are_refused() -> None:
    detections = to_ros.objects_to_detections(RCLPY, random_objects(0, 3), "base_link")
    with pytest.raises(UserError, match="do not belong to 3 detections"):
        detections_to_objects(
            detections, to_ros.objects_to_velocities(RCLPY, random_objects(1, 3), "base_link")
        )


def test_detection_of_an_unknown_class_or_without_result_is_refused() -> None:
    detections = to_ros.objects_to_detections(RCLPY, random_objects(0, 1), "base_link")
    detections.detections[0].results[0].hypothesis.class_id = "tram"
    with pytest.raises(UserError, match="'tram'; expected one of car"):
        detections_to_objects(detections)
    detections.detections[0].results = []
    with pytest.raises(UserError, match="has no result"):
        detections_to_objects(detections)


def test_stamps_round_trip_and_too_large_stamps_are_refused() -> None:
    for ns in (0, 1, 1_532_402_927_647_951_000, 2**31 * 10**9 - 1):
        assert stamp_to_ns(to_ros.make_header(RCLPY, ns, "").stamp) == ns
    with pytest.raises(ValueError, match="32 bits"):
        to_ros.make_header(RCLPY, 2**31 * 10**9, "")


@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("encoding", ["rgb8", "bgr8", "rgba8", "bgra8"])
def test_colour_encodings_are_read_as_the_same_pixels(encoding: str, padding: int) -> None:
    image = smooth_image()
    channels = image if encoding.startswith("rgb") else image[..., ::-1]
    if "a" in encoding:
        channels = np.concatenate([channels, np.full_like(image[..., :1], 9)], axis=-1)
    decoded = image_to_rgb(raw_image(encoding, channels, padding=padding), TOPIC)
    np.testing.assert_array_equal(decoded, image)
    assert decoded.dtype == np.uint8


def test_rgb8_is_a_view_of_the_message() -> None:
    message = raw_image("rgb8", smooth_image(), padding=4)
    assert np.shares_memory(image_to_rgb(message, TOPIC), np.frombuffer(message.data, np.uint8))


@pytest.mark.parametrize("big_endian", [False, True])
def test_sixteen_bit_samples_are_read_in_both_byte_orders(big_endian: bool) -> None:
    image = smooth_image()
    samples = (image[..., ::-1].astype(np.uint16) << 8 | 0x11).astype(">u2" if big_endian else "<u2")
    message = raw_image("bgr16", image, big_endian=big_endian)
    message.step, message.data = 32 * 6, array.array("B", samples.tobytes())
    np.testing.assert_array_equal(image_to_rgb(message, TOPIC), image)


def test_mono_image_is_read_as_grey() -> None:
    grey = smooth_image()[..., 0]
    decoded = image_to_rgb(raw_image("mono8", grey), TOPIC)
    np.testing.assert_array_equal(decoded, np.repeat(grey[..., None], 3, axis=-1))


@pytest.mark.parametrize(("encoding", "luma"), [("yuv422", 1), ("uyvy", 1), ("yuyv", 0), ("yuv422_yuy2", 0)])
def test_packed_yuv_is_read_with_the_luma_position_of_its_encoding(encoding: str, luma: int) -> None:
    red_y, red_u, red_v = 82, 90, 240  # BT.601, video range
    pair = [red_u, red_y, red_v, red_y] if luma == 1 else [red_y, red_u, red_y, red_v]
    packed = np.tile(np.array(pair, dtype=np.uint8), (4, 3)).reshape(4, 6, 2)
    decoded = image_to_rgb(raw_image(encoding, packed), TOPIC)
    assert decoded.shape == (4, 6, 3)
    np.testing.assert_allclose(decoded.reshape(-1, 3), [[255, 0, 0]] * 24, atol=3)


@pytest.mark.parametrize("pattern", ["rggb", "bggr", "gbrg", "grbg"])
def test_bayer_mosaic_of_one_colour_is_read_as_that_colour(pattern: str) -> None:
    color = {"r": 200, "g": 100, "b": 30}
    tile = np.array([color[letter] for letter in pattern], dtype=np.uint8).reshape(2, 2)
    decoded = image_to_rgb(raw_image(f"bayer_{pattern}8", np.tile(tile, (6, 6))), TOPIC)
    np.testing.assert_array_equal(decoded[2:-2, 2:-2].reshape(-1, 3), [[200, 100, 30]] * 64)


@pytest.mark.parametrize("encoding", ["32FC1", "8UC2", "16UC1", "nv12", "", "bayer_xxxx8"])
def test_error_for_an_unsupported_encoding_names_topic_and_encoding(encoding: str) -> None:
    pixels = np.zeros((24, 32, 16), dtype=np.uint8)  # enough bytes for every encoding
    with pytest.raises(UserError, match=f"{TOPIC}.*{encoding!r}.*expected rgb8"):
        image_to_rgb(raw_image(encoding, pixels), TOPIC)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"step": 3}, "step of 3 bytes is too short"),
        ({"height": 30}, "has 2304 bytes; expected 2880"),
        ({"width": 0}, "size 0 x 24"),
        ({"height": 2**31, "width": 2**31}, "image size"),
    ],
)
def test_inconsistent_image_size_is_refused(changes: dict[str, int], match: str) -> None:
    message = raw_image("rgb8", smooth_image())
    for name, value in changes.items():
        setattr(message, name, value)
    with pytest.raises(UserError, match=f"{TOPIC}.*{match}"):
        image_to_rgb(message, TOPIC)


def test_jpeg_bytes_are_unchanged_and_decode_close_to_the_original() -> None:
    file = encode_jpeg(smooth_image(48, 64), quality=95)
    message = to_ros.compressed_image(RCLPY, file, 5, "cam_front")
    assert bytes(message.data) == file
    difference = image_to_rgb(message, TOPIC).astype(int) - smooth_image(48, 64)
    assert np.abs(difference).mean() < 4


def test_png_is_lossless_for_any_format_field() -> None:
    image = smooth_image()
    _, file = cv2.imencode(".png", cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    message = CompressedImage(format="rgb8; png compressed bgr8", data=array.array("B", bytes(file)))
    np.testing.assert_array_equal(image_to_rgb(message, TOPIC), image)
    rosbags_message = SimpleNamespace(format="png", data=np.frombuffer(bytes(file), np.uint8))
    np.testing.assert_array_equal(image_to_rgb(rosbags_message, TOPIC), image)


@settings(max_examples=40, deadline=None)
@given(cut=st.integers(0, 10_000), suffix=st.sampled_from([".jpg", ".png"]))
def test_truncated_image_file_is_refused_with_its_topic(cut: int, suffix: str) -> None:
    _, file = cv2.imencode(suffix, smooth_image(48, 64))
    kept = cut % (len(file) - 12)  # the last bytes of a PNG are only a checksum
    message = CompressedImage(format=suffix[1:], data=array.array("B", bytes(file)[:kept]))
    with pytest.raises(UserError, match=TOPIC):
        image_to_rgb(message, TOPIC)


def test_files_without_image_and_huge_images_are_refused() -> None:
    for content in (b"", b"GIF89a", b"\xff\xd8" + bytes(100)):
        with pytest.raises(UserError, match=TOPIC):
            image_to_rgb(CompressedImage(format="jpeg", data=array.array("B", content)), TOPIC)
    _, file = cv2.imencode(".png", smooth_image())
    huge = bytes(file)[:16] + (60_000).to_bytes(4, "big") * 2 + bytes(file)[24:]
    with pytest.raises(UserError, match="60000 x 60000"):
        image_to_rgb(CompressedImage(format="png", data=array.array("B", huge)), TOPIC)
    depth = CompressedImage(format="16UC1; compressedDepth png", data=array.array("B", bytes(file)))
    with pytest.raises(UserError, match="compressedDepth"):
        image_to_rgb(depth, TOPIC)


def test_rgb_image_message_round_trips() -> None:
    image = smooth_image()
    message = to_ros.rgb_to_image(RCLPY, image[:, ::-1], 7, "base_link")
    np.testing.assert_array_equal(image_to_rgb(message, TOPIC), image[:, ::-1])
    assert stamp_to_ns(message.header.stamp) == 7


def test_markers_begin_with_deleteall_and_have_a_lifetime() -> None:
    objects = random_objects(3, 20)
    objects.boxes[0, 7:], objects.boxes[1, 7:], objects.boxes[2, 0] = np.nan, 0.0, np.inf
    markers = objects_to_markers(objects, "base_link", lifetime_s=1.0).markers
    assert markers[0].action == Marker.DELETEALL
    assert all(marker.lifetime.sec == 1 and marker.header.frame_id == "base_link" for marker in markers[1:])
    lines = [marker for marker in markers if marker.type == Marker.LINE_LIST and marker.ns]
    assert sum(len(marker.points) for marker in lines) == 19 * 2 * 13
    assert sum(marker.ns == "labels" for marker in markers) == 19
    assert sum(marker.ns == "velocities" for marker in markers) == 17
    assert len({(marker.ns, marker.id) for marker in markers}) == len(markers)


def test_markers_omit_detections_below_the_score() -> None:
    objects = random_objects(3, 20)
    markers = objects_to_markers(objects, "base_link", min_score=0.5).markers
    assert sum(marker.ns == "labels" for marker in markers) == int((objects.scores >= 0.5).sum())


def test_label_info_lists_the_classes_in_order() -> None:
    message = to_ros.label_info(RCLPY, "base_link", 0.25)
    assert [(entry.class_id, entry.class_name) for entry in message.class_map] == list(enumerate(CLASS_NAMES))
    assert message.threshold == pytest.approx(0.25)


def test_rclpy_and_rosbags_messages_have_the_same_content() -> None:
    objects = random_objects(4, 7)
    objects.boxes[2, 7:] = np.nan
    intrinsics = np.array([[50.0, 0.0, 32.0], [0.0, 51.0, 18.0], [0.0, 0.0, 1.0]])
    pose = yaw_transform(0.3, (1.0, 2.0, 3.0))
    builders: list[tuple[str, Callable[[MessageFactory], Any]]] = [
        ("vision_msgs/msg/Detection3DArray", lambda m: to_ros.objects_to_detections(m, objects, "base_link")),
        ("sensor_msgs/msg/PointCloud2", lambda m: to_ros.objects_to_velocities(m, objects, "base_link")),
        ("vision_msgs/msg/LabelInfo", lambda m: to_ros.label_info(m, "base_link", 0.25, 7)),
        ("sensor_msgs/msg/Image", lambda m: to_ros.rgb_to_image(m, smooth_image(), 7, "camera")),
        ("sensor_msgs/msg/CompressedImage", lambda m: to_ros.compressed_image(m, b"abc", 7, "camera", "png")),
        ("sensor_msgs/msg/CameraInfo", lambda m: to_ros.camera_info(m, intrinsics, (64, 36), 7, "camera")),
        ("tf2_msgs/msg/TFMessage", lambda m: to_ros.make_transforms(m, 7, "map", {"a": pose, "b": pose})),
        (
            "nav_msgs/msg/Odometry",
            lambda m: to_ros.make_odometry(m, 7, "map", "a", pose, np.ones(3), np.arange(3.0)),
        ),
    ]
    for msgtype, build in builders:
        expected = build(RCLPY)
        content = bytes(message_types().serialize_cdr(build(ROSBAGS), msgtype))
        assert deserialize_message(content, type(expected)) == expected


@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize(("encoding", "channels"), [("8UC1", 1), ("8UC3", 3), ("8UC4", 4)])
def test_opencv_types_are_read_as_grey_bgr_and_bgra(
    encoding: str, channels: int, padding: int, cv_bridge_works: None
) -> None:
    image = smooth_image()
    if channels == 1:
        image = np.repeat(image[..., :1], 3, axis=-1)
    pixels = np.concatenate([image[..., ::-1], np.full_like(image[..., :1], 9)], axis=-1)[..., :channels]
    decoded = image_to_rgb(raw_image(encoding, pixels, padding=padding), TOPIC)
    np.testing.assert_array_equal(decoded, image)
    rosbags_message = SimpleNamespace(
        encoding=encoding,
        width=32,
        height=24,
        step=32 * channels,
        is_bigendian=0,
        data=np.ascontiguousarray(pixels).reshape(-1),
    )
    np.testing.assert_array_equal(image_to_rgb(rosbags_message, TOPIC), image)


def test_truncated_image_of_an_opencv_type_is_refused(cv_bridge_works: None) -> None:
    message = raw_image("8UC3", smooth_image())
    message.data = message.data[:-1]
    with pytest.raises(
        UserError, match=f"{TOPIC}.*2303 bytes; expected a step of at least 96 and 2304 bytes"
    ):
        image_to_rgb(message, TOPIC)


def test_missing_cv_bridge_is_named_only_for_encodings_that_need_it(missing_cv_bridge: None) -> None:
    with pytest.raises(
        UserError, match=f"{TOPIC}: encoding '8UC3' needs cv_bridge, .*; expected rgb8.*install"
    ):
        image_to_rgb(raw_image("8UC3", smooth_image()), TOPIC)
    np.testing.assert_array_equal(
        image_to_rgb(raw_image("bgr8", smooth_image()[..., ::-1]), TOPIC), smooth_image()
    )


def test_cv_bridge_and_rgb_to_image_create_the_same_message(cv_bridge_works: None) -> None:
    image = smooth_image()[:, ::-1]
    assert make_image(image, 7, "base_link") == to_ros.rgb_to_image(RCLPY, image, 7, "base_link")


def test_images_are_published_without_cv_bridge(missing_cv_bridge: None) -> None:
    np.testing.assert_array_equal(image_to_rgb(make_image(smooth_image(), 7, "a"), TOPIC), smooth_image())


@pytest.fixture
def cv_bridge_works() -> None:
    """Skip the test if cv_bridge cannot be used, for example because the wheel does not support NumPy 2."""
    try:
        load_cv_bridge()
    except ImportError as error:
        pytest.skip(f"needs cv_bridge: {error}")


@pytest.fixture
def missing_cv_bridge(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make `import cv_bridge` fail."""
    monkeypatch.setitem(sys.modules, "cv_bridge", None)
    cv_bridge_images.probe_cv_bridge.cache_clear()
    yield
    cv_bridge_images.probe_cv_bridge.cache_clear()


@given(
    content=st.binary(max_size=300),
    stamp_ns=st.integers(0, 2**62),
    frame=st.text(st.characters(codec="ascii", exclude_characters="\0"), max_size=9),
)
def test_image_bytes_equal_the_serialized_message(content: bytes, stamp_ns: int, frame: str) -> None:
    stamp_ns %= 2**31 * 10**9
    message = to_ros.compressed_image(ROSBAGS, content, stamp_ns, frame, "png")
    serialized = message_types().serialize_cdr(message, "sensor_msgs/msg/CompressedImage")
    assert to_ros.compressed_image_bytes(content, stamp_ns, frame, "png") == bytes(serialized)
