# SPDX-License-Identifier: Apache-2.0
"""The detector node: camera messages in, 3-D detections out.

Inputs: images and camera_info of N cameras, /tf, /tf_static; service ~/reset (std_srvs/Trigger). Outputs:
detections (Detection3DArray) with detections/velocities, label_info, markers, bird_eye and surround;
/diagnostics. Processing: `CameraInputs` groups images into rounds, `DetectionWorker` decodes them and runs
the detector on its own thread, and `ResultPublishers` publishes. The thread of the executor only passes
messages on.
"""

from ftkd_ros.signals import exit_quietly_on_signals

if __name__ == "__main__":
    exit_quietly_on_signals()  # the imports below take seconds

import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import rclpy
from rcl_interfaces.msg import SetParametersResult
from rclpy.duration import Duration
from rclpy.exceptions import ParameterException
from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn
from rclpy.parameter import Parameter
from std_srvs.srv import Trigger
from tf2_ros import TransformListener

from ftkd_core.errors import UserError
from ftkd_core.json_files import write_json
from ftkd_ros.convert.from_ros import stamp_to_ns
from ftkd_ros.node.camera_health import CameraHealth
from ftkd_ros.node.declaration import declare_parameters
from ftkd_ros.node.ego_motion import RewindingBuffer
from ftkd_ros.node.health_reporting import HealthReporter, StatisticsTopics
from ftkd_ros.node.inputs import CameraInputs
from ftkd_ros.node.loading import DetectorFactory, check_cameras, free_memory, load_detector
from ftkd_ros.node.parameters import changed_parameters
from ftkd_ros.node.publishing import ResultPublishers
from ftkd_ros.node.spinning import make_executor, spin, start_ros
from ftkd_ros.node.stream_monitor import StreamMonitor
from ftkd_ros.node.tf_rig import RigReader, make_odometry, make_rig
from ftkd_ros.node.worker import DetectionWorker, Outcome
from ftkd_ros.sync.assembly import RoundBuilder, newest_stamp_ns
from ftkd_ros.sync.matcher import MatchedRound

_REPEAT_S: Final = 5.0


