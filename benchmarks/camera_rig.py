# SPDX-License-Identifier: Apache-2.0
"""A simulated rig of cameras in a process of its own: JPEG images, camera_info, tf, and faults on request.

    python -m benchmarks.camera_rig --seconds 10

Each line of standard input is a JSON object: {"set": {FIELD: VALUE, ...}} changes fields of `Faults`. The
answer is a line {"time_ns": ...}, the time from which the change holds. At the end the program prints
{"rounds": [...]}: the stamps of each round of images, in the order of the cameras.
"""

import argparse
import json
import sys
import threading
import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import cv2
import numpy as np
import rclpy
from geometry_msgs.msg import TransformStamped
from rclpy.node import Node
from rclpy.qos import QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import CameraInfo, CompressedImage
from tf2_ros import StaticTransformBroadcaster, TransformBroadcaster

from ftkd_core.geometry import yaw_transform
from ftkd_ros.convert.message_factory import RCLPY
from ftkd_ros.convert.to_ros import make_header, make_transforms
from ftkd_ros.launch_settings import optical_quaternion

CAMERAS: Final = (
    "cam_front",
    "cam_front_right",
    "cam_front_left",
    "cam_back",
    "cam_back_left",
    "cam_back_right",
)
YAWS_DEG: Final = (0.0, -55.0, 55.0, 180.0, 110.0, -110.0)
SIZE: Final = (1600, 900)
SPEED_M_S: Final = 10.0
_TF_S: Final = 0.02
_NAL_UNIT: Final = b"\x00\x00\x00\x01\x67\x42\x00\x1e"  # start of an H.264 stream
_LEAD_NS: Final = 40_000_000  # tf is ahead of the images, as that of a localisation that extrapolates


@dataclass
class Faults:
    """What is wrong with the rig; lists contain indices of cameras."""

    silent: list[int] = field(default_factory=list)
    frozen: list[int] = field(default_factory=list)
    zero_stamp: list[int] = field(default_factory=list)
    clock_shift_s: dict[str, float] = field(default_factory=dict)
    truncated: list[int] = field(default_factory=list)
    video: list[int] = field(default_factory=list)
    nan_intrinsics: list[int] = field(default_factory=list)
    wrong_size: list[int] = field(default_factory=list)
    unknown_frame: list[int] = field(default_factory=list)
    no_driver: list[int] = field(default_factory=list)
    half_rate: list[int] = field(default_factory=list)
    drop: float = 0.0
    no_tf: bool = False
    tf_late_s: float = 0.0
    pose_shift_m: float = 0.0
    time_shift_s: float = 0.0


def make_images(seed: int = 0) -> list[bytes]:
    """Return one JPEG per camera of about the size of a street image."""
    random = np.random.default_rng(seed)
    images = []
    for _ in CAMERAS:
        coarse = random.integers(0, 256, (SIZE[1] // 20, SIZE[0] // 20, 3), dtype=np.uint8)
        image = cv2.resize(coarse, SIZE, interpolation=cv2.INTER_CUBIC)
        _, content = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 92])
        images.append(content.tobytes())
    return images


