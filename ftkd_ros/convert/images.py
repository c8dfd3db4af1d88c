# SPDX-License-Identifier: Apache-2.0
"""Image messages -> RGB arrays.

A table converts the usual encodings without a ROS package; cv_bridge converts the others. The functions
accept messages of rclpy and of `rosbags`. Every error names the topic, because a rig has several cameras.
"""

import re
import struct
from typing import Any, Final

import cv2
import numpy as np
from numpy.typing import NDArray

from ftkd_core.errors import UserError
from ftkd_ros.convert import cv_bridge_images

RgbImage = NDArray[np.uint8]

MAX_PIXELS: Final = 64 * 1024 * 1024
"""Limit on the pixels of an image, checked before decoding; larger sizes come from corrupt headers."""

_COLOR_CHANNELS: Final = {"rgb": 3, "bgr": 3, "rgba": 4, "bgra": 4, "mono": 1}
_COLOR_TO_RGB: Final = {
    "bgr": cv2.COLOR_BGR2RGB,
    "rgba": cv2.COLOR_RGBA2RGB,
    "bgra": cv2.COLOR_BGRA2RGB,
    "mono": cv2.COLOR_GRAY2RGB,
}
_PACKED_TO_RGB: Final = {
    "yuv422": cv2.COLOR_YUV2RGB_UYVY,
    "uyvy": cv2.COLOR_YUV2RGB_UYVY,
    "yuv422_yuy2": cv2.COLOR_YUV2RGB_YUY2,
    "yuyv": cv2.COLOR_YUV2RGB_YUY2,
}
_BAYER_TO_RGB: Final = {
    "bayer_rggb": cv2.COLOR_BayerRGGB2RGB,
    "bayer_bggr": cv2.COLOR_BayerBGGR2RGB,
    "bayer_gbrg": cv2.COLOR_BayerGBRG2RGB,
    "bayer_grbg": cv2.COLOR_BayerGRBG2RGB,
}
_VIDEO_ENCODINGS: Final = ("nv12", "nv21", "nv16", "nv24", "yuv420", "i420", "yuv420p")
_VIDEO_FORMATS: Final = ("h264", "h265", "hevc", "avc", "vp8", "vp9", "av1", "mpeg4")
_FIX: Final = "rgb8, bgr8, yuv422 or JPEG"
SUPPORTED: Final = (
    "rgb8, bgr8, rgba8, bgra8, mono8, their 16-bit forms, yuv422, uyvy, yuv422_yuy2, yuyv, bayer_*, "
    "or an encoding that cv_bridge converts"
)
"""Encodings that `image_to_rgb` reads, for error messages."""


def image_to_rgb(message: Any, topic: str) -> RgbImage:
    """Return the RGB pixels (H, W, 3) uint8 of a sensor_msgs/Image or CompressedImage (JPEG or PNG).

    rgb8 returns a view of the message data; other encodings return a copy. Raises UserError that names
    `topic` for an unsupported encoding, an inconsistent size, step or length, and damaged compressed data.
    """
    if hasattr(message, "encoding"):
        return _raw_to_rgb(message, topic)
    return decode_compressed(message.data, topic, message.format)


def byte_view(data: Any) -> NDArray[np.uint8]:
    """Return a message field (array.array, bytes or numpy) as uint8 (length,) without a copy."""
    return data if isinstance(data, np.ndarray) else np.frombuffer(data, dtype=np.uint8)


# -- raw -----------------------------------------------------------------------------------------------------


def _raw_to_rgb(message: Any, topic: str) -> RgbImage:
    encoding, width, height = message.encoding, int(message.width), int(message.height)
    _check_size(topic, width, height)
    name, depth = _split_encoding(encoding)
    if name in _COLOR_CHANNELS:
        pixels = _pixel_view(message, topic, channels=_COLOR_CHANNELS[name], depth=depth)
        return pixels if name == "rgb" else _as_uint8(cv2.cvtColor(pixels, _COLOR_TO_RGB[name]))
    if name in _PACKED_TO_RGB:
        _check_pixel_blocks(message, topic, width % 2 == 0, "an even width")
        return _as_uint8(cv2.cvtColor(_pixel_view(message, topic, channels=2, depth=8), _PACKED_TO_RGB[name]))
    if name in _BAYER_TO_RGB:
        _check_pixel_blocks(message, topic, width >= 2 and height >= 2, "at least 2 x 2 pixels")
        mosaic = _pixel_view(message, topic, channels=1, depth=depth)
        return _as_uint8(cv2.cvtColor(mosaic, _BAYER_TO_RGB[name]))
    if encoding in _VIDEO_ENCODINGS:
        raise UserError(
            f"{topic}: encoding {encoding!r} is not supported; expected {_FIX}: set it in "
            "the driver, or convert the topic with image_proc or image_transport"
        )
    return cv_bridge_images.decode(message, byte_view(message.data), topic, SUPPORTED)


def _split_encoding(encoding: str) -> tuple[str, int]:
    """Split 'bgr16' into ('bgr', 16); return ('yuv422', 8) for 'yuv422'."""
    match = re.fullmatch(r"(rgba?|bgra?|mono|bayer_[a-z]{4})(8|16)", encoding)
    return (match[1], int(match[2])) if match else (encoding, 8)


def _check_pixel_blocks(message: Any, topic: str, fits: bool, expected: str) -> None:
    if not fits:
        raise UserError(
            f"{topic}: image of {message.width} x {message.height} pixels has encoding {message.encoding!r}, "
            f"which needs {expected}"
        )


