# SPDX-License-Identifier: Apache-2.0
"""A detector that answers at once, and a rig of six small cameras that publishes to a node under test."""

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
from ftkd_ros.convert.to_ros import make_header, rgb_to_compressed
from ftkd_ros.node.detector_node import DetectorNode
from ftkd_ros.node.spinning import make_executor, spin

CAMERAS = tuple(channel.lower() for channel in CAMERA_CHANNELS)
OFFSETS_S = (0.0076, 0.0155, 0.0, 0.0327, 0.0426, 0.023)
SIZE = (64, 48)
SPEED = 10.0
START = 1_000 * 10**9


class FakeDetector:
    """One car a round; its x is the number of cameras seen, its y the mean red of the front image."""

    channels = CAMERA_CHANNELS
    weights_name = "fake.safetensors"
    training = "7 steps"
    device = "cpu"

    def __init__(self) -> None:
        self.rounds: list[CameraRound] = []
        self.resets = 0
        self.warmed_up = False

    def warm_up(self) -> None:
        self.warmed_up = True

    def reset(self) -> None:
        self.resets += 1

    def step(self, camera_round: CameraRound) -> ObjectList:
        self.rounds.append(camera_round)
        seen = sum(view is not None for view in camera_round.views)
        front = camera_round.views[0]
        red = 0.0 if front is None else float(front.image[..., 0].mean())
        return ObjectList(
            boxes=np.array([[seen, red, 1.0, 4.5, 1.9, 1.6, 0.3, 5.0, 0.0]]),
            scores=np.array([0.9]),
            labels=np.array([0]),
            stamp_ns=camera_round.reference_stamp_ns,
        )


def solid_jpeg(red: int) -> bytes:
    image = np.zeros((SIZE[1], SIZE[0], 3), dtype=np.uint8)
    image[..., 0] = red
    return encode_jpeg(image)


class Bench:
    """The other side of the wire, with a DDS participant of its own: a camera rig, tf, and ears for all
    outputs."""

    def __init__(self) -> None:
        self.context = Context()
        rclpy.init(context=self.context)
        self.node = rclpy.create_node("bench", context=self.context)
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
        self._static.sendTransform([self._transform("base_link", camera, 0, 1.5) for camera in CAMERAS])
        self.received: dict[str, list[Any]] = {}
        self._listen(Detection3DArray, "/detections")
        self._listen(PointCloud2, "/detections/velocities")
        self._listen(MarkerArray, "/detections/markers")
        self._listen(Image, "/detections/bird_eye")
        self._listen(Image, "/detections/surround")
        self._listen(DiagnosticArray, "/diagnostics")
        latched = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
        self._listen(LabelInfo, "/detections/label_info", latched)

    def _listen(self, message_type: Any, topic: str, qos: Any = 10) -> None:
        self.received[topic] = []
        self.node.create_subscription(message_type, topic, self.received[topic].append, qos)

    @staticmethod
    def _transform(parent: str, child: str, stamp_ns: int, x: float) -> TransformStamped:
        message = TransformStamped(header=make_header(stamp_ns, parent), child_frame_id=child)
        message.transform.translation.x = x
        message.transform.rotation.w = 1.0
        return message

    def send_round(
        self, trigger_ns: int, *, red: int = 100, without: tuple[str, ...] = (), torn: tuple[str, ...] = ()
    ) -> None:
        """One round: tf at every exposure (10 m/s along x of map), then calibration and image of each
        camera."""
        stamps = {c: trigger_ns + round(o * 1e9) for c, o in zip(CAMERAS, OFFSETS_S, strict=True)}
        poses = [
            self._transform("map", "base_link", stamp, SPEED * stamp * 1e-9) for stamp in stamps.values()
        ]
        self._tf.sendTransform(poses)
        for camera in sorted(set(CAMERAS) - set(without), key=lambda name: stamps[name]):
            info = CameraInfo(header=make_header(stamps[camera], camera), width=SIZE[0], height=SIZE[1])
            info.k = [50.0, 0.0, 32.0, 0.0, 50.0, 24.0, 0.0, 0.0, 1.0]
            self._infos[camera].publish(info)
            content = solid_jpeg(red)
            content = content[: len(content) // 2] if camera in torn else content
            self._images[camera].publish(rgb_to_compressed(content, stamps[camera], camera))

    def wait_until(self, condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
        """Receive until the condition holds; fails after the timeout."""
        end = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < end, "waited in vain for the node under test"
            self.executor.spin_once(timeout_sec=0.02)

    def is_connected(self) -> bool:
        """Whether the node under test listens to every camera, and is heard."""
        publishers = [*self._images.values(), *self._infos.values()]
        return all(p.get_subscription_count() > 0 for p in publishers) and (
            self.node.count_publishers("/detections") > 0 and self.node.count_subscribers("/tf_static") > 0
        )

    def close(self) -> None:
        self.executor.shutdown()
        self.node.destroy_node()
        rclpy.shutdown(context=self.context)


_triggers = iter(range(START, START + 10**15, 5 * 10**8))


def send_and_receive(bench: Bench, **options: Any) -> int:
    """Send the next round and wait for what comes of it; gives its trigger."""
    trigger = next(_triggers)
    already = len(bench.received["/detections"])
    bench.send_round(trigger, **options)
    bench.wait_until(lambda: len(bench.received["/detections"]) > already)
    return trigger


class Running:
    """A node under test, spun on a thread of its own."""

    def __init__(self, **parameters: object) -> None:
        self.context = Context()
        rclpy.init(context=self.context)
        self.detector = FakeDetector()
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
