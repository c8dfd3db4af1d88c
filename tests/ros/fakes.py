# SPDX-License-Identifier: Apache-2.0
"""A fake detector, a fake rig of six cameras that publishes over DDS, and a detector node under test."""

import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from geometry_msgs.msg import TransformStamped
from rclpy.context import Context
from rclpy.executors import SingleThreadedExecutor
from rclpy.parameter import Parameter
from rclpy.qos import DurabilityPolicy, QoSProfile
from sensor_msgs.msg import CameraInfo, CompressedImage, Image, PointCloud2
from tf2_ros import StaticTransformBroadcaster, TransformBroadcaster
from vision_msgs.msg import Detection3DArray, LabelInfo
from visualization_msgs.msg import MarkerArray

from ftkd_core.classes import CAMERA_CHANNELS
from ftkd_core.types import CameraRound, ObjectList
from ftkd_ros.convert.images import encode_jpeg
from ftkd_ros.convert.message_factory import RCLPY
from ftkd_ros.convert.to_ros import compressed_image, make_header
from ftkd_ros.node.detector_node import DetectorNode
from ftkd_ros.node.spinning import make_executor, spin

CAMERAS = tuple(channel.lower() for channel in CAMERA_CHANNELS)
OFFSETS_S = (0.0076, 0.0155, 0.0, 0.0327, 0.0426, 0.023)
SIZE = (64, 48)
SPEED = 10.0
START = 1_000 * 10**9


class FakeDetector:
    """Returns one car per round; x is the number of cameras, y the mean red value of the front image."""

    channels = CAMERA_CHANNELS
    assigns_by_yaw = True
    weights_name = "fake.safetensors"
    training = "7 steps"
    device = "cpu"

    def __init__(self) -> None:
        self.rounds: list[CameraRound] = []
        self.resets = 0
        self.faults: dict[str, str] = {}
        self.recommended_thresholds: dict[str, float] = {}
        self.warnings: list[str] = []
        self.warmed_up = False

    def warm_up(self) -> None:
        self.warmed_up = True

    def reset(self) -> None:
        self.resets += 1

    def step(self, camera_round: CameraRound) -> ObjectList:
        self.rounds.append(camera_round)
        cameras = sum(view is not None for view in camera_round.views)
        front = camera_round.views[0]
        red = 0.0 if front is None else float(front.image[..., 0].mean())
        return ObjectList(
            boxes=np.array([[cameras, red, 1.0, 4.5, 1.9, 1.6, 0.3, 5.0, 0.0]]),
            scores=np.array([0.9]),
            labels=np.array([0]),
            stamp_ns=camera_round.reference_stamp_ns,
        )


def solid_jpeg(red: int) -> bytes:
    image = np.zeros((SIZE[1], SIZE[0], 3), dtype=np.uint8)
    image[..., 0] = red
    return encode_jpeg(image)


