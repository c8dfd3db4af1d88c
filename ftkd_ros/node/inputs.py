# SPDX-License-Identifier: Apache-2.0
"""Camera inputs of the detector node: subscriptions to images and camera_info, and the synchronizer.

The callbacks only store messages and pass on rounds; they run on the thread of the executor.
"""

from collections.abc import Callable, Sequence
from typing import Any, Final

import message_filters
from nav_msgs.msg import Odometry
from rclpy.clock import Clock, ClockType, JumpThreshold
from rclpy.duration import Duration
from rclpy.event_handler import SubscriptionEventCallbacks
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, HistoryPolicy, QoSProfile, ReliabilityPolicy
from rclpy.qos_overriding_options import QoSOverridingOptions
from sensor_msgs.msg import CameraInfo, CompressedImage, Image

from ftkd_ros.convert.from_ros import stamp_to_ns
from ftkd_ros.node.matchers import make_matcher
from ftkd_ros.node.parameters import DetectorParameters
from ftkd_ros.node.tf_rig import RigReader
from ftkd_ros.sync.matcher import JUMP_NS, MatchedRound
from ftkd_ros.sync.matcher_interface import Matcher
from ftkd_ros.sync.synchronizer import SurroundSynchronizer

_POLL_S: Final = 0.01


class CameraInputs:
    """Subscribes to the cameras between `open` and `close`, and calls back with their rounds.

    on_image(camera, message): an image has arrived. on_round(matched): a round is complete or has timed out.
    on_clock_jump(): the node's clock has jumped back. on_error(text): a callback has failed.
    on_odometry(message): called if parameter odometry_topic is set. camera_info messages go to `rig`.
    """

    def __init__(
        self,
        node: Node,
        parameters: DetectorParameters,
        rig: RigReader,
        *,
        on_image: Callable[[str, Any], None],
        on_round: Callable[[MatchedRound[Any]], None],
        on_clock_jump: Callable[[], None],
        on_error: Callable[[str], None],
        on_odometry: Callable[[Any], None] | None = None,
    ) -> None:
        self._node = node
        self._parameters = parameters
        self._rig = rig
        self._on_image = on_image
        self._on_round = on_round
        self._on_clock_jump = on_clock_jump
        self._on_error = on_error
        self._on_odometry = on_odometry
        self._steady = Clock(clock_type=ClockType.STEADY_TIME)
        self._subscribers: list[Any] = []
        self._synchronizer: Any = None
        self._poll_timer: Any = None
        self._jump_handle: Any = None

    def open(self) -> None:
        """Subscribe to all cameras with a new synchronizer. After an error, call `close`."""
        parameters = self._parameters
        images = []
        for camera, calibration, transport, image_topic, info_topic in zip(
            parameters.cameras,
            parameters.calibration_files,
            parameters.image_transports,
            parameters.image_topics,
            parameters.camera_info_topics,
            strict=True,
        ):
            image = self._subscribe(CompressedImage if transport == "compressed" else Image, image_topic)
            image.registerCallback(lambda message, camera: self._on_image(camera, message), camera)
            images.append(image)
            for latched in (False, True) if calibration is None else ():
                info = self._subscribe(CameraInfo, info_topic, latched=latched)
                info.registerCallback(self._rig.add_camera_info, camera)
        if self._on_odometry is not None:
            odometry = self._subscribe(Odometry, parameters.odometry_topic)
            odometry.registerCallback(self._on_odometry)
        self._synchronizer = make_synchronizer(
            parameters,
            images,
            now_ns=lambda: int(self._node.get_clock().now().nanoseconds),
            on_error=lambda error: self._on_error(f"round lost: {error}"),
        )
        if self.matcher is not None:
            self._synchronizer.registerCallback(self._on_round)
            self._poll_timer = self._node.create_timer(_POLL_S, self._synchronizer.poll, clock=self._steady)
        else:
            self._synchronizer.registerCallback(self._pass_on_messages)
        self._jump_handle = self._watch_clock()

    def close(self) -> None:
        """Destroy the subscriptions and the timer. Counters stay readable; a second call has no effect."""
        if self._poll_timer is not None:
            self._node.destroy_timer(self._poll_timer)
            self._poll_timer = None
        if self._jump_handle is not None:
            self._jump_handle.unregister()
            self._jump_handle = None
        while self._subscribers:
            self._node.destroy_subscription(self._subscribers.pop().sub)

    @property
    def is_open(self) -> bool:
        """True between `open` and `close`."""
        return bool(self._subscribers)

    @property
    def matcher(self) -> Matcher | None:
        """The matcher of our policies; None before `open` and for the policies of message_filters."""
        ours = isinstance(self._synchronizer, SurroundSynchronizer)
        return self._synchronizer.matcher if ours else None

    @property
    def sync_counts(self) -> dict[str, int]:
        """Counters of the matcher; empty without one."""
        if self.matcher is None:
            return {}
        return dict(self.matcher.counts) | {"callback_errors": self._synchronizer.callback_errors}

    @property
    def warnings(self) -> list[str]:
        """Warnings of the matcher about offsets and clocks; empty without one."""
        return self.matcher.warnings() if self.matcher is not None else []

    @property
    def faults(self) -> dict[str, str]:
        """By camera, why its images are in no round; empty without a matcher."""
        if self.matcher is None:
            return {}
        found = {camera: self.matcher.fault(index) for index, camera in enumerate(self._parameters.cameras)}
        return {camera: fault for camera, fault in found.items() if fault is not None}

    def take_events(self) -> list[str]:
        """Return sentences about decisions of the matcher and clear them; the node logs them."""
        return self.matcher.take_events() if self.matcher is not None else []

    def _subscribe(self, message_type: Any, topic: str, *, latched: bool = False) -> Any:
        """Subscribe to a topic. latched: also get the last message that was published before, from publishers
        that offer it (transient_local); others do not match such a subscription."""
        reliable = latched or self._parameters.qos_reliability == "reliable"
        qos = QoSProfile(
            history=HistoryPolicy.KEEP_LAST,
            depth=self._parameters.queue_depth,
            reliability=ReliabilityPolicy.RELIABLE if reliable else ReliabilityPolicy.BEST_EFFORT,
            durability=DurabilityPolicy.TRANSIENT_LOCAL if latched else DurabilityPolicy.VOLATILE,
        )
        overriding = QoSOverridingOptions.with_default_policies(entity_id="latched" if latched else None)
        # rclpy warns of every publisher that does not match, as most do not match the latched subscription.
        events = SubscriptionEventCallbacks(use_default_callbacks=not latched)
        subscriber = message_filters.Subscriber(
            self._node,
            message_type,
            topic,
            qos_profile=qos,
            qos_overriding_options=overriding,
            event_callbacks=events,
        )
        self._subscribers.append(subscriber)
        return subscriber

    def _watch_clock(self) -> Any:
        threshold = JumpThreshold(
            min_forward=None, min_backward=Duration(nanoseconds=-JUMP_NS), on_clock_change=False
        )
        return self._node.get_clock().create_jump_callback(threshold, post_callback=self._clear_after_jump)

    def _clear_after_jump(self, jump: Any) -> None:
        if self.matcher is not None:
            self._synchronizer.clear()
        self._on_clock_jump()

    def _pass_on_messages(self, *messages: Any) -> None:
        stamps = tuple(stamp_to_ns(message.header.stamp) for message in messages)
        self._on_round(MatchedRound(messages=messages, stamps_ns=stamps))


def make_synchronizer(
    parameters: DetectorParameters,
    images: Sequence[Any],
    *,
    now_ns: Callable[[], int],
    on_error: Callable[[Exception], None],
) -> Any:
    """Return the synchronizer of parameter `sync_policy`, connected to the image subscribers."""
    if parameters.sync_policy == "exact":
        return message_filters.TimeSynchronizer(images, parameters.queue_depth)
    if parameters.sync_policy == "approximate":
        return message_filters.ApproximateTimeSynchronizer(
            images, parameters.queue_depth, parameters.sync_slop_s
        )
    return SurroundSynchronizer(images, make_matcher(parameters), now_ns=now_ns, on_error=on_error)