class DetectorNode(LifecycleNode):
    """Lifecycle node: configure loads the detector and creates the outputs; activate subscribes to the
    cameras.

    Subscriptions exist only in state active, because rclpy calls their callbacks in every state. The
    constructor raises UserError for a bad parameter. After a failed configure or activate, `failure` is the
    error message: rclpy swallows exceptions of transition callbacks.
    """

    def __init__(self, detector_factory: DetectorFactory = load_detector, **node_arguments: Any) -> None:
        super().__init__("detector", **node_arguments)
        self.failure: str | None = None
        try:
            self.parameters = declare_parameters(self)
        except (UserError, ParameterException):
            self.destroy_node()
            raise
        self._detector_factory = detector_factory
        self._last_warning_s: dict[str, float] = {}
        self._worker: DetectionWorker | None = None  # set while configured
        self._resources = ExitStack()  # what configure has created
        self._health = CameraHealth(self.parameters.cameras)
        self._parameter_handle = self.add_on_set_parameters_callback(self._on_set_parameters)

    # -- lifecycle -------------------------------------------------------------------------------------------

    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Load and warm up the detector; create tf buffer, outputs, service and worker."""
        if not self._succeeds(self._configure, "configure"):
            self._release()
            return TransitionCallbackReturn.FAILURE
        self.get_logger().info(f"{self._detector.weights_name} on {self._detector.device} is ready")
        return TransitionCallbackReturn.SUCCESS

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Start publishing and subscribe to the cameras."""
        result = super().on_activate(state)

        def open_inputs() -> None:
            self._results.publish_labels(self.get_clock().now().nanoseconds)
            self._reporter.start()
            self._inputs.open()

        if not self._succeeds(open_inputs, "activate"):
            self._inputs.close()
            super().on_deactivate(state)
            return TransitionCallbackReturn.FAILURE
        return result

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Unsubscribe from the cameras and reset the memory; the detector stays loaded."""
        if self._worker is not None:
            self._inputs.close()
            self._worker.request_reset("deactivated")
        return super().on_deactivate(state)

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Log and write the summary; release all that configure created, the detector too."""
        self.close()
        return TransitionCallbackReturn.SUCCESS

    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Stop the worker and write the summary."""
        self.close()
        return TransitionCallbackReturn.SUCCESS

    def close(self) -> None:
        """Stop the worker, log a summary, write the summary file and release all; only once."""
        if self._worker is None:
            return
        self._worker.stop()
        summary = self.summary()
        self._release()
        latency = summary["latency_ms"]
        self.get_logger().info(
            f"rounds in {summary['rounds_in']}, detected {summary['rounds_detected']}, "
            f"dropped {summary['rounds_dropped']}, partial {summary['partial_rounds']}; "
            f"latency p50 {latency['p50']} ms, p95 {latency['p95']} ms; resets {summary['resets']}"
        )
        if self.parameters.summary_file:
            try:
                write_json(Path(self.parameters.summary_file), summary)
            except OSError as error:
                self.get_logger().error(f"summary file {self.parameters.summary_file!r} not written: {error}")

    def summary(self) -> dict[str, Any]:
        """Return counters, latency and stage times so far, with device and weights."""
        assert self._worker is not None, "only a configured node has a summary"
        return {
            **self._worker.snapshot(),
            "sync": self._inputs.sync_counts,
            "device": str(self._detector.device),
            "weights": self._detector.weights_name,
            "training": self._detector.training,
            "warnings": self._worker.warnings,
        }

    def _succeeds(self, step: Callable[[], None], name: str) -> bool:
        """Run one transition step; log and store the error, because rclpy swallows exceptions."""
        self.failure = None
        try:
            step()
        except UserError as error:
            self.failure = str(error)
        except Exception as error:
            self.get_logger().debug(traceback.format_exc())
            self.failure = f"the detector cannot {name}: {type(error).__name__}: {error}"
        if self.failure is not None:
            self.get_logger().error(self.failure)
        return self.failure is None

    def _configure(self) -> None:
        parameters, keep = self.parameters, self._resources.callback
        self._detector = self._detector_factory(parameters)
        keep(self._drop_detector)
        if not self._detector.assigns_by_yaw:
            check_cameras(parameters.cameras, self._detector.channels)
        self._detector.warm_up()
        self._buffer = RewindingBuffer(cache_time=Duration(seconds=parameters.tf_cache_s), node=self)
        keep(self._drop_buffer)
        keep(TransformListener(self._buffer, self).unregister)
        self._results = ResultPublishers(
            self, parameters, tuple(self._detector.channels), self._detector.recommended_thresholds
        )
        keep(self._results.close)
        self._statistics = StatisticsTopics(self)
        keep(self._statistics.close)
        self._add_services()
        odometry = make_odometry(self._buffer, parameters)
        rig = make_rig(self._buffer, parameters, odometry, self.get_logger().info)
        self._inputs = CameraInputs(
            self,
            parameters,
            rig,
            on_image=self._note_image,
            on_round=self._submit,
            on_clock_jump=self._reset_after_clock_jump,
            on_error=self._warn,
            on_odometry=None if odometry is None else odometry.add,
        )
        keep(self._inputs.close)
        worker = self._make_worker(rig)
        keep(self._builder.close)
        keep(worker.stop)
        self._reporter = HealthReporter(self, parameters, self._health, self._inputs, worker, self._warn)
        keep(self._reporter.close)
        worker.start()
        self._worker = worker

    def _make_worker(self, rig: RigReader) -> DetectionWorker:
        parameters = self.parameters
        self._builder = RoundBuilder(
            rig,
            topics=parameters.image_topics,
            num_views=max(len(parameters.cameras), len(self._detector.channels)),
            reference_time=parameters.reference_time,
            anchor=parameters.anchor,
            tf_timeout_s=parameters.tf_timeout_s,
            prepare=getattr(self._detector, "prepare", None),
            pose_is_awaited=True,
        )
        monitor = StreamMonitor(
            max_gap_s=parameters.memory_max_gap_s, max_speed_m_s=parameters.memory_max_speed
        )
        return DetectionWorker(
            self._detector,
            self._builder.build,
            self._publish,
            self._warn,
            monitor,
            cameras=parameters.cameras,
            on_reset=self.get_logger().info,
            on_failure=self.get_logger().error,
            on_record=self._statistics.publish,
            clock_ns=lambda: int(self.get_clock().now().nanoseconds),
            is_ready=lambda matched: rig.has_pose(newest_stamp_ns(matched)),
            wait_s=parameters.tf_timeout_s,
        )

    def _release(self) -> None:
        """Release what configure has created, in reverse order."""
        if self._worker is not None:
            self._worker.stop()
            self._worker = None
        self._resources.close()

    def _drop_detector(self) -> None:
        """Drop the detector and give its GPU memory back."""
        self._detector = None
        for name in ("_builder", "_inputs", "_reporter"):  # their rig holds the tf buffer
            self.__dict__.pop(name, None)
        free_memory()

    def _drop_buffer(self) -> None:
        """Destroy service and jump callback of the tf buffer, which would keep it alive, and drop it."""
        self._buffer.jump_handle.unregister()
        service = getattr(self._buffer, "srv", None)
        if service is not None:
            self.destroy_service(service)
        self._buffer.clear()
        del self._buffer

    # -- inputs: callbacks on the thread of the executor -----------------------------------------------------

    def _note_image(self, camera: str, message: Any) -> None:
        self._health.add(camera, time.monotonic(), stamp_to_ns(message.header.stamp))
        if self._worker is not None and not self._worker.is_behind:
            self._builder.arrive(self.parameters.cameras.index(camera), message)

    def _submit(self, matched: MatchedRound[Any]) -> None:
        if self._worker is not None:
            self._worker.submit(matched)

    def _reset_after_clock_jump(self) -> None:
        if self._worker is not None:
            self._worker.request_reset("clock_jump")

    def _on_reset(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        if self._worker is not None:
            self._worker.request_reset("service")
        response.success, response.message = True, "the memory will be reset before the next round"
        return response

    def _on_set_parameters(self, changed: Sequence[Parameter]) -> SetParametersResult:
        """Apply thresholds and range limits; rclpy refuses the other parameters, which are read-only."""
        try:
            self.parameters = changed_parameters(
                self.parameters, {parameter.name: parameter.value for parameter in changed}
            )
        except UserError as error:
            return SetParametersResult(successful=False, reason=str(error))
        if self._worker is not None:
            self._results.parameters = self.parameters
        return SetParametersResult(successful=True)

    # -- outputs ---------------------------------------------------------------------------------------------

    def _add_services(self) -> None:
        service = self.create_service(Trigger, "~/reset", self._on_reset)
        self._resources.callback(self.destroy_service, service)

    def _publish(self, outcome: Outcome) -> None:
        self._results.publish(outcome.objects, outcome.camera_round)

    def _warn(self, text: str) -> None:
        """Log a warning; texts that differ in numbers only are logged once per 5 s."""
        now, kind = time.monotonic(), re.sub(r"[\d.]+", "#", text)[:48]
        if now - self._last_warning_s.get(kind, -_REPEAT_S) >= _REPEAT_S:
            self._last_warning_s[kind] = now
            self.get_logger().warning(text)


def run_node(node: DetectorNode, stop: threading.Event) -> int:
    """Run a node until `stop` is set.

    Returns exit code 0, or 2 if autostart cannot configure or activate it.
    """
    executor = make_executor(node.context)
    executor.add_node(node)
    try:
        if node.parameters.autostart:
            for transition in (node.trigger_configure, node.trigger_activate):
                transition()
                if node.failure is not None:
                    return 2
        spin(executor, node.context, stop)
    finally:
        node.close()
        executor.shutdown()
        node.destroy_node()
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `ros2 run ftkd_ros detector`: exit code 0 after SIGINT or SIGTERM, 2 and one sentence for bad
    parameters.

    Own signal handlers are installed, because those of rclpy shut down the context while a round is
    published.
    """
    stop = threading.Event()
    signals = (signal.SIGINT, signal.SIGTERM)
    for number in signals:
        signal.signal(number, lambda *_: stop.set())
    try:
        start_ros(arguments)
        return run_node(DetectorNode(), stop)
    except (UserError, ParameterException) as error:
        print(f"detector: {error}", file=sys.stderr)
        return 2
    finally:
        for number in signals:  # the work is done, so further signals are ignored
            signal.signal(number, signal.SIG_IGN)
        rclpy.try_shutdown()


if __name__ == "__main__":
    sys.exit(main())
