# SPDX-License-Identifier: Apache-2.0
"""The detector node on rigs that are not nuScenes, over DDS: rates, faults, diagnostics, parameters."""

import gc
import os
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import rclpy
from diagnostic_msgs.msg import DiagnosticStatus
from rcl_interfaces.msg import ParameterType
from rclpy.context import Context
from rclpy.parameter import Parameter
from sensor_msgs.msg import CompressedImage, Image
from std_msgs.msg import Float64

from ftkd_core.errors import UserError
from ftkd_ros.convert.from_ros import detections_to_objects
from ftkd_ros.convert.images import image_to_rgb
from ftkd_ros.convert.message_factory import RCLPY
from ftkd_ros.convert.to_ros import rgb_to_image
from ftkd_ros.node import detector_node
from ftkd_ros.node.detector_node import DetectorNode
from ftkd_ros.node.parameters import DetectorParameters
from tests.ros.fakes import CAMERAS, FakeDetector, FakeRig, RunningNode

pytestmark = pytest.mark.ros

EQUAL = (0.0,) * 6


@pytest.fixture
def rig() -> Iterator[FakeRig]:
    rig = FakeRig()
    yield rig
    rig.close()


def run(
    rig: FakeRig, rounds: int, *, period_s: float = 0.1, every: Sequence[int] = (1,) * 6, **options: Any
) -> None:
    """Publish rounds at a rate with stamps of now; camera i sends in each `every[i]`-th round only."""
    for number in range(rounds):
        started = time.monotonic()
        silent = tuple(c for c, step in zip(CAMERAS, every, strict=True) if step == 0 or number % step)
        rig.send_round(time.time_ns(), without=silent, offsets_s=EQUAL, **options)
        while time.monotonic() < started + period_s:
            rig.executor.spin_once(timeout_sec=0.005)


def statuses(rig: FakeRig) -> dict[str, Any]:
    """Return the newest status by name, after a new message has arrived."""
    rig.received["/diagnostics"].clear()
    rig.wait_until(lambda: bool(rig.received["/diagnostics"]))
    return {status.name: status for status in rig.received["/diagnostics"][-1].status}


def test_equal_stamps_are_complete_with_the_default_parameters(rig: FakeRig) -> None:
    # A window of one second, because of the burst of rounds when the offsets are known.
    running = RunningNode(qos_reliability="reliable", health_window_s=1.0)
    try:
        rig.wait_until(rig.is_connected)
        run(rig, 25)
        summary = running.node.summary()
        assert summary["sync"]["complete"] >= 24 and summary["partial_rounds"] == 0
        found = statuses(rig)
        assert found["detector: rounds"].level == DiagnosticStatus.OK, found["detector: rounds"].message
        camera = {value.key: value.value for value in found["detector: camera cam_front"].values}
        assert float(camera["rate_hz"]) == pytest.approx(10, abs=2)
        assert 0 <= float(camera["stamp_age_s"]) < 2 and float(camera["share_of_rounds"]) == 1
        latency = {value.key: float(value.value) for value in found["detector: latency"].values}
        assert latency["stamp_ms.p50"] >= latency["latency_ms.p50"] > 0
        assert {"decode_ms.p95", "detect_ms.p95", "publish_ms.p99"} <= set(latency)
    finally:
        running.close()


def test_cameras_of_other_rates_are_matched_at_the_anchor(
    rig: FakeRig, capfd: pytest.CaptureFixture[str]
) -> None:
    running = RunningNode(qos_reliability="reliable")
    try:
        rig.wait_until(rig.is_connected)
        run(rig, 90, period_s=1 / 30, every=(3, 1, 2, 3, 1, 2))
        counts = running.node.summary()["sync"]
        assert counts["complete"] >= 20, counts  # of 30; a busy machine delays some images
        views = running.detector.rounds[-1].views
        assert len({view.stamp_ns for view in views if view is not None}) >= 1
    finally:
        running.close()
    assert "sync_policy auto: anchor at the images of cam_front, because" in capfd.readouterr().err


def test_lost_camera_is_logged_reported_and_welcomed_back(
    rig: FakeRig, capfd: pytest.CaptureFixture[str]
) -> None:
    running = RunningNode(qos_reliability="reliable")
    try:
        rig.wait_until(rig.is_connected)
        run(rig, 15)
        run(rig, 22, every=(1, 1, 1, 0, 1, 1))
        found = statuses(rig)
        assert found["detector: camera cam_back"].level == DiagnosticStatus.ERROR
        assert "no image for" in found["detector: camera cam_back"].message
        assert found["detector: rounds"].level == DiagnosticStatus.WARN
        assert "partial; the last one without cam_back" in found["detector: rounds"].message
        run(rig, 10)
    finally:
        running.close()
    log = capfd.readouterr().err
    assert "camera cam_back is lost: no image for" in log
    assert "camera cam_back is back" in log