class CameraRig(Node):  # type: ignore[misc]
    """Publishes rounds at `rate_hz`; camera i is exposed `i * offset_s` after the trigger."""

    def __init__(self, rate_hz: float, offset_s: float) -> None:
        super().__init__("camera_rig")
        self.faults = Faults()
        self.lock = threading.Lock()
        self.rounds: list[list[int]] = []
        self._period_s = 1 / rate_hz
        self._offset_s = offset_s
        self._random = np.random.default_rng(1)
        self._images = make_images()
        self._frozen_ns: dict[int, int] = {}
        self._late: list[tuple[float, TransformStamped]] = []
        self._drivers: dict[int, tuple[Any, Any]] = {}
        for index in range(len(CAMERAS)):
            self._start_driver(index)
        self._tf = TransformBroadcaster(self)
        self._static = StaticTransformBroadcaster(self)
        self._static.sendTransform([self._mount(index) for index in range(len(CAMERAS))])

    def run(self, seconds: float, stopped: threading.Event) -> None:
        """Publish for some time."""
        started = time.monotonic()
        number, next_tf = 0, started
        while not stopped.is_set() and time.monotonic() - started < seconds:
            trigger = started + number * self._period_s
            stamps: list[int] = []
            for index in range(len(CAMERAS)):
                due = trigger + index * self._offset_s
                while (now := time.monotonic()) < due:
                    if now >= next_tf:
                        self._send_tf()
                        next_tf = now + _TF_S
                    time.sleep(max(min(due, next_tf) - time.monotonic(), 0.0002))
                with self.lock:
                    stamps.append(self._send_image(index, number))
            if 0 not in stamps:
                self.rounds.append(stamps)
            number += 1

    def _start_driver(self, index: int) -> None:
        qos = QoSProfile(depth=10, reliability=ReliabilityPolicy.RELIABLE)
        image = self.create_publisher(CompressedImage, f"/{CAMERAS[index]}/image/compressed", qos)
        self._drivers[index] = image, self.create_publisher(CameraInfo, f"/{CAMERAS[index]}/camera_info", qos)

    def _stop_driver(self, index: int) -> None:
        for publisher in self._drivers.pop(index):
            self.destroy_publisher(publisher)

    def _mount(self, index: int) -> TransformStamped:
        message = TransformStamped(header=make_header(RCLPY, 0, "base_link"), child_frame_id=CAMERAS[index])
        message.transform.translation.z = 1.5
        rotation = message.transform.rotation
        rotation.x, rotation.y, rotation.z, rotation.w = optical_quaternion(YAWS_DEG[index], 0.0)
        return message

    def _send_tf(self) -> None:
        now, faults = time.monotonic(), self.faults
        stamp_ns = self._now_ns() + _LEAD_NS
        pose = yaw_transform(0.0, (SPEED_M_S * now + faults.pose_shift_m, 0.0, 0.0))
        (message,) = make_transforms(RCLPY, stamp_ns, "map", {"base_link": pose}).transforms
        self._late.append((now + faults.tf_late_s, message))
        while self._late and self._late[0][0] <= now:
            _, message = self._late.pop(0)
            if not faults.no_tf:
                self._tf.sendTransform(message)

    def _now_ns(self) -> int:
        return time.time_ns() + round(self.faults.time_shift_s * 1e9)

    def _send_image(self, index: int, number: int) -> int:
        """Publish one image; return its true stamp, 0 if nothing usable was sent."""
        faults = self.faults
        if (index in self._drivers) == (index in faults.no_driver):
            (self._stop_driver if index in self._drivers else self._start_driver)(index)
        is_dropped = self._random.random() < faults.drop or (index in faults.half_rate and number % 2)
        if index in faults.silent or index in faults.no_driver or is_dropped:
            return 0
        true_ns = self._now_ns()
        stamp_ns = self._stamp(index, true_ns)
        image, info = self._drivers[index]
        frame = "nowhere" if index in faults.unknown_frame else CAMERAS[index]
        info.publish(self._camera_info(index, stamp_ns, frame))
        content = self._images[index]
        content = content[: len(content) // 3] if index in faults.truncated else content
        content = _NAL_UNIT * 500 if index in faults.video else content
        message = CompressedImage(header=make_header(RCLPY, stamp_ns, frame))
        message.format = "h264" if index in faults.video else "jpeg"
        message.data = array("B", content)
        image.publish(message)
        return true_ns

    def _stamp(self, index: int, true_ns: int) -> int:
        faults = self.faults
        if index in faults.frozen:
            return self._frozen_ns.setdefault(index, true_ns)
        self._frozen_ns.pop(index, None)
        if index in faults.zero_stamp:
            return 0
        return true_ns + round(faults.clock_shift_s.get(str(index), 0.0) * 1e9)

    def _camera_info(self, index: int, stamp_ns: int, frame: str) -> CameraInfo:
        width, height = (640, 480) if index in self.faults.wrong_size else SIZE
        message = CameraInfo(header=make_header(RCLPY, stamp_ns, frame), width=width, height=height)
        focal = float("nan") if index in self.faults.nan_intrinsics else 1260.0
        message.k = [focal, 0.0, SIZE[0] / 2, 0.0, 1260.0, SIZE[1] / 2, 0.0, 0.0, 1.0]
        return message


def serve(rig: CameraRig, stopped: threading.Event) -> None:
    """Apply the commands of standard input; stop at its end."""
    for line in sys.stdin:
        changes = json.loads(line).get("set", {})
        with rig.lock:
            for name, value in changes.items():
                setattr(rig.faults, name, value)
            print(json.dumps({"time_ns": time.time_ns()}), flush=True)
    stopped.set()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the rig; exit code 0."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=1e9, help="duration  [default: until end of input]")
    parser.add_argument("--rate", type=float, default=12.0, help="rounds per second  [default: 12]")
    parser.add_argument("--offset", type=float, default=0.007, help="s between cameras  [default: 0.007]")
    options = parser.parse_args(arguments)
    rclpy.init()
    rig = CameraRig(options.rate, options.offset)
    stopped = threading.Event()
    threading.Thread(target=serve, args=(rig, stopped), daemon=True).start()
    try:
        rig.run(options.seconds, stopped)
    except KeyboardInterrupt:
        return 130
    print(json.dumps({"rounds": rig.rounds}), flush=True)
    rig.destroy_node()
    rclpy.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
