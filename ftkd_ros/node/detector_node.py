# SPDX-License-Identifier: Apache-2.0
"""The detector node: camera messages in, 3-D detections out.

In: N camera images and camera_info, /tf, /tf_static; ~/reset (std_srvs/Trigger). Out: detections
(Detection3DArray) and, below it, velocities, label_info, markers, bird_eye, surround; /diagnostics. Work:
SurroundSynchronizer makes rounds, DetectionWorker decodes and detects them on its own thread,
ResultPublishers sends. The executor's thread only moves messages.
"""

import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import message_filters
import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from rclpy.clock import Clock, ClockType, JumpThreshold
from rclpy.duration import Duration
from rclpy.exceptions import ParameterException
from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn
from rclpy.qos import HistoryPolicy, QoSProfile, ReliabilityPolicy
from rclpy.qos_overriding_options import QoSOverridingOptions
from rclpy.signals import SignalHandlerOptions
from sensor_msgs.msg import CameraInfo, CompressedImage, Image
from std_srvs.srv import Trigger
from tf2_ros import TransformListener

from ftkd_core.errors import UserError
from ftkd_core.json_files import write_json
from ftkd_ros.convert.from_ros import stamp_to_ns
from ftkd_ros.node.diagnostics import CameraWatch, build_diagnostics
from ftkd_ros.node.parameters import DetectorParameters, declare_parameters
from ftkd_ros.node.publishing import ResultPublishers
from ftkd_ros.node.spinning import make_executor, spin
from ftkd_ros.node.tf_rig import RewindingBuffer, RigReader
from ftkd_ros.node.worker import DetectionWorker, Outcome, StreamMonitor
from ftkd_ros.sync.assembly import RoundBuilder
from ftkd_ros.sync.matcher import JUMP_NS, MatchedRound
from ftkd_ros.sync.synchronizer import SurroundMatcher, SurroundSynchronizer

DetectorFactory = Callable[[DetectorParameters], Any]

_POLL_S: Final = 0.01
_DIAGNOSTICS_S: Final = 1.0
_REPEAT_S: Final = 5.0


def load_detector(parameters: DetectorParameters) -> Any:
    """The detector that the parameters name. Torch comes in here, so that a bad parameter is told at once."""
    from ftkd_core.runtime.detector import Detector

    return Detector.from_weights(
        parameters.weights or None,
        preset=parameters.preset or None,
        device=parameters.device,
        runtime=parameters.runtime,
        score_threshold=parameters.score_threshold,
        max_detections=parameters.max_detections,
    )


