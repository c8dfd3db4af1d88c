# SPDX-License-Identifier: Apache-2.0
"""The detector node over DDS on loopback, with a fake detector and a fake camera rig."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from std_srvs.srv import Trigger

from ftkd_ros.convert.from_ros import detections_to_objects, stamp_to_ns
from ftkd_ros.convert.images import image_to_rgb
from tests.ros.fakes import CAMERAS, OFFSETS_S, SPEED, START, FakeRig, RunningNode, send_and_receive

pytestmark = pytest.mark.ros

LAST_OFFSET_NS = round(max(OFFSETS_S) * 1e9)


@pytest.fixture(scope="module")
def rig() -> Iterator[FakeRig]:
    rig = FakeRig()
    yield rig
    rig.close()


@pytest.fixture(scope="module")
def running(rig: FakeRig, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningNode]:
    running = RunningNode(
        qos_reliability="reliable",
        camera_time_offsets_s=list(OFFSETS_S),
        sync_deadline_s=0.4,
        memory_max_gap_s=500.0,
        summary_file=str(tmp_path_factory.mktemp("node") / "summary.json"),
    )
    rig.wait_until(rig.is_connected)
    yield running
    running.close()
    summary = json.loads(Path(running.node.parameters.summary_file).read_text())
    assert summary["rounds_in"] == summary["rounds_detected"] + summary["rounds_dropped"] >= 5
    assert summary["partial_rounds"] == 1
    assert summary["latency_ms"]["p95"] >= summary["latency_ms"]["p50"] > 0
    assert {"decode", "geometry", "detect", "publish"} <= set(summary["stage_ms"])
    assert (summary["device"], summary["weights"]) == ("cpu", "fake.safetensors")
    assert summary["training"] == "7 steps"


def test_six_images_give_detections_at_the_reference_stamp(rig: FakeRig, running: RunningNode) -> None:
    trigger = send_and_receive(rig, red=200)
    message = rig.received["/detections"][-1]
    rig.wait_until(lambda: bool(rig.received["/detections/velocities"]))
    objects = detections_to_objects(message, rig.received["/detections/velocities"][-1])
    assert message.header.frame_id == "base_link"
    assert objects.stamp_ns == trigger + LAST_OFFSET_NS
    assert objects.boxes[0, 0] == 6
    assert objects.boxes[0, 1] == pytest.approx(200, abs=3)
    np.testing.assert_allclose(objects.boxes[0, 7:], [5.0, 0.0])
    assert running.detector.warmed_up


def test_every_view_has_the_pose_of_its_exposure(rig: FakeRig, running: RunningNode) -> None:
    trigger = send_and_receive(rig)
    camera_round = running.detector.rounds[-1]
    for view, offset in zip(camera_round.views, OFFSETS_S, strict=True):
        assert view is not None
        assert view.stamp_ns == trigger + round(offset * 1e9)
        np.testing.assert_allclose(view.global_from_ego[0, 3], SPEED * view.stamp_ns * 1e-9, atol=1e-6)
        np.testing.assert_allclose(view.ego_from_camera[:3, 3], [1.5, 0, 0])
    np.testing.assert_allclose(
        camera_round.global_from_ego[0, 3], SPEED * camera_round.reference_stamp_ns * 1e-9, atol=1e-6
    )


def test_markers_pictures_and_labels_are_published(rig: FakeRig, running: RunningNode) -> None:
    send_and_receive(rig)
    topics = ("/detections/markers", "/detections/bird_eye", "/detections/surround", "/detections/label_info")
    rig.wait_until(lambda: all(rig.received[topic] for topic in topics))
    assert rig.received["/detections/label_info"][0].class_map[0].class_name == "car"
    assert any(marker.ns == "boxes" for marker in rig.received["/detections/markers"][-1].markers)
    for topic in ("/detections/bird_eye", "/detections/surround"):
        picture = image_to_rgb(rig.received[topic][-1], topic)
        assert picture.shape[2] == 3 and picture.std() > 0


def test_truncated_jpeg_masks_its_camera_and_the_node_continues(rig: FakeRig, running: RunningNode) -> None:
    send_and_receive(rig, truncated=("cam_back",))
    assert detections_to_objects(rig.received["/detections"][-1]).boxes[0, 0] == 5
    assert running.detector.rounds[-1].views[CAMERAS.index("cam_back")] is None
    faults = running.node.summary()["camera_faults"]
    assert faults == {"cam_back": 1}
    send_and_receive(rig)
    assert detections_to_objects(rig.received["/detections"][-1]).boxes[0, 0] == 6


def test_round_without_one_camera_is_detected_after_the_deadline(rig: FakeRig, running: RunningNode) -> None:
    started = time.monotonic()
    trigger = send_and_receive(rig, without=("cam_back_left",))
    assert time.monotonic() - started >= 0.3
    objects = detections_to_objects(rig.received["/detections"][-1])
    assert objects.boxes[0, 0] == 5
    assert objects.stamp_ns == trigger + round(0.0327 * 1e9)


def test_reset_service_resets_the_detector_once(rig: FakeRig, running: RunningNode) -> None:
    send_and_receive(rig)
    resets = running.detector.resets
    client = rig.node.create_client(Trigger, "/detector/reset")
    rig.wait_until(client.service_is_ready)
    future = client.call_async(Trigger.Request())
    rig.wait_until(future.done)
    assert future.result().success
    send_and_receive(rig)
    send_and_receive(rig)
    assert running.detector.resets == resets + 1
    assert running.node.summary()["resets"]["service"] == 1


def test_diagnostics_contain_cameras_rounds_and_latency(rig: FakeRig, running: RunningNode) -> None:
    send_and_receive(rig)
    rig.received["/diagnostics"].clear()
    rig.wait_until(lambda: bool(rig.received["/diagnostics"]))
    statuses = {status.name: status for status in rig.received["/diagnostics"][-1].status}
    assert {f"detector: camera {camera}" for camera in CAMERAS} < set(statuses)
    rounds = {value.key: value.value for value in statuses["detector: rounds"].values}
    assert int(rounds["rounds_detected"]) == running.node.summary()["rounds_detected"] > 0
    latency = {value.key: value.value for value in statuses["detector: latency"].values}
    assert float(latency["latency_ms.p50"]) > 0


def test_stamps_that_jump_back_reset_the_detector(rig: FakeRig, running: RunningNode) -> None:
    # The last test with this node, because the other tests need increasing stamps.
    for trigger in (START + 600 * 10**9, START - 100 * 10**9, START - 99 * 10**9):
        already = len(rig.received["/detections"])
        rig.send_round(trigger)
        rig.wait_until(lambda count=already: len(rig.received["/detections"]) > count)
        newest = stamp_to_ns(rig.received["/detections"][-1].header.stamp)
        assert newest == trigger + LAST_OFFSET_NS
    assert running.node.summary()["resets"]["backward_time"] == 1
