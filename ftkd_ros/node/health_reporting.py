# SPDX-License-Identifier: Apache-2.0
"""HealthReporter: /diagnostics, log lines about cameras, and statistics topics of the detector node."""

import time
from collections.abc import Callable
from typing import Any, Final

from diagnostic_msgs.msg import DiagnosticArray
from rclpy.clock import Clock, ClockType
from rclpy.lifecycle import LifecycleNode
from std_msgs.msg import Float64

from ftkd_ros.node.camera_health import LOST_S, CameraHealth, CameraState, transport_warning
from ftkd_ros.node.diagnostics import build_diagnostics
from ftkd_ros.node.inputs import CameraInputs
from ftkd_ros.node.parameters import DetectorParameters
from ftkd_ros.node.statistics import RoundRecord
from ftkd_ros.node.worker import DetectionWorker

_DIAGNOSTICS_S: Final = 1.0
_CHECK_S: Final = 0.25
_FAULT_S: Final = 1.0  # a camera that was masked within this time has a fault


class HealthReporter:
    """Publishes /diagnostics once per second and at once when the level of a status changes.

    `warn` logs a sentence and limits its rate. The timers run from creation to `close`; nothing is published
    while `inputs` is closed.
    """

    def __init__(
        self,
        node: LifecycleNode,
        parameters: DetectorParameters,
        cameras: CameraHealth,
        inputs: CameraInputs,
        worker: DetectionWorker,
        warn: Callable[[str], None],
    ) -> None:
        self._node = node
        self._parameters = parameters
        self._cameras = cameras
        self._inputs = inputs
        self._worker = worker
        self._warn = warn
        self._active_since_s = time.monotonic()
        self._published_s = 0.0
        self._levels: tuple[bytes, ...] = ()
        self._publisher = node.create_publisher(DiagnosticArray, "/diagnostics", 10)
        self._timer = node.create_timer(_CHECK_S, self._check, clock=Clock(clock_type=ClockType.STEADY_TIME))

    def start(self) -> None:
        """Begin a new period, when the node subscribes to the cameras."""
        self._cameras.clear()
        self._active_since_s = time.monotonic()

    def close(self) -> None:
        """Destroy timer and publisher."""
        self._node.destroy_timer(self._timer)
        self._node.destroy_publisher(self._publisher)

    def _check(self) -> None:
        if not self._inputs.is_open:
            return
        states = self._camera_states()
        if time.monotonic() - self._active_since_s >= LOST_S:
            self._log_changes(states)
        message = self._diagnostics(states)
        levels = tuple(status.level for status in message.status)
        now_s = time.monotonic()
        if levels != self._levels or now_s - self._published_s >= _DIAGNOSTICS_S - _CHECK_S / 2:
            self._levels, self._published_s = levels, now_s
            self._publisher.publish(message)

    def _camera_states(self) -> dict[str, CameraState]:
        faults = self._worker.recent_faults(_FAULT_S) | self._inputs.faults
        return self._cameras.states(
            time.monotonic(),
            self._node.get_clock().now().nanoseconds,
            self._parameters.health_window_s,
            faults,
        )

    def _log_changes(self, states: dict[str, CameraState]) -> None:
        """Log decisions of the synchronizer, and cameras that are lost, left out or back."""
        for event in self._inputs.take_events():
            self._node.get_logger().info(event)
        for is_fault, sentence in self._cameras.changes(states):
            if is_fault:  # two calls, because rclpy refuses two severities in one line
                self._node.get_logger().warning(sentence)
            else:
                self._node.get_logger().info(sentence)

    def _diagnostics(self, states: dict[str, CameraState]) -> DiagnosticArray:
        warnings = [*self._inputs.warnings, *self._worker.warnings]
        transport = transport_warning(states)
        if transport is not None:
            warnings = [*warnings, transport]
        for warning in warnings:
            self._warn(warning)
        return build_diagnostics(
            self._node.get_clock().now().to_msg(),
            self._node.get_name(),
            states,
            self._worker.recent(self._parameters.health_window_s),
            self._worker.snapshot(),
            self._inputs.sync_counts,
            warnings,
            max_silence_s=self._parameters.max_silence_s,
            active_s=time.monotonic() - self._active_since_s,
            failure=self._worker.failure,
        )


class StatisticsTopics:
    """Publishes the milliseconds of each stage of each round, for plots; only to topics with a subscriber."""

    def __init__(self, node: LifecycleNode) -> None:
        self._node = node
        self._publishers: dict[str, Any] = {
            "wait": self._create(Float64, "~/statistics/wait_ms"),
            "decode": self._create(Float64, "~/statistics/decode_ms"),
            "geometry": self._create(Float64, "~/statistics/geometry_ms"),
            "detect": self._create(Float64, "~/statistics/detect_ms"),
            "publish": self._create(Float64, "~/statistics/publish_ms"),
            "latency": self._create(Float64, "~/statistics/latency_ms"),
            "stamp": self._create(Float64, "~/statistics/stamp_latency_ms"),
        }

    def _create(self, message_type: Any, topic: str) -> Any:
        return self._node.create_publisher(message_type, topic, 10)

    def publish(self, record: RoundRecord) -> None:
        """Publish the times of a detected round."""
        times = record.stage_ms | {"latency": record.latency_ms}
        if record.stamp_latency_ms is not None:
            times["stamp"] = record.stamp_latency_ms
        for name, milliseconds in times.items():
            publisher = self._publishers.get(name)
            if publisher is not None and publisher.get_subscription_count() > 0:
                publisher.publish(Float64(data=float(milliseconds)))

    def close(self) -> None:
        """Destroy the publishers."""
        for publisher in self._publishers.values():
            self._node.destroy_publisher(publisher)
