# SPDX-License-Identifier: Apache-2.0
"""cv_bridge for image encodings that the table in `ftkd_ros.convert.images` lacks.

cv_bridge is imported on first use, because bags can be read without ROS. It can be used as a package of a ROS
distribution and as the wheel `cv-bridge`, which needs NumPy 1.
"""

from functools import cache
from types import SimpleNamespace
from typing import Any, Final

import cv2
import numpy as np
from numpy.typing import NDArray

from ftkd_core.errors import UserError

_OPENCV_TYPE_TO_RGB: Final = {
    "8UC1": cv2.COLOR_GRAY2RGB,
    "8UC3": cv2.COLOR_BGR2RGB,
    "8UC4": cv2.COLOR_BGRA2RGB,
}
"""OpenCV types as encodings, which name no colour; OpenCV and RViz use grey, BGR and BGRA."""


def decode(message: Any, data: NDArray[np.uint8], topic: str, supported: str) -> NDArray[np.uint8]:
    """Return the RGB pixels (H, W, 3) uint8 of a sensor_msgs/Image whose bytes are `data`.

    Raises UserError that names `topic` if cv_bridge is not installed or cannot convert the encoding (the
    error lists the `supported` ones), and if step or length do not fit.
    """
    encoding = message.encoding
    try:
        bridge = load_cv_bridge()
    except ImportError as error:
        raise UserError(
            f"{topic}: encoding {encoding!r} needs cv_bridge, which cannot be used ({error}); "
            f"expected {supported}; install cv_bridge or change the encoding in the camera driver"
        ) from error
    try:
        dtype, channels = bridge.encoding_to_dtype_with_channels(encoding)
        row_bytes = int(message.width) * channels * np.dtype(dtype).itemsize
        packed = _without_padding(message, data, row_bytes, topic)
        if encoding in _OPENCV_TYPE_TO_RGB:
            pixels = cv2.cvtColor(bridge.imgmsg_to_cv2(packed), _OPENCV_TYPE_TO_RGB[encoding])
        else:
            pixels = bridge.imgmsg_to_cv2(packed, "rgb8")
    except UserError:
        raise
    except Exception as error:  # cv_bridge raises CvBridgeError, RuntimeError, KeyError or cv2.error
        raise UserError(
            f"{topic}: image of {message.width} x {message.height} with encoding {encoding!r} cannot be "
            f"converted to rgb8 ({type(error).__name__}: {error}); expected {supported}; "
            "convert it in the camera driver or with image_proc"
        ) from error
    return np.ascontiguousarray(pixels, dtype=np.uint8)


@cache
def probe_cv_bridge() -> tuple[Any, str]:
    """Return (bridge, ""), or (None, reason) if cv_bridge cannot convert an image in this environment."""
    try:
        from cv_bridge import CvBridge

        bridge = CvBridge()
        bridge.cv2_to_imgmsg(np.zeros((1, 1, 3), dtype=np.uint8), encoding="rgb8")
    except Exception as error:  # ImportError, or AttributeError if it was built for another NumPy
        return None, f"{type(error).__name__}: {error}"
    return bridge, ""


def load_cv_bridge() -> Any:
    """Return a CvBridge. Raises ImportError with the reason if cv_bridge is missing or does not fit NumPy."""
    bridge, reason = probe_cv_bridge()
    if bridge is None:
        raise ImportError(reason)
    return bridge


def _without_padding(message: Any, data: NDArray[np.uint8], row_bytes: int, topic: str) -> SimpleNamespace:
    """Return a copy of an image message without padding at the ends of rows, which the wheel does not
    support.
    """
    height, step = int(message.height), int(message.step)
    if step < row_bytes or len(data) < step * (height - 1) + row_bytes:
        raise UserError(
            f"{topic}: image of {message.width} x {height} with encoding {message.encoding!r} has step "
            f"{step} and {len(data)} bytes; expected a step of at least {row_bytes} and {step * height} bytes"
        )
    rows = np.lib.stride_tricks.as_strided(data, shape=(height, row_bytes), strides=(step, 1))
    return SimpleNamespace(
        height=height,
        width=int(message.width),
        encoding=message.encoding,
        is_bigendian=int(message.is_bigendian),
        step=row_bytes,
        data=np.ascontiguousarray(rows).reshape(-1),
    )
