# SPDX-License-Identifier: Apache-2.0
"""How the detector node starts and ends: lifecycle, bad parameters, signals; and the stock synchronizers."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import rclpy
from fakes import OFFSETS_S, Bench, FakeDetector, Running, send_and_receive
from rclpy.context import Context

from ftkd_core.errors import UserError
from ftkd_core.runtime.detector import Detector
from ftkd_ros.convert.to_ros import detections_to_objects
from ftkd_ros.node.detector_node import DetectorNode, load_detector, run_node
from ftkd_ros.node.parameters import DetectorParameters

pytestmark = pytest.mark.ros


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.close()


@pytest.mark.parametrize("policy", ["approximate", "exact"])
def test_stock_filters_can_be_chosen(bench: Bench, policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if policy == "exact":
        monkeypatch.setattr("fakes.OFFSETS_S", (0.0,) * 6)
    running = Running(sync_policy=policy, sync_slop_s=0.1, qos_reliability="reliable")
    try:
        bench.wait_until(bench.is_connected)
        send_and_receive(bench)
        assert detections_to_objects(bench.received["/detections"][-1]).boxes[0, 0] == 6
    finally:
        running.close()


def test_lifecycle_stops_and_starts_listening(bench: Bench) -> None:
    running = Running(qos_reliability="reliable")
    try:
        bench.wait_until(bench.is_connected)
        running.node.trigger_deactivate()
        bench.wait_until(lambda: bench.node.count_subscribers("/cam_front/image/compressed") == 0)
        running.node.trigger_activate()
        bench.wait_until(bench.is_connected)
        running.node.trigger_deactivate()
        running.node.trigger_cleanup()
        bench.wait_until(lambda: bench.node.count_publishers("/detections") == 0)
        assert not bench.is_connected()
    finally:
        running.close()


def test_detector_that_cannot_be_loaded_fails_configure_with_its_sentence() -> None:
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
def test_what_goes_wrong_in_a_transition_is_said_and_ends_the_node(
    step: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """rclpy swallows it: the node would stay up, saying that it is ready, and never listen."""

    def fail(*_: object) -> FakeDetector:
        raise RuntimeError("CUDA out of memory")

    context = Context()
    rclpy.init(context=context)
    node = DetectorNode(fail if step == "configure" else lambda _: FakeDetector(), context=context)
    if step == "activate":
        monkeypatch.setattr(node, "_make_synchronizer", fail)
    assert run_node(node, threading.Event()) == 2
    sentence = f"the detector cannot {step}: RuntimeError: CUDA out of memory"
    assert node.failure == sentence
    assert sentence in capfd.readouterr().err
    rclpy.shutdown(context=context)


def test_a_node_that_could_not_listen_can_be_activated_later(monkeypatch: pytest.MonkeyPatch) -> None:
    context = Context()
    rclpy.init(context=context)
    node = DetectorNode(lambda _: FakeDetector(), context=context)
    real, problems = node._make_synchronizer, [OSError("busy")]

    def sometimes(images: object) -> object:
        if problems:
            raise problems.pop()
        return real(images)  # type: ignore[arg-type]

    monkeypatch.setattr(node, "_make_synchronizer", sometimes)
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


def test_the_detector_is_loaded_as_the_parameters_say(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[object, dict[str, object]]] = []
    monkeypatch.setattr(Detector, "from_weights", lambda weights, **others: asked.append((weights, others)))
    load_detector(DetectorParameters(runtime="plain", device="cpu", max_detections=7))
    load_detector(DetectorParameters())
    others = {"preset": None, "device": "cpu", "runtime": "plain", "score_threshold": 0.05}
    assert asked[0] == (None, {**others, "max_detections": 7})
    assert asked[1][1]["runtime"] == "auto"


BAD_PARAMETERS = [
    ("sync_policy:=nearest", "parameter sync_policy: 'nearest'; expected surround or approximate or exact"),
    ("runtime:=fastest", "parameter runtime: 'fastest'; expected auto or fast or plain"),
    ("score_threshold:=1.5", "parameter score_threshold: 1.5; expected 0 to 1"),
    ("score_threshold:=high", "parameter score_threshold: 'high' is a str; expected a float"),
    ("cameras:=[a, a]", "parameter cameras: ['a', 'a']; expected different names"),
    ("image_topic:=/camera/image", "parameter image_topic: 6 cameras would share '/camera/image'"),
    ("image_topic:=/{camera}/bad topic", "parameter image_topic: '/cam_front/bad topic' is no topic name: "),
    (
        "cameras:=[cam-1, b]",
        "parameter image_topic: '/cam-1/image/compressed' is no topic name: topic name must",
    ),
    ("camera_time_offsets_s:=[0.0, 0.1]", "parameter camera_time_offsets_s: 2 values for 6 cameras"),
    ("min_cameras:=7", "parameter min_cameras: 7; expected 0 to 6"),
    ("anchor_camera:=roof", "parameter anchor_camera: 'roof'; expected one of cam_front"),
    ("weights:=/nowhere/weights.safetensors", "parameter weights: no file '/nowhere/weights.safetensors'"),
    ("summary_file:=/nowhere/summary.json", "parameter summary_file: the folder of '/nowhere/summary.json'"),
]


@pytest.mark.parametrize(("assignment", "sentence"), BAD_PARAMETERS)
def test_a_bad_parameter_is_told_in_one_sentence(assignment: str, sentence: str) -> None:
    context = Context()
    rclpy.init(args=["--ros-args", "-p", assignment], context=context)
    with pytest.raises(UserError) as caught:
        DetectorNode(context=context)
    assert str(caught.value).startswith(sentence)
    rclpy.shutdown(context=context)


def run_script(script: str, *arguments: str) -> subprocess.Popen[str]:
    tests = str(Path(__file__).parent)
    return subprocess.Popen(
        [sys.executable, "-c", script, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([tests, *sys.path])},
    )


def test_process_ends_with_code_two_for_a_bad_parameter() -> None:
    script = "import sys; from ftkd_ros.node.detector_node import main; sys.exit(main())"
    process = run_script(script, "--ros-args", "-p", "reference_time:=soon")
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 2
    assert "detector: parameter reference_time: 'soon'; expected latest or anchor or mean" in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_process_with_its_summary(
    number: signal.Signals, bench: Bench, tmp_path: Path
) -> None:
    script = (
        "import sys, ftkd_ros.node.detector_node as module; from fakes import FakeDetector\n"
        "node = module.DetectorNode\n"
        "module.DetectorNode = lambda: node(lambda _: FakeDetector())\n"
        "sys.exit(module.main())"
    )
    summary = tmp_path / "summary.json"
    arguments = ["-p", f"summary_file:={summary}", "-p", "qos_reliability:=reliable"]
    process = run_script(script, "--ros-args", *arguments, "-p", f"camera_time_offsets_s:={list(OFFSETS_S)}")
    bench.wait_until(bench.is_connected, timeout_s=30)
    send_and_receive(bench)
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 0, errors
    assert "Traceback" not in errors
    assert "rounds in 1, detected 1, dropped 0" in errors, errors
    assert json.loads(summary.read_text())["rounds_detected"] == 1
