# SPDX-License-Identifier: Apache-2.0
"""Start and end of the detector node: lifecycle, bad parameters, signals; filters of message_filters."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import rclpy
import torch
from diagnostic_msgs.msg import DiagnosticStatus
from rclpy.context import Context

from ftkd_core.errors import UserError
from ftkd_core.runtime.detector import Detector
from ftkd_core.types import CameraRound, ObjectList
from ftkd_ros.convert.from_ros import detections_to_objects
from ftkd_ros.node import inputs
from ftkd_ros.node.detector_node import DetectorNode, load_detector, main, run_node
from ftkd_ros.node.parameters import DetectorParameters
from tests.ros.fakes import OFFSETS_S, START, FakeDetector, FakeRig, RunningNode, send_and_receive

pytestmark = pytest.mark.ros


@pytest.fixture(scope="module")
def rig() -> Iterator[FakeRig]:
    rig = FakeRig()
    yield rig
    rig.close()


@pytest.mark.parametrize("policy", ["approximate", "exact"])
def test_filters_of_message_filters_can_be_selected(rig: FakeRig, policy: str) -> None:
    offsets_s = (0.0,) * 6 if policy == "exact" else OFFSETS_S
    running = RunningNode(sync_policy=policy, sync_slop_s=0.1, qos_reliability="reliable")
    try:
        rig.wait_until(rig.is_connected)
        send_and_receive(rig, offsets_s=offsets_s)
        assert detections_to_objects(rig.received["/detections"][-1]).boxes[0, 0] == 6
    finally:
        running.close()


def test_deactivate_unsubscribes_and_activate_subscribes(rig: FakeRig) -> None:
    running = RunningNode(qos_reliability="reliable")
    try:
        rig.wait_until(rig.is_connected)
        running.node.trigger_deactivate()
        rig.wait_until(lambda: rig.node.count_subscribers("/cam_front/image/compressed") == 0)
        running.node.trigger_activate()
        rig.wait_until(rig.is_connected)
        running.node.trigger_deactivate()
        running.node.trigger_cleanup()
        rig.wait_until(lambda: rig.node.count_publishers("/detections") == 0)
        assert not rig.is_connected()
    finally:
        running.close()


def test_configure_fails_with_the_error_of_the_detector() -> None:
    def refuse(_: object) -> FakeDetector:
        raise UserError("weights 'x' are of preset tiny; expected 'r50'")

    context = Context()
    rclpy.init(context=context)
    node = DetectorNode(refuse, context=context)
    node.trigger_configure()
    assert node.failure == "weights 'x' are of preset tiny; expected 'r50'"
    node.close()
    node.destroy_node()
    rclpy.shutdown(context=context)


@pytest.mark.parametrize("step", ["configure", "activate"])
def test_error_in_a_transition_is_logged_and_ends_the_node(
    step: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """rclpy swallows exceptions of transitions, so the node must store and log them itself."""

    def fail(*_: object, **__: object) -> FakeDetector:
        raise RuntimeError("CUDA out of memory")

    context = Context()
    rclpy.init(context=context)
    node = DetectorNode(fail if step == "configure" else lambda _: FakeDetector(), context=context)
    if step == "activate":
        monkeypatch.setattr(inputs, "make_synchronizer", fail)
    assert run_node(node, threading.Event()) == 2
    message = f"the detector cannot {step}: RuntimeError: CUDA out of memory"
    assert node.failure == message
    assert message in capfd.readouterr().err
    rclpy.shutdown(context=context)


def test_activate_can_be_repeated_after_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    context = Context()
    rclpy.init(context=context)
    node = DetectorNode(lambda _: FakeDetector(), context=context)
    make_synchronizer, errors = inputs.make_synchronizer, [OSError("busy")]

    def fail_once(*arguments: Any, **keywords: Any) -> Any:
        if errors:
            raise errors.pop()
        return make_synchronizer(*arguments, **keywords)

    monkeypatch.setattr(inputs, "make_synchronizer", fail_once)
    node.trigger_configure()
    node.trigger_activate()
    assert node.failure == "the detector cannot activate: OSError: busy"
    assert node.count_subscribers("/cam_front/image/compressed") == 0
    node.trigger_activate()
    assert node.failure is None
    assert node.count_subscribers("/cam_front/image/compressed") == 1
    node.close()
    node.destroy_node()
    rclpy.shutdown(context=context)


def test_parameters_are_passed_to_the_detector(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[object, dict[str, object]]] = []

    def record(weights: object, **options: object) -> SimpleNamespace:
        calls.append((weights, options))
        return SimpleNamespace(runtime="plain", runtime_reason="requested")

    monkeypatch.setattr(Detector, "from_weights", record)
    load_detector(DetectorParameters(runtime="plain", device="cpu", max_detections=7))
    load_detector(DetectorParameters())
    options = {
        "preset": None,
        "device": "cpu",
        "runtime": "plain",
        "score_threshold": 0.0,
        "camera_model": "auto",
    }
    assert calls[0] == (None, {**options, "max_detections": 7})
    assert calls[1][1]["runtime"] == "auto"


BAD_PARAMETERS = [
    ("sync_policy:=nearest", "parameter sync_policy: 'nearest'; expected auto or surround or anchor or "),
    ("runtime:=fastest", "parameter runtime: 'fastest'; expected auto or fast or plain"),
    ("score_threshold:=1.5", "parameter score_threshold: 1.5; expected -1 to 1"),
    ("score_threshold:=high", "parameter score_threshold: 'high' is a str; expected a float"),
    ("cameras:=[a, a]", "parameter cameras: ['a', 'a']; expected at least one name, all different"),
    ("image_topic:=/camera/image", "parameter image_topic: 6 cameras would share '/camera/image'"),
    ("image_topic:=/{camera}/bad topic", "parameter image_topic: '/cam_front/bad topic' is not a topic name"),
    (
        "cameras:=[cam-1, b]",
        "parameter image_topic: '/cam-1/image/compressed' is not a topic name; expected parts",
    ),
    ("camera_time_offsets_s:=[0.0, 0.1]", "parameter camera_time_offsets_s: 2 values for 6 cameras"),
    ("min_cameras:=7", "parameter min_cameras: 7; expected 0 to 6"),
    ("anchor_camera:=roof", "parameter anchor_camera: 'roof'; expected one of cam_front"),
    ("weights:=/nowhere/weights.safetensors", "parameter weights: no file '/nowhere/weights.safetensors'"),
    ("summary_file:=/nowhere/summary.json", "parameter summary_file: the folder of '/nowhere/summary.json'"),
]


@pytest.mark.parametrize(("assignment", "message"), BAD_PARAMETERS)
def test_bad_parameter_is_refused_with_one_sentence(assignment: str, message: str) -> None:
    context = Context()
    rclpy.init(args=["--ros-args", "-p", assignment], context=context)
    with pytest.raises(UserError) as caught:
        DetectorNode(context=context)
    assert str(caught.value).startswith(message)
    rclpy.shutdown(context=context)


def run_script(script: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", script, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )


def test_process_returns_2_for_a_bad_parameter() -> None:
    script = "import sys; from ftkd_ros.node.detector_node import main; sys.exit(main())"
    process = run_script(script, "--ros-args", "-p", "reference_time:=soon")
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 2
    assert "detector: parameter reference_time: 'soon'; expected latest or anchor or mean" in errors
    assert "Traceback" not in errors


def test_value_that_begins_with_a_brace_is_named_with_the_quotes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--ros-args", "-p", "image_topic:={camera}/image"]) == 2
    errors = capsys.readouterr().err
    assert "quote a value that begins with a brace: -p 'image_topic:=\"{camera}/image\"'" in errors


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_ends_the_process_with_a_summary(number: signal.Signals, rig: FakeRig, tmp_path: Path) -> None:
    script = (
        "import sys, ftkd_ros.node.detector_node as module; from tests.ros.fakes import FakeDetector\n"
        "node = module.DetectorNode\n"
        "module.DetectorNode = lambda: node(lambda _: FakeDetector())\n"
        "sys.exit(module.main())"
    )
    summary = tmp_path / "summary.json"
    arguments = ["-p", f"summary_file:={summary}", "-p", "qos_reliability:=reliable"]
    process = run_script(script, "--ros-args", *arguments, "-p", f"camera_time_offsets_s:={list(OFFSETS_S)}")
    rig.wait_until(rig.is_connected, timeout_s=30)
    send_and_receive(rig)
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 0, errors
    assert "Traceback" not in errors
    assert "rounds in 1, detected 1, dropped 0" in errors, errors
    assert json.loads(summary.read_text())["rounds_detected"] == 1


class FullDetector(FakeDetector):
    """Runs out of GPU memory in each step while `is_full`."""

    is_full = True

    def step(self, camera_round: CameraRound) -> ObjectList:
        if self.is_full:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return super().step(camera_round)


def rounds_status(rig: FakeRig) -> DiagnosticStatus:
    """Return the status of rounds in the next message on /diagnostics."""
    rig.received["/diagnostics"].clear()
    rig.wait_until(lambda: bool(rig.received["/diagnostics"]))
    return next(s for s in rig.received["/diagnostics"][-1].status if s.name == "detector: rounds")


def test_a_full_gpu_is_an_error_and_the_lifecycle_recovers(rig: FakeRig) -> None:
    detector = FullDetector()
    running = RunningNode(detector, qos_reliability="reliable")
    node = running.node
    try:
        rig.wait_until(rig.is_connected)
        triggers = iter(range(START + 900 * 10**9, START + 1000 * 10**9, 10**9))

        def failed(count: int) -> bool:
            rig.send_round(next(triggers))
            rig.executor.spin_once(timeout_sec=0.3)
            return bool(node.summary()["dropped"].get("failed", 0) >= count)

        rig.wait_until(lambda: failed(1), timeout_s=30)
        text = "out of memory: CUDA out of memory. Tried to allocate 2.00 GiB."
        rig.wait_until(lambda: text in rounds_status(rig).message, timeout_s=30)  # older messages may wait
        assert rounds_status(rig).level == DiagnosticStatus.ERROR
        detector.is_full = False  # the detector was stopped, so this alone does not help
        count = node.summary()["dropped"]["failed"] + 1
        rig.wait_until(lambda: failed(count), timeout_s=30)
        assert node.summary()["rounds_detected"] == 0
        assert rounds_status(rig).level == DiagnosticStatus.ERROR
        node.trigger_deactivate()
        rig.wait_until(lambda: rig.node.count_subscribers("/cam_front/image/compressed") == 0, timeout_s=30)
        for transition in (node.trigger_cleanup, node.trigger_configure, node.trigger_activate):
            transition()
        rig.wait_until(rig.is_connected, timeout_s=30)

        def detected() -> bool:
            rig.send_round(next(triggers))
            rig.executor.spin_once(timeout_sec=0.3)
            return bool(node.summary()["rounds_detected"])

        rig.wait_until(detected, timeout_s=30)
        rig.wait_until(lambda: rounds_status(rig).level != DiagnosticStatus.ERROR, timeout_s=30)
    finally:
        running.close()