def test_camera_that_the_detector_masks_is_reported(rig: FakeRig) -> None:
    """Faults of virtual cameras, such as a camera that sees too little of its virtual image."""
    running = RunningNode(qos_reliability="reliable")
    reason = "cam_back: sees 2% of the image that the weights expect at its yaw"
    running.detector.faults["cam_back"] = reason
    try:
        rig.wait_until(rig.is_connected)
        run(rig, 15)
        found = statuses(rig)
        camera = found["detector: camera cam_back"]
        assert camera.level == DiagnosticStatus.WARN and camera.message == reason
        assert "without cam_back" in found["detector: rounds"].message
        assert found["detector: camera cam_front"].level == DiagnosticStatus.OK
    finally:
        running.close()


def test_silence_is_an_error_with_the_reason(rig: FakeRig) -> None:
    running = RunningNode(qos_reliability="reliable", max_silence_s=1.0, tf_timeout_s=0.05, map_frame="odom")
    try:
        rig.wait_until(rig.is_connected)
        run(rig, 25)
        rounds = statuses(rig)["detector: rounds"]
        assert rounds.level == DiagnosticStatus.ERROR
        assert (
            "nothing published for" in rounds.message and "no transform odom <- base_link" in rounds.message
        )
    finally:
        running.close()


def test_transforms_that_are_late_delay_rounds_but_drop_none(rig: FakeRig) -> None:
    """tf 200 ms late at 10 Hz: two rounds wait at a time; waiting for each alone would drop half of them."""
    running = RunningNode(qos_reliability="reliable", health_window_s=1.0)
    pending: list[tuple[float, Any]] = []
    send = rig._tf.sendTransform
    rig._tf.sendTransform = lambda poses: pending.append((time.monotonic() + 0.2, poses))  # type: ignore[method-assign]

    def send_due(final: bool = False) -> None:
        while pending and (final or pending[0][0] <= time.monotonic()):
            send(pending.pop(0)[1])

    rig.node.create_timer(0.01, send_due)
    try:
        rig.wait_until(rig.is_connected)
        run(rig, 40)
        rig.wait_until(lambda: not pending)
        rig.wait_until(lambda: running.node.summary()["rounds_in"] == sum(_finished(running)))
        summary = running.node.summary()
        held_at_start = 12  # released together when the offsets are known
        assert summary["rounds_detected"] >= 40 - held_at_start, summary
        assert summary["dropped"].get("unusable", 0) == 0
        assert summary["stage_ms"]["wait"]["p50"] > 100
        assert statuses(rig)["detector: rounds"].level == DiagnosticStatus.OK
    finally:
        running.close()


def _finished(running: RunningNode) -> tuple[int, int]:
    summary = running.node.summary()
    return summary["rounds_detected"], summary["rounds_dropped"]


def test_times_of_each_stage_are_published(rig: FakeRig) -> None:
    names = ("wait", "decode", "geometry", "detect", "publish", "latency", "stamp_latency")
    for name in names:
        rig._subscribe(Float64, f"/detector/statistics/{name}_ms")
    running = RunningNode(qos_reliability="reliable")
    try:
        rig.wait_until(rig.is_connected)
        run(rig, 15)
        for name in names:
            values = rig.received[f"/detector/statistics/{name}_ms"]
            assert len(values) >= 2 and all(value.data >= 0 for value in values), name
    finally:
        running.close()


def test_memory_reset_is_logged_with_its_cause(rig: FakeRig, capfd: pytest.CaptureFixture[str]) -> None:
    running = RunningNode(qos_reliability="reliable", memory_max_gap_s=0.5)
    try:
        rig.wait_until(rig.is_connected)
        run(rig, 15)
        time.sleep(0.8)
        run(rig, 8)
        assert running.detector.resets == 1
    finally:
        running.close()
    log = capfd.readouterr().err
    assert log.count("memory reset: gap,") == 1 and "memory_max_gap_s 0.5" in log


