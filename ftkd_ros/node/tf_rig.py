# SPDX-License-Identifier: Apache-2.0
"""camera_info and tf -> validated geometry of each camera at its own exposure.

The worker thread calls these functions and may wait for a transform; callbacks only store messages.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from rclpy.time import Time
from tf2_ros import Buffer

from ftkd_core.errors import UserError
from ftkd_ros.convert.calibration import CameraGeometry, ImageCalibration, read_calibration
from ftkd_ros.convert.calibration_files import read_camera_yaml, read_extrinsics
from ftkd_ros.convert.message_factory import RCLPY
from ftkd_ros.convert.to_ros import make_transforms
from ftkd_ros.node.ego_motion import EgoMotion, OdometryPose, TfPose, look_up
from ftkd_ros.node.parameters import DetectorParameters

_POLL_S: Final = 0.002


class RigReader:
    """Returns camera geometry from the latest camera_info and from tf, which interpolates but never
    extrapolates.

    `base_frame` is the ego frame of all detections; `ego_motion` gives its pose over ground.
    image_geometry: as in `convert.calibration`, decided with the image topic by camera; `log` gets one
    sentence per decision.
    """

    def __init__(
        self,
        cameras: Sequence[str],
        buffer: Buffer,
        *,
        base_frame: str,
        ego_motion: EgoMotion,
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
        self._ego_motion = ego_motion
        self._buffer = buffer
        self._infos: dict[str, Any] = {}

    def add_camera_info(self, message: Any, camera: str) -> None:
        """Store the calibration of a camera; a later message replaces it."""
        self._infos[camera] = message

    def global_from_ego(self, stamp_ns: int, wait_until: float) -> NDArray[np.float64]:
        """Return the ego pose (4, 4) at a stamp.

        Raises UserError if it is not known at the monotonic time `wait_until`.
        """
        return self._ego_motion.global_from_ego(stamp_ns, wait_until)

    def has_pose(self, stamp_ns: int) -> bool:
        """Return True if the ego pose at a stamp is known, or if waiting for it cannot help."""
        return self._ego_motion.has_pose(stamp_ns)

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
        ego_from_frame = look_up(self._buffer, self.base_frame, camera_frame, stamp_ns, wait_until)
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


def make_odometry(buffer: Buffer, parameters: DetectorParameters) -> OdometryPose | None:
    """Return the pose from odometry, if parameter odometry_topic is set."""
    if not parameters.odometry_topic:
        return None
    return OdometryPose(buffer, parameters.base_frame, parameters.odometry_topic, parameters.tf_cache_s)


def make_rig(
    buffer: Buffer,
    parameters: DetectorParameters,
    odometry: OdometryPose | None,
    log: Callable[[str], object],
) -> RigReader:
    """Return the reader of the rig; calibration and extrinsics of files are stored in it and in the buffer.

    Raises UserError for files that cannot be read.
    """
    rig = RigReader(
        parameters.cameras,
        buffer,
        base_frame=parameters.base_frame,
        ego_motion=odometry or TfPose(buffer, parameters.base_frame, parameters.map_frame, log),
        image_geometry=parameters.image_geometry,
        image_topics=dict(zip(parameters.cameras, parameters.image_topics, strict=True)),
        log=log,
    )
    for camera, file in zip(parameters.cameras, parameters.calibration_files, strict=True):
        if file is not None:
            rig.add_camera_info(read_camera_yaml(RCLPY, file, camera), camera)
    if parameters.extrinsics_file:
        for mount in read_extrinsics(Path(parameters.extrinsics_file)):
            message = make_transforms(RCLPY, 0, mount.parent, {mount.child: mount.matrix})
            buffer.set_transform_static(message.transforms[0], "extrinsics_file")
    return rig
