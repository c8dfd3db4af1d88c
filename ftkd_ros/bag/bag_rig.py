# SPDX-License-Identifier: Apache-2.0
"""Calibration and transforms of a bag, as the detector node reads them from topics; without ROS."""

import bisect
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ftkd_core.errors import UserError
from ftkd_ros.bag.io import BagReader
from ftkd_ros.bag.message_definitions import ROSBAGS
from ftkd_ros.bag.transforms import OdometryTrack, TransformError, TransformTree, frame_name, tree_of
from ftkd_ros.convert.calibration import CameraGeometry, read_calibration
from ftkd_ros.convert.calibration_files import read_camera_yaml, read_extrinsics
from ftkd_ros.convert.from_ros import stamp_to_ns
from ftkd_ros.convert.to_ros import make_transforms
from ftkd_ros.node.parameters import DetectorParameters

_TF_TOPICS: Final = ("/tf", "/tf_static")
_USUAL_MAPS: Final = ("map", "odom")

Matrix = NDArray[np.float64]


class BagRig:
    """Geometry of the cameras of a bag, with the interface of `ftkd_ros.sync.assembly.Rig`.

    Transforms come from /tf and /tf_static by the rules of tf2; camera_info is the newest one at an exposure.
    decisions: by camera, what its images are (`convert.calibration`). Raises UserError if no transform
    connects `map_frame` and `base_frame`.
    """

    def __init__(self, bag: BagReader, parameters: DetectorParameters, image_topics: list[str]) -> None:
        self.cameras = parameters.cameras
        self.decisions: dict[str, str] = {}
        self._parameters = parameters
        self._path = str(bag.path)
        self._image_topics = dict(zip(self.cameras, image_topics, strict=True))
        self._info_topics = dict(
            zip(self.cameras, map(resolve_topic, parameters.camera_info_topics), strict=True)
        )
        self.tree = tree_of(bag.messages(_TF_TOPICS, optional=True))
        for mount in read_extrinsics(Path(parameters.extrinsics_file)) if parameters.extrinsics_file else ():
            message = make_transforms(ROSBAGS, 0, mount.parent, {mount.child: mount.matrix})
            self.tree.add_message(message, static=True)
        self._base = parameters.base_frame
        topic = resolve_topic(parameters.odometry_topic)
        self._odometry = OdometryTrack(topic, bag.messages([topic]), self._base) if topic else None
        self._map = "" if self._odometry else _choose_map(self.tree, parameters, bag)
        if "/tf_static" not in bag.topics and not self.tree.descendants(self._base):
            raise UserError(
                f"bag {self._path!r} has no topic /tf_static, and /tf has no frame below {self._base}, so "
                f"the places of the cameras are unknown; it has {', '.join(sorted(bag.topics))}"
            )
        self._infos: dict[str, tuple[list[int], list[Any]]] = {}
        files = dict(zip(self.cameras, parameters.calibration_files, strict=True))
        for camera, file in files.items():
            if file is not None:
                self._infos[camera] = [0], [read_camera_yaml(ROSBAGS, file, camera)]
        cameras = {topic: camera for camera, topic in self._info_topics.items() if files[camera] is None}
        for topic, _, message in bag.messages(tuple(cameras), optional=True):
            stamps, infos = self._infos.setdefault(cameras[topic], ([], []))
            stamps.append(stamp_to_ns(message.header.stamp))
            infos.append(message)

    def global_from_ego(self, stamp_ns: int, wait_until: float = 0.0) -> Matrix:
        """Return the pose (4, 4) of the base frame. Raises UserError outside the time range of /tf."""
        if self._odometry is not None:
            return self._odometry.pose(self.tree, stamp_ns)
        return self._lookup(self._map, self._base, stamp_ns)

    def geometry(
        self, camera: str, frame_id: str, stamp_ns: int, image_size: tuple[int, int], wait_until: float = 0.0
    ) -> CameraGeometry:
        """Return the geometry of a camera at an exposure.

        Raises UserError if camera_info or a transform is missing.
        """
        info = self._info(camera, stamp_ns)
        frame = self._camera_frame(camera, frame_name(frame_id), frame_name(info.header.frame_id))
        calibration = read_calibration(
            info,
            camera,
            image_size,
            image_geometry=self._parameters.image_geometry,
            topic=self._image_topics[camera],
        )
        self.decisions[camera] = calibration.reason
        try:
            ego_from_frame = self._lookup(self._base, frame, stamp_ns)
        except UserError as error:
            raise UserError(f"{camera}: {error}") from error
        return CameraGeometry(
            intrinsics=calibration.intrinsics,
            ego_from_camera=ego_from_frame @ calibration.frame_from_camera,
            global_from_ego=self.global_from_ego(stamp_ns),
            lens=calibration.lens,
        )

    def _lookup(self, target: str, source: str, stamp_ns: int) -> Matrix:
        try:
            return self.tree.lookup(target, source, stamp_ns)
        except TransformError as error:
            known = ", ".join(self.tree.connected_to(self._base)) or "none"
            raise UserError(
                f"bag {self._path!r}: {error}; frames connected to {self._base}: {known}"
            ) from error

    def _info(self, camera: str, stamp_ns: int) -> Any:
        if camera not in self._infos:
            raise UserError(f"{camera}: bag {self._path!r} has no topic {self._info_topics[camera]}")
        stamps, infos = self._infos[camera]
        return infos[max(bisect.bisect_right(stamps, stamp_ns) - 1, 0)]

    def _camera_frame(self, camera: str, image_frame: str, info_frame: str) -> str:
        """Return the frame of the image, or that of camera_info if only that one is connected to the base."""
        if not (image_frame or info_frame):
            raise UserError(f"{camera}: neither the image nor camera_info names a frame; set header.frame_id")
        if not image_frame or not info_frame:
            return image_frame or info_frame
        only_info = not self.tree.connects(self._base, image_frame)
        return info_frame if only_info and self.tree.connects(self._base, info_frame) else image_frame


def resolve_topic(topic: str) -> str:
    """Return the absolute name of a topic parameter of node /detector; "" stays empty."""
    if topic.startswith("~"):
        return f"/detector/{topic[1:].lstrip('/')}"
    return topic if not topic or topic.startswith("/") else f"/{topic}"


def _choose_map(tree: TransformTree, parameters: DetectorParameters, bag: BagReader) -> str:
    """Return the map frame; `auto` is the first of map and odom that is connected to the base.

    Raises UserError if it is not connected.
    """
    base, wanted = parameters.base_frame, parameters.map_frame
    candidates = _USUAL_MAPS if wanted == "auto" else (wanted,)
    for frame in candidates:
        if tree.connects(frame, base):
            return frame
    missing = [topic for topic in _TF_TOPICS if topic not in bag.topics]
    if "/tf" in missing:
        raise UserError(f"bag {str(bag.path)!r} has no topic /tf; it has {', '.join(sorted(bag.topics))}")
    found = tree.connected_to(base)
    other = next((frame for frame in _USUAL_MAPS if frame in found and wanted != "auto"), None)
    advice = (
        f"give -p map_frame:={other}"
        if other
        else "give -p map_frame:=NAME and -p base_frame:=NAME, or -p odometry_topic:=TOPIC"
    )
    raise UserError(
        f"bag {str(bag.path)!r} has no transform {' or '.join(candidates)} -> {base} on /tf or /tf_static; "
        f"frames connected to {base}: {', '.join(found) or 'none'}, others: "
        f"{', '.join(sorted(tree.frames - set(found) - {base})) or 'none'}; {advice}"
    )