def test_raw_and_compressed_cameras_can_be_mixed(rig: FakeRig) -> None:
    transports = ["raw", *["compressed"] * 5]
    running = RunningNode(qos_reliability="reliable", image_transport=transports)
    raw = rig.node.create_publisher(Image, "/cam_front/image", 10)
    picture = np.full((48, 64, 3), 77, dtype=np.uint8)
    try:
        rig.wait_until(lambda: raw.get_subscription_count() > 0)
        rig.wait_until(lambda: rig.node.count_subscribers("/cam_back/image/compressed") > 0)
        for _ in range(15):
            stamp = time.time_ns()
            rig.send_round(stamp, without=("cam_front",), with_info=("cam_front",), offsets_s=EQUAL)
            raw.publish(rgb_to_image(RCLPY, picture, stamp, "cam_front"))
            rig.executor.spin_once(timeout_sec=0.08)
            time.sleep(0.08)
        rig.wait_until(lambda: bool(rig.received["/detections"]))
        boxes = detections_to_objects(rig.received["/detections"][-1]).boxes
        assert boxes[0, 0] == 6 and boxes[0, 1] == 77
    finally:
        running.close()


def test_thresholds_and_ranges_change_at_run_time(rig: FakeRig) -> None:
    running = RunningNode(qos_reliability="reliable")
    node = running.node
    try:
        rig.wait_until(rig.is_connected)
        run(rig, 15)
        assert len(rig.received["/detections"][-1].detections) == 1
        for name, value, other in (
            ("score_threshold", 0.95, 0.05),
            ("class_score_thresholds", ["car=0.95"], ["car=0.1"]),
            ("max_range_m", 3.0, 0.0),
        ):
            assert node.set_parameters([Parameter(name, value=value)])[0].successful
            run(rig, 3)
            assert rig.received["/detections"][-1].detections == [], name
            assert node.set_parameters([Parameter(name, value=other)])[0].successful
            run(rig, 3)
            assert len(rig.received["/detections"][-1].detections) == 1, name
        refused = node.set_parameters([Parameter("class_score_thresholds", value=["cow=0.5"])])[0]
        assert not refused.successful and "'cow=0.5'; expected CLASS=SCORE" in refused.reason
        assert not node.set_parameters([Parameter("score_threshold", value=1.5)])[0].successful
        assert not node.set_parameters([Parameter("sync_policy", value="anchor")])[0].successful
    finally:
        running.close()


def test_recommended_thresholds_of_the_weights_are_the_default(rig: FakeRig) -> None:
    running = RunningNode(qos_reliability="reliable")
    running.node._results._recommended["car"] = 0.95  # the fake detector returns a car of 0.9
    try:
        rig.wait_until(rig.is_connected)
        run(rig, 15)
        assert rig.received["/detections"][-1].detections == []
        assert running.node.set_parameters([Parameter("score_threshold", value=0.05)])[0].successful
        run(rig, 3)
        assert len(rig.received["/detections"][-1].detections) == 1
    finally:
        running.close()


def test_a_warning_of_the_detector_is_no_green_diagnostic(rig: FakeRig) -> None:
    detector = FakeDetector()
    detector.warnings = ["cameras are at another height"]
    running = RunningNode(detector, qos_reliability="reliable")
    try:
        rig.wait_until(rig.is_connected)
        run(rig, 15)
        status = statuses(rig)["detector: rounds"]
        assert status.level == DiagnosticStatus.WARN and "cameras are at another height" in status.message
        assert running.node.summary()["warnings"] == detector.warnings
    finally:
        running.close()


def test_surround_picture_is_published_as_jpeg(rig: FakeRig) -> None:
    rig._subscribe(CompressedImage, "/detections/surround/compressed")
    running = RunningNode(qos_reliability="reliable")
    try:
        rig.wait_until(rig.is_connected)
        run(rig, 15)
        raw, jpeg = (rig.received[f"/detections/surround{end}"][-1] for end in ("", "/compressed"))
        assert jpeg.format == "jpeg" and jpeg.header == raw.header
        assert image_to_rgb(jpeg, "x").shape == (raw.height, raw.width, 3)
    finally:
        running.close()


def test_descriptors_have_ranges_and_allowed_values() -> None:
    context = Context()
    rclpy.init(context=context)
    node = DetectorNode(lambda _: FakeDetector(), context=context)
    score, policy = node.describe_parameters(["score_threshold", "sync_policy"])
    assert score.floating_point_range[0].to_value == 1.0 and not score.read_only
    assert "anchor" in policy.additional_constraints and policy.read_only
    assert node.get_parameter("score_threshold").get_parameter_value().type == ParameterType.PARAMETER_DOUBLE
    node.destroy_node()
    rclpy.shutdown(context=context)