def _pixel_view(message: Any, topic: str, *, channels: int, depth: int) -> RgbImage:
    """Return a view (H, W, channels) of a raw image; 16-bit samples keep their high byte."""
    height, width, step = int(message.height), int(message.width), int(message.step)
    data = byte_view(message.data)
    sample = depth // 8
    if step < width * channels * sample:
        raise UserError(
            f"{topic}: step of {step} bytes is too short for {width} pixels of {message.encoding!r}; "
            f"expected at least {width * channels * sample}"
        )
    if len(data) < step * (height - 1) + width * channels * sample:
        raise UserError(
            f"{topic}: image of {width} x {height} with step {step} has {len(data)} bytes; "
            f"expected {step * height}"
        )
    high_byte = 0 if sample == 1 or message.is_bigendian else 1
    view: RgbImage = np.ndarray(
        shape=(height, width, channels),
        dtype=np.uint8,
        buffer=data,
        offset=high_byte,
        strides=(step, channels * sample, sample),
    )
    return view if sample == 1 else np.ascontiguousarray(view)


def _check_size(topic: str, width: int, height: int) -> None:
    if width < 1 or height < 1 or width * height > MAX_PIXELS:
        raise UserError(f"{topic}: image size {width} x {height}; expected between 1 and {MAX_PIXELS} pixels")


# -- compressed ----------------------------------------------------------------------------------------------


def decode_compressed(data: Any, topic: str, format_name: str = "") -> RgbImage:
    """Return the RGB pixels (H, W, 3) uint8 of a JPEG or PNG file in memory.

    The signature in the data selects the decoder; `format_name` is the format field of the message. Raises
    UserError as `image_to_rgb` does.
    """
    content = byte_view(data)
    size = _jpeg_size(content) if _starts_with(content, b"\xff\xd8") else _png_size(content)
    if "compressedDepth" in format_name or size is _NOT_AN_IMAGE:
        if any(name in format_name.lower() for name in _VIDEO_FORMATS):
            raise UserError(
                f"{topic}: format {format_name!r} is a video stream, which cannot be decoded image by image; "
                "publish JPEG images, such as with `ros2 run image_transport republish`"
            )
        raise UserError(
            f"{topic}: compressed image of format {format_name!r} and {len(content)} bytes "
            "is neither JPEG nor PNG"
        )
    if size is None:
        raise UserError(f"{topic}: compressed image of {len(content)} bytes is truncated or damaged")
    _check_size(topic, *size)
    # camera_info describes the stored pixels, so the EXIF orientation must not rotate them.
    pixels = cv2.imdecode(content, cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    if pixels is None:
        raise UserError(f"{topic}: compressed image of {len(content)} bytes is damaged and cannot be decoded")
    return _as_uint8(cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB, dst=pixels))


_NOT_AN_IMAGE: Final = (-1, -1)


def _starts_with(content: NDArray[np.uint8], prefix: bytes) -> bool:
    return content[: len(prefix)].tobytes() == prefix


def _jpeg_size(content: NDArray[np.uint8]) -> tuple[int, int] | None:
    """Return (width, height) of a complete JPEG file, None if it is truncated or damaged.

    libjpeg fills the missing part of a truncated image with grey and only warns. Therefore the end marker
    must follow the start of the last scan, without another marker in between: entropy-coded data contains
    neither. A flipped bit that leaves valid Huffman codes cannot be detected, because JPEG has no checksum.
    """
    file = content.tobytes()
    last_scan = file.rfind(b"\xff\xda")
    end = file.find(b"\xff\xd9", last_scan)
    if last_scan < 0 or end < 0 or not _is_entropy_coded(content[last_scan + 2 : end]):
        return None
    position = 2
    while position + 9 <= len(file) and file[position] == 0xFF:
        marker = file[position + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack(">HH", file[position + 5 : position + 9])
            return width, height
        if marker == 0xFF:  # padding before a marker
            position += 1
            continue
        position += 2 + int.from_bytes(file[position + 2 : position + 4], "big")
    return None


def _is_entropy_coded(content: NDArray[np.uint8]) -> bool:
    """Return whether 0xFF is followed only by 0 (stuffing), a restart marker or another 0xFF (padding)."""
    after = content[1:][content[:-1] == 0xFF]
    return bool(np.all((after == 0) | ((after >= 0xD0) & (after <= 0xD7)) | (after == 0xFF)))


def _png_size(content: NDArray[np.uint8]) -> tuple[int, int] | None:
    """Return (width, height) of a complete PNG file, None if it is truncated, (-1, -1) if it is not a PNG."""
    if not _starts_with(content, b"\x89PNG\r\n\x1a\n"):
        return _NOT_AN_IMAGE
    if len(content) < 33 or b"IEND" not in content[-64:].tobytes():
        return None
    width, height = struct.unpack(">II", content[16:24].tobytes())
    return width, height


def encode_jpeg(image: RgbImage, quality: int = 90) -> bytes:
    """Return the JPEG file of an RGB image (H, W, 3) uint8. Raises ValueError for another shape."""
    done, content = cv2.imencode(
        ".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality]
    )
    if not done:
        raise ValueError(f"image of shape {image.shape} cannot be encoded as JPEG; expected (H, W, 3) uint8")
    return bytes(content)


def _as_uint8(image: Any) -> RgbImage:
    array: RgbImage = image
    return array