class DetectorNode(LifecycleNode):
    """Lifecycle: configure loads and warms up the detector and makes the outputs; activate subscribes to the
    cameras.

    Subscriptions exist only while active, because rclpy's keep firing in every state. Raises UserError for a
    bad parameter. After a failed configure or activate, `failure` holds the sentence that says why (rclpy
    itself swallows what its callbacks raise).
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
        self._steady = Clock(clock_type=ClockType.STEADY_TIME)
        self._said: dict[str, float] = {}
        self._worker: DetectionWorker | None = None
        self._synchronizer: Any = None
        self._inputs: list[Any] = []
        self._poll_timer: Any = None
        self._jump_handle: Any = None
        self._watch = CameraWatch(self.parameters.cameras)

    # -- lifecycle -------------------------------------------------------------------------------------------

    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Load and warm up the detector; make outputs, tf buffer and worker."""
        if not self._succeeds(self._configure, "configure"):
            return TransitionCallbackReturn.FAILURE
        self.get_logger().info(f"{self._detector.weights_name} on {self._detector.device} is ready")
        return TransitionCallbackReturn.SUCCESS

    def _succeeds(self, work: Callable[[], None], what: str) -> bool:
        """Whether part of a transition works; if not, `failure` and one line of the log say why, for nobody
        above would."""
        self.failure = None
        try:
            work()
        except UserError as error:
            self.failure = str(error)
        except Exception as error:
            self.get_logger().debug(traceback.format_exc())
            self.failure = f"the detector cannot {what}: {type(error).__name__}: {error}"
        if self.failure is not None:
            self.get_logger().error(self.failure)
        return self.failure is None

    def _configure(self) -> None:
        parameters = self.parameters
        self._detector = self._detector_factory(parameters)
        self._check_cameras(self._detector.channels)
        self._detector.warm_up()
        self._buffer = RewindingBuffer(cache_time=Duration(seconds=parameters.tf_cache_s), node=self)
        self._listener = TransformListener(self._buffer, self)
        self._rig = RigReader(
            parameters.cameras, self._buffer, base_frame=parameters.base_frame, map_frame=parameters.map_frame
        )
        self._builder = RoundBuilder(
            self._rig,
            topics=parameters.image_topics,
            num_views=len(self._detector.channels),
            reference_time=parameters.reference_time,
            anchor=parameters.anchor,
            tf_timeout_s=parameters.tf_timeout_s,
        )
        self._results = ResultPublishers(self, parameters, tuple(self._detector.channels))
        self._add_services()  # before the worker: what has one is whole, and can be released
        monitor = StreamMonitor(
            max_gap_s=parameters.memory_max_gap_s, max_speed_m_s=parameters.memory_max_speed
        )
        self._worker = DetectionWorker(
            self._detector, self._builder.build, self._publish, self._warn, monitor
        )
        self._worker.start()

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Publish from now on, and listen to the cameras."""
        result = super().on_activate(state)

        def listen() -> None:
            self._results.publish_labels(self.get_clock().now().nanoseconds)
            self._subscribe()

        if not self._succeeds(listen, "activate"):
            self._unsubscribe()
            super().on_deactivate(state)
            return TransitionCallbackReturn.FAILURE
        return result

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Stop listening; the detector stays loaded, its memory is for the stream that ends here."""
        self._unsubscribe()
        if self._worker is not None:
            self._worker.request_reset("deactivated")
        return super().on_deactivate(state)

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Give everything back that configure took."""
        self._release()
        return TransitionCallbackReturn.SUCCESS

    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        """End the work; the process may go on."""
        self.close()
        return TransitionCallbackReturn.SUCCESS

    def close(self) -> None:
        """Stop working and account for it: one log line, and the summary file. Twice does no harm."""
        if self._worker is None:
            return
        self._worker.stop()
        summary = self.summary()
        self._unsubscribe()
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
        """Counters, latency and stage times so far, and what ran where."""
        assert self._worker is not None, "only a configured node has something to sum up"
        counts = dict(self._synchronizer.matcher.counts) if self._is_surround else {}
        return {
            **self._worker.snapshot(),
            "sync": counts,
            "device": str(self._detector.device),
            "weights": self._detector.weights_name,
            "training": self._detector.training,
        }

    # -- inputs ----------------------------------------------------------------------------------------------

    def _subscribe(self) -> None:
        parameters = self.parameters
        image_type = CompressedImage if parameters.image_transport == "compressed" else Image
        images = []
        for camera, image_topic, info_topic in zip(
            parameters.cameras, parameters.image_topics, parameters.camera_info_topics, strict=True
        ):
            image = self._subscriber(image_type, image_topic)
            image.registerCallback(self._note_image, camera)
            images.append(image)
            self._subscriber(CameraInfo, info_topic).registerCallback(self._rig.add_camera_info, camera)
        self._synchronizer = self._make_synchronizer(images)
        self._synchronizer.registerCallback(self._on_round if self._is_surround else self._on_messages)
        if self._is_surround:
            self._poll_timer = self.create_timer(_POLL_S, self._synchronizer.poll, clock=self._steady)
        threshold = JumpThreshold(
            min_forward=None, min_backward=Duration(nanoseconds=-JUMP_NS), on_clock_change=False
        )
        self._jump_handle = self.get_clock().create_jump_callback(
            threshold, post_callback=self._on_clock_jump
        )

    def _subscriber(self, message_type: Any, topic: str) -> Any:
        reliable = self.parameters.qos_reliability == "reliable"
        qos = QoSProfile(
            history=HistoryPolicy.KEEP_LAST,
            depth=self.parameters.queue_depth,
            reliability=ReliabilityPolicy.RELIABLE if reliable else ReliabilityPolicy.BEST_EFFORT,
        )
        overriding = QoSOverridingOptions.with_default_policies()
        subscriber = message_filters.Subscriber(
            self, message_type, topic, qos_profile=qos, qos_overriding_options=overriding
        )
        self._inputs.append(subscriber)
        return subscriber

    def _make_synchronizer(self, images: Sequence[Any]) -> Any:
        parameters = self.parameters
        if parameters.sync_policy == "exact":
            return message_filters.TimeSynchronizer(images, parameters.queue_depth)
        if parameters.sync_policy == "approximate":
            return message_filters.ApproximateTimeSynchronizer(
                images, parameters.queue_depth, parameters.sync_slop_s
            )
        offsets = parameters.camera_time_offsets_s
        matcher: SurroundMatcher[Any] = SurroundMatcher(
            parameters.cameras,
            slop_ns=round(parameters.sync_slop_s * 1e9),
            deadline_ns=round(parameters.sync_deadline_s * 1e9),
            offsets_ns=[round(offset * 1e9) for offset in offsets] if offsets else None,
            min_cameras=parameters.least_cameras,
        )
        return SurroundSynchronizer(
            images,
            matcher,
            now_ns=lambda: int(self.get_clock().now().nanoseconds),
            on_error=lambda error: self._warn(f"round lost: {error}"),
        )

    @property
    def _is_surround(self) -> bool:
        return isinstance(self._synchronizer, SurroundSynchronizer)

    def _unsubscribe(self) -> None:
        if self._poll_timer is not None:
            self.destroy_timer(self._poll_timer)
            self._poll_timer = None
        if self._jump_handle is not None:
            self._jump_handle.unregister()
            self._jump_handle = None
        while self._inputs:
            self.destroy_subscription(self._inputs.pop().sub)

    def _release(self) -> None:
        if self._worker is None:
            return
        self._worker.stop()
        self._worker = None
        self._builder.close()
        self._listener.unregister()
        self._results.close()
        self.destroy_timer(self._diagnostics_timer)
        self.destroy_publisher(self._diagnostics)
        self.destroy_service(self._reset_service)

    # -- callbacks: they note and hand over, nothing else ----------------------------------------------------

    def _note_image(self, message: Any, camera: str) -> None:
        self._watch.seen(camera, time.monotonic())

    def _on_round(self, matched: MatchedRound[Any]) -> None:
        if self._worker is not None:
            self._worker.submit(matched)

    def _on_messages(self, *messages: Any) -> None:
        stamps = tuple(stamp_to_ns(message.header.stamp) for message in messages)
        self._on_round(MatchedRound(messages=messages, stamps_ns=stamps))

    def _on_clock_jump(self, jump: Any) -> None:
        if self._is_surround:
            self._synchronizer.clear()
        if self._worker is not None:
            self._worker.request_reset("clock_jump")

    def _on_reset(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        if self._worker is not None:
            self._worker.request_reset("service")
        response.success, response.message = True, "the memory will be reset before the next round"
        return response

    # -- outputs ---------------------------------------------------------------------------------------------

    def _add_services(self) -> None:
        self._reset_service = self.create_service(Trigger, "~/reset", self._on_reset)
        self._diagnostics = self.create_publisher(DiagnosticArray, "/diagnostics", 10)
        self._diagnostics_timer = self.create_timer(
            _DIAGNOSTICS_S, self._publish_diagnostics, clock=self._steady
        )

    def _publish(self, outcome: Outcome) -> None:
        self._results.publish(outcome.objects, outcome.camera_round)

    def _publish_diagnostics(self) -> None:
        if self._worker is None:
            return
        matcher = self._synchronizer.matcher if self._is_surround else None
        warnings = matcher.warnings() if matcher is not None else []
        for warning in warnings:
            self._warn(warning)
        self._diagnostics.publish(
            build_diagnostics(
                self.get_clock().now().to_msg(),
                self.get_name(),
                self._watch.report(time.monotonic()),
                self._worker.snapshot(),
                dict(matcher.counts) if matcher is not None else {},
                warnings,
                self._worker.recent_faults(_REPEAT_S),
            )
        )

    def _warn(self, sentence: str) -> None:
        """Log a sentence, but the same kind (its first words) only every few seconds: cameras repeat
        themselves.
        """
        now, kind = time.monotonic(), sentence[:48]
        if now - self._said.get(kind, -_REPEAT_S) >= _REPEAT_S:
            self._said[kind] = now
            self.get_logger().warning(sentence)

    def _check_cameras(self, channels: Sequence[str]) -> None:
        if len(self.parameters.cameras) > len(channels):
            raise UserError(
                f"parameter cameras: {len(self.parameters.cameras)} cameras; "
                f"the weights are for {len(channels)}"
            )


def run_node(node: DetectorNode, stop: threading.Event) -> int:
    """Work until `stop` is set (exit code 0); 2 where an autostarting node cannot be configured or
    activated."""
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
    """`ros2 run ftkd_ros detector`: exit code 0 after SIGINT or SIGTERM, 2 and a sentence for bad parameters.

    The signals are ours: rclpy's handlers would shut the context down under a round that is being published.
    """
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    rclpy.init(args=arguments, signal_handler_options=SignalHandlerOptions.NO)
    try:
        return run_node(DetectorNode(), stop)
    except (UserError, ParameterException) as error:
        print(f"detector: {error}", file=sys.stderr)
        return 2
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(
                number, signal.SIG_IGN
            )  # the work is done: an impatient second signal changes nothing
        rclpy.try_shutdown()


if __name__ == "__main__":
    sys.exit(main())
