# SPDX-License-Identifier: Apache-2.0
"""Some seconds of the cameras of a running vehicle -> bag, for `ftkd check-rig` without a bag."""

import re
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import rclpy
from rclpy.context import Context
from rclpy.node import Node
from rclpy.parameter import Parameter

from ftkd_core.errors import UserError
from ftkd_ros.bag.node_running import spinning
from ftkd_ros.bag.recorder import RecorderNode

_CAMERA_TOPIC: Final = re.compile(r"^/.+/(image|image/compressed|camera_info)$")
_OTHER_TOPICS: Final = ("/tf", "/tf_static", "/odom")
_DISCOVERY_S: Final = 10.0
_SETTLE_S: Final = 1.0  # topics that appear after the first camera


def record_rig(output: Path, seconds: float) -> str:
    """Record images, camera_info and transforms of all cameras into the new bag `output`.

    Returns a summary in one sentence. Raises UserError if no camera publishes and if the bag cannot be
    written.
    """
    if not 0.5 <= seconds <= 600:
        raise UserError(f"--seconds {seconds:g}; expected 0.5 to 600")
    context = Context()
    rclpy.init(context=context)
    try:
        topics = _find_topics(context)
        recorder = RecorderNode(
            context=context,
            parameter_overrides=[
                Parameter("output", value=str(output)),
                Parameter("topics", value=topics),
            ],
        )
        stop = threading.Event()
        timer = threading.Thread(target=_end_after, args=(recorder, seconds, stop), daemon=True)
        with spinning(recorder):
            timer.start()
            try:
                return recorder.record(stop)
            finally:
                stop.set()
                timer.join()
    finally:
        rclpy.try_shutdown(context=context)


def _end_after(recorder: RecorderNode, seconds: float, stop: threading.Event) -> None:
    """Set `stop` that many seconds after every topic has a message, or _DISCOVERY_S have passed."""
    latest = time.monotonic() + _DISCOVERY_S
    while not recorder.has_all_topics and time.monotonic() < latest:
        if stop.wait(0.05):
            return
    stop.wait(seconds)
    stop.set()


def _find_topics(context: Context) -> list[str]:
    """Return the topics to record. Raises UserError if no camera is found in time."""
    node = rclpy.create_node("check_rig", context=context)
    try:
        return _wait_for_cameras(node)
    finally:
        node.destroy_node()


def _wait_for_cameras(node: Node) -> list[str]:
    end = time.monotonic() + _DISCOVERY_S
    while not _select(_topics(node)):
        if time.monotonic() >= end:
            raise UserError(
                f"no topic CAMERA/image or CAMERA/image/compressed within {_DISCOVERY_S:g} s; there are "
                f"{', '.join(_topics(node)) or 'no topics'}; check ROS_DOMAIN_ID, remap the topics of the "
                "driver, or give --bag"
            )
        time.sleep(0.1)
    time.sleep(_SETTLE_S)
    return _select(_topics(node))


def _topics(node: Node) -> list[str]:
    return sorted(name for name, _ in node.get_topic_names_and_types())


def _select(topics: Sequence[str]) -> list[str]:
    """Return camera topics and transforms; none without an image topic."""
    cameras = [topic for topic in topics if _CAMERA_TOPIC.match(topic)]
    has_image = any(not topic.endswith("/camera_info") for topic in cameras)
    return [*cameras, *(topic for topic in _OTHER_TOPICS if topic in topics)] if has_image else []