class FakeRig:
    """Publishes cameras and tf, and subscribes to all outputs of the node, in its own context."""

    def __init__(self, *, has_tf: bool = True, map_frame: str = "map") -> None:
        self.has_tf, self.map_frame = has_tf, map_frame
        self.context = Context()
        rclpy.init(context=self.context)
        self.node = rclpy.create_node("fake_rig", context=self.context)
        self.executor = SingleThreadedExecutor(context=self.context)
        self.executor.add_node(self.node)
        self._images: dict[str, Any] = {}
        self._infos: dict[str, Any] = {}
        for camera in CAMERAS:
            self._images[camera] = self.node.create_publisher(
                CompressedImage, f"/{camera}/image/compressed", 10
            )
            self._infos[camera] = self.node.create_publisher(CameraInfo, f"/{camera}/camera_info", 10)
        self._tf = TransformBroadcaster(self.node)
        self._static = StaticTransformBroadcaster(self.node)
        if has_tf:
            self._static.sendTransform([self._transform("base_link", camera, 0, 1.5) for camera in CAMERAS])
        self.received: dict[str, list[Any]] = {}
        self._subscribe(Detection3DArray, "/detections")
        self._subscribe(PointCloud2, "/detections/velocities")
        self._subscribe(MarkerArray, "/detections/markers")
        self._subscribe(Image, "/detections/bird_eye")
        self._subscribe(Image, "/detections/surround")
        self._subscribe(DiagnosticArray, "/diagnostics")
        latched = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
        self._subscribe(LabelInfo, "/detections/label_info", latched)

    def _subscribe(self, message_type: Any, topic: str, qos: Any = 10) -> None:
        self.received[topic] = []
        self.node.create_subscription(message_type, topic, self.received[topic].append, qos)

    @staticmethod
    def _transform(parent: str, child: str, stamp_ns: int, x: float) -> TransformStamped:
        message = TransformStamped(header=make_header(RCLPY, stamp_ns, parent), child_frame_id=child)
        message.transform.translation.x = x
        message.transform.rotation.w = 1.0
        return message

    def send_round(
        self,
        trigger_ns: int,
        *,
        red: int = 100,
        without: tuple[str, ...] = (),
        truncated: tuple[str, ...] = (),
        with_info: tuple[str, ...] = (),
        offsets_s: tuple[float, ...] = OFFSETS_S,
    ) -> None:
        """Publish one round: tf at every exposure (10 m/s along x of map), then camera_info and images."""
        stamps = {c: trigger_ns + round(o * 1e9) for c, o in zip(CAMERAS, offsets_s, strict=True)}
        poses = [
            self._transform(self.map_frame, "base_link", stamp, SPEED * stamp * 1e-9)
            for stamp in stamps.values()
        ]
        if self.has_tf:
            self._tf.sendTransform(poses)
        for camera in sorted((set(CAMERAS) - set(without)) | set(with_info), key=lambda name: stamps[name]):
            info = CameraInfo(
                header=make_header(RCLPY, stamps[camera], camera), width=SIZE[0], height=SIZE[1]
            )
            info.k = [50.0, 0.0, 32.0, 0.0, 50.0, 24.0, 0.0, 0.0, 1.0]
            self._infos[camera].publish(info)
            if camera in without:
                continue
            content = solid_jpeg(red)
            content = content[: len(content) // 2] if camera in truncated else content
            self._images[camera].publish(compressed_image(RCLPY, content, stamps[camera], camera))

    def wait_until(self, condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
        """Run callbacks until the condition is true; fail after the timeout."""
        end = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < end, "timeout while waiting for the node under test"
            self.executor.spin_once(timeout_sec=0.02)

    def is_connected(self) -> bool:
        """Return True if the node under test subscribes to all cameras and its outputs are discovered."""
        publishers = [*self._images.values(), *self._infos.values()]
        return all(p.get_subscription_count() > 0 for p in publishers) and (
            self.node.count_publishers("/detections") > 0 and self.node.count_subscribers("/tf_static") > 0
        )

    def close(self) -> None:
        self.executor.shutdown()
        self.node.destroy_node()
        rclpy.shutdown(context=self.context)


_triggers = iter(range(START, START + 10**15, 5 * 10**8))


def send_and_receive(rig: FakeRig, **options: Any) -> int:
    """Publish the next round, wait for its detections and return its trigger stamp."""
    trigger = next(_triggers)
    already = len(rig.received["/detections"])
    rig.send_round(trigger, **options)
    rig.wait_until(lambda: len(rig.received["/detections"]) > already)
    return trigger


class RunningNode:
    """An active detector node under test that spins in its own thread."""

    def __init__(self, detector: FakeDetector | None = None, **parameters: object) -> None:
        self.context = Context()
        rclpy.init(context=self.context)
        self.detector = FakeDetector() if detector is None else detector
        overrides = [Parameter(name, value=value) for name, value in parameters.items()]
        self.node = DetectorNode(lambda _: self.detector, context=self.context, parameter_overrides=overrides)
        self.node.trigger_configure()
        self.node.trigger_activate()
        self.executor = make_executor(self.context)
        self.executor.add_node(self.node)
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=spin, args=(self.executor, self.context, self._stop), daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        self._thread.join(30)
        assert not self._thread.is_alive()
        self.node.close()
        self.executor.shutdown()
        self.node.destroy_node()
        rclpy.shutdown(context=self.context)
