# SPDX-License-Identifier: Apache-2.0
"""camera_info and tf -> validated geometry of each camera at its own exposure.

The worker thread calls these functions and may wait for a transform; callbacks only store messages.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from rclpy.time import Time
from tf2_ros import Buffer, TransformException

from ftkd_core.errors import UserError
from ftkd_ros.convert.calibration import CameraGeometry, ImageCalibration, read_calibration, read_rigid
from ftkd_ros.convert.from_ros import stamp_to_ns
from ftkd_ros.sync.matcher import JUMP_NS

_POLL_S: Final = 0.002


class RewindingBuffer(Buffer):
    """A tf buffer that is cleared when the stamps of a frame jump back, as in a looped bag.

    A plain Buffer refuses such transforms as too old (if the jump exceeds its cache time) or mixes them with
    those of the previous loop. Only the C++ listener clears its buffer. Static transforms are kept.
    """

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._newest_ns: dict[str, int] = {}

    def set_transform(self, transform: Any, authority: str) -> None:
        """Store a transform; the first transform of a new stream clears those of the previous stream."""
        stamp_ns = stamp_to_ns(transform.header.stamp)
        newest_ns = self._newest_ns.get(transform.child_frame_id, stamp_ns)
        if stamp_ns < newest_ns - JUMP_NS:
            self.clear()
            self._newest_ns.clear()
            newest_ns = stamp_ns
        self._newest_ns[transform.child_frame_id] = max(newest_ns, stamp_ns)
        super().set_transform(transform, authority)


class RigReader:
    """Returns camera geometry from the latest camera_info and from tf, which interpolates but never
    extrapolates.

    `base_frame` is the ego frame of all detections; `map_frame` is a frame fixed to the ground (map or odom).
    image_geometry: as in `convert.calibration`, decided with the image topic by camera; `log` gets one
    sentence per decision.
    """

    def __init__(
        self,
        cameras: Sequence[str],
        buffer: Buffer,
        *,
        base_frame: str,
        map_frame: str,
        image_geometry: str = "auto",
        image_topics: Mapping[str, str] | None = None,
        log: Callable[[str], object] = lambda _: None,
    ) -> None:
        self.cameras = tuple(cameras)
        self._image_geometry = image_geometry
        self._image_topics = dict(image_topics or {})
        self._log = log
        self._logged: dict[str, str] = {}
        self.base_frame = base_frame
        self.map_frame = map_frame
        self._buffer = buffer
        self._infos: dict[str, Any] = {}

    def add_camera_info(self, message: Any, camera: str) -> None:
        """Store the calibration of a camera; a later message replaces it."""
        self._infos[camera] = message

    def global_from_ego(self, stamp_ns: int, wait_until: float) -> NDArray[np.float64]:
        """Return the ego pose (4, 4) at a stamp.

        Raises UserError if tf has no such transform at the monotonic time `wait_until`.
        """
        return self._lookup(self.map_frame, self.base_frame, stamp_ns, wait_until)

    def geometry(
        self, camera: str, frame_id: str, stamp_ns: int, image_size: tuple[int, int], wait_until: float
    ) -> CameraGeometry:
        """Return the geometry of one camera for an image of `image_size` (width, height) exposed at
        `stamp_ns`.

        If `frame_id`, the frame of the image, is empty or unknown to tf, the frame of camera_info is used.
        Raises UserError that names the camera if calibration or transforms are missing or invalid, or if the
        image size differs.
        """
        info = self._wait_for_info(camera, wait_until)
        calibration = self._calibration(info, camera, image_size)
        camera_frame = self._camera_frame(camera, frame_id, info.header.frame_id)
        ego_from_frame = self._lookup(self.base_frame, camera_frame, stamp_ns, wait_until)
        return CameraGeometry(
            intrinsics=calibration.intrinsics,
            ego_from_camera=ego_from_frame @ calibration.frame_from_camera,
            global_from_ego=self.global_from_ego(stamp_ns, wait_until),
            lens=calibration.lens,
        )

    def _calibration(self, info: Any, camera: str, image_size: tuple[int, int]) -> ImageCalibration:
        topic = self._image_topics.get(camera, "")
        calibration = read_calibration(
            info, camera, image_size, image_geometry=self._image_geometry, topic=topic
        )
        self._log_once(camera, f"{camera}: {calibration.reason}")
        return calibration

    def _camera_frame(self, camera: str, image_frame: str, info_frame: str) -> str:
        """Return the frame of the image, or that of camera_info if tf connects only that one to the base.

        Leading slashes, which ROS 1 used, are removed as tf2 does for the frames of transforms."""
        image_frame, info_frame = image_frame.removeprefix("/"), info_frame.removeprefix("/")
        if not (image_frame or info_frame):
            raise UserError(f"{camera}: neither the image nor camera_info names a frame; set header.frame_id")
        if not image_frame or not info_frame or image_frame == info_frame:
            return image_frame or info_frame
        if self._is_known(image_frame) or not self._is_known(info_frame):
            return image_frame
        self._log_once(
            f"{camera} frame", f"{camera}: tf has no frame {image_frame}; {info_frame} of camera_info is used"
        )
        return info_frame

    def _is_known(self, frame: str) -> bool:
        return bool(self._buffer.can_transform(self.base_frame, frame, Time()))

    def _log_once(self, key: str, text: str) -> None:
        if self._logged.get(key) != text:
            self._logged[key] = text
            self._log(text)

    def _wait_for_info(self, camera: str, wait_until: float) -> Any:
        while camera not in self._infos:
            if time.monotonic() >= wait_until:
                raise UserError(f"{camera}: no camera_info has arrived; check parameter camera_info_topic")
            time.sleep(_POLL_S)
        return self._infos[camera]

    def _lookup(self, target: str, source: str, stamp_ns: int, wait_until: float) -> NDArray[np.float64]:
        stamp = Time(nanoseconds=stamp_ns)
        while True:
            try:
                found = self._buffer.lookup_transform(target, source, stamp)
            except TransformException as error:
                if time.monotonic() >= wait_until or self._is_past(target, source, stamp_ns):
                    raise UserError(f"no transform {target} <- {source} at {stamp_ns} ns: {error}") from error
                time.sleep(_POLL_S)
                continue
            return read_rigid(found.transform, f"transform {target} <- {source}")

    def _is_past(self, target: str, source: str, stamp_ns: int) -> bool:
        """Return True if the newest transform is later than the stamp, so that waiting cannot help."""
        try:
            newest = self._buffer.lookup_transform(target, source, Time())
        except TransformException:
            return False
        newest_ns = stamp_to_ns(newest.header.stamp)
        return newest_ns > stamp_ns