def test_cleanup_gives_everything_back(rig: FakeRig) -> None:
    running = RunningNode(qos_reliability="reliable")
    node = running.node
    try:
        rig.wait_until(rig.is_connected)
        node.trigger_deactivate()
        before = {name for name, _ in rig.node.get_service_names_and_types()}
        assert {"/detector/reset", "/tf2_frames"} <= before
        node.trigger_cleanup()
        assert node._detector is None
        rig.wait_until(lambda: rig.node.count_subscribers("/tf") == 0)
        names = [name for name, _ in node.get_service_names_and_types_by_node("detector", "/")]
        assert "/detector/reset" not in names and "/tf2_frames" not in names
        node.trigger_configure()
        node.trigger_activate()
        rig.wait_until(rig.is_connected)
        run(rig, 15)
        assert rig.received["/detections"]
    finally:
        running.close()


def test_cleanup_frees_detector_and_buffer_over_many_cycles() -> None:
    """The jump callback of each tf buffer stayed registered, until rcl refused to add another one."""
    context = Context()
    rclpy.init(context=context)
    node = DetectorNode(lambda _: FakeDetector(), context=context)
    references: list[Any] = []
    for _ in range(4):
        node.trigger_configure()
        assert node.failure is None
        references += [weakref.ref(node._buffer), weakref.ref(node._detector), weakref.ref(node._worker)]
        node.trigger_activate()
        node.trigger_deactivate()
        node.trigger_cleanup()
    gc.collect()
    assert [reference() for reference in references] == [None] * 12
    node.destroy_node()
    rclpy.shutdown(context=context)


def test_failed_configure_leaves_no_subscription(monkeypatch: pytest.MonkeyPatch) -> None:
    context = Context()
    rclpy.init(context=context)
    node = DetectorNode(lambda _: FakeDetector(), context=context)
    before = list(node.subscriptions)

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no publishers")

    monkeypatch.setattr(detector_node, "ResultPublishers", fail)
    node.trigger_configure()
    assert node.failure is not None and "no publishers" in node.failure
    assert list(node.subscriptions) == before
    node.destroy_node()
    rclpy.shutdown(context=context)


def test_more_cameras_than_the_weights_carry_are_named() -> None:
    context = Context()
    rclpy.init(context=context)
    cameras = [*CAMERAS, "roof", "trunk"]
    detector = FakeDetector()
    detector.assigns_by_yaw = False  # else the detector leaves cameras out itself
    node = DetectorNode(
        lambda _: detector, context=context, parameter_overrides=[Parameter("cameras", value=cameras)]
    )
    node.trigger_configure()
    assert node.failure is not None and "8 cameras; expected at most 6" in node.failure
    assert "remove roof, trunk" in node.failure
    node.destroy_node()
    rclpy.shutdown(context=context)


def test_lists_need_one_entry_per_camera() -> None:
    with pytest.raises(UserError, match="parameter image_transport: 2 values for 6 cameras"):
        DetectorParameters(image_transport=("raw", "compressed"))
    parameters = DetectorParameters(
        cameras=("a", "b"), image_transport=("raw", "compressed"), image_topic=("/{camera}/raw", "/x/jpeg")
    )
    assert parameters.image_topics == ("/a/raw", "/x/jpeg")


@pytest.mark.parametrize("encoding", ["nv12", "nv21", "yuv420"])
def test_planar_video_encodings_are_refused_with_the_fix(encoding: str) -> None:
    message = rgb_to_image(RCLPY, np.zeros((4, 4, 3), dtype=np.uint8), 1, "cam")
    message.encoding = encoding
    with pytest.raises(
        UserError, match=f"/cam: encoding '{encoding}' .*; expected rgb8, .* set it in the driver"
    ):
        image_to_rgb(message, "/cam")


def test_video_streams_are_refused_with_the_fix() -> None:
    from sensor_msgs.msg import CompressedImage

    message = CompressedImage(format="h264", data=b"\x00\x00\x00\x01\x67" * 10)
    with pytest.raises(UserError, match="'h264' is a video stream.*republish"):
        image_to_rgb(message, "/cam")


@pytest.mark.parametrize(
    "module", ["ftkd_ros.node.detector_node", "ftkd_ros.bag.player", "ftkd_ros.bag.recorder"]
)
def test_interrupt_during_imports_leaves_no_traceback(module: str) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONVERBOSE": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", module],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env=environment,
    )
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if "import 'rclpy" in line:
            process.send_signal(signal.SIGINT)
            break
    time.sleep(0.05)
    _, rest = process.communicate(timeout=30)
    assert "Traceback" not in "".join(lines) + rest
    assert process.returncode == 130
