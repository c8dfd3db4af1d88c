# SPDX-License-Identifier: Apache-2.0
"""vision_msgs and tf2_msgs have the published type hashes and are exchanged between processes."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import rclpy
from rclpy.node import Node
from rosbags.typesys import Stores, get_types_from_msg, get_typestore
from rosbags.typesys.store import Typestore
from tf2_msgs.action import LookupTransform
from tf2_msgs.msg import TF2Error, TFMessage
from tf2_msgs.srv import FrameGraph
from vision_msgs.msg import Detection3D, Detection3DArray, LabelInfo, ObjectHypothesisWithPose, VisionClass

pytestmark = pytest.mark.ros

DEFINITIONS = Path(__file__).parents[2] / "pip_ros" / "interfaces"
VISION_MESSAGES = sorted(path.stem for path in (DEFINITIONS / "vision_msgs" / "msg").glob("*.msg"))
# Type hashes of the released packages: vision_msgs 4.x and tf2_msgs.
PUBLISHED_HASHES = {
    Detection3DArray: "RIHS01_793f5eab9595ac1c0da07873cc859db42eae51f0ee76056db8562515d830e018",
    TFMessage: "RIHS01_e369d0f05a23ae52508854b66f6aa0437f3449d652e8cbf22d5abe85d020f087",
}
DEADLINE_S = 30.0

PUBLISHER = """
import sys, time, rclpy
from vision_msgs.msg import Detection3D, Detection3DArray, ObjectHypothesisWithPose
rclpy.init()
node = rclpy.create_node("publisher")
publisher = node.create_publisher(Detection3DArray, sys.argv[1], 1)
detection = Detection3D(id="a")
detection.bbox.size.x = 4.5
detection.results.append(ObjectHypothesisWithPose())
detection.results[0].hypothesis.class_id = "car"
message = Detection3DArray(detections=[detection])
message.header.frame_id = "base_link"
while True:
    publisher.publish(message)
    time.sleep(0.05)
"""


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch) -> Iterator[Node]:
    monkeypatch.setenv("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
    context = rclpy.Context()
    context.init(domain_id=int(os.environ.get("ROS_DOMAIN_ID", "97")))
    node = rclpy.create_node("interfaces_test", context=context)
    yield node
    node.destroy_node()
    context.shutdown()


def vision_typestore() -> Typestore:
    """Types that rosbags parses from the .msg files, for comparison with rosidl."""
    store = get_typestore(Stores.ROS2_KILTED)
    for name in VISION_MESSAGES:
        text = (DEFINITIONS / "vision_msgs" / "msg" / f"{name}.msg").read_text()
        store.register(get_types_from_msg(text, f"vision_msgs/msg/{name}"))
    return store


@pytest.mark.parametrize("message_type", PUBLISHED_HASHES)
def test_the_middleware_announces_the_published_type_hash(node: Node, message_type: Any) -> None:
    publisher = node.create_publisher(message_type, "/interfaces/hash", 1)
    infos: list[Any] = []
    start = time.monotonic()
    while not infos and time.monotonic() - start < DEADLINE_S:
        infos = node.get_publishers_info_by_topic("/interfaces/hash")
    assert [str(info.topic_type_hash) for info in infos] == [PUBLISHED_HASHES[message_type]]
    node.destroy_publisher(publisher)


def test_all_published_vision_messages_are_built() -> None:
    expected = "BoundingBox2D BoundingBox2DArray BoundingBox3D BoundingBox3DArray Classification Detection2D"
    expected += " Detection2DArray Detection3D Detection3DArray LabelInfo ObjectHypothesis"
    expected += " ObjectHypothesisWithPose Point2D Pose2D VisionClass VisionInfo"
    assert expected.split() == VISION_MESSAGES


@pytest.mark.parametrize("name", VISION_MESSAGES)
def test_rosbags_and_rosidl_agree_on_every_hash(name: str) -> None:
    described = Path(sys.prefix) / "share" / "vision_msgs" / "msg" / f"{name}.json"
    if not described.exists():
        pytest.skip("vision_msgs comes from a ROS distribution, which does not install the hashes here")
    hashes = {
        entry["type_name"]: entry["hash_string"] for entry in json.loads(described.read_text())["type_hashes"]
    }
    assert vision_typestore().hash_rihs01(f"vision_msgs/msg/{name}") == hashes[f"vision_msgs/msg/{name}"]


def test_fields_have_the_published_types() -> None:
    fields = Detection3D.get_fields_and_field_types()
    assert fields == {
        "header": "std_msgs/Header",
        "results": "sequence<vision_msgs/ObjectHypothesisWithPose>",
        "bbox": "vision_msgs/BoundingBox3D",
        "id": "string",
    }
    hypothesis = ObjectHypothesisWithPose().hypothesis
    assert hypothesis.get_fields_and_field_types() == {"class_id": "string", "score": "double"}
    assert (
        LabelInfo(class_map=[VisionClass(class_id=7, class_name="car")], threshold=0.5).class_map[0].class_id
        == 7
    )
    assert TF2Error.TRANSFORM_ERROR == 6
    assert LookupTransform.Result().error.error == TF2Error.NO_ERROR
    assert FrameGraph.Response(frame_yaml="map").frame_yaml == "map"


def test_detections_are_received_from_another_process(node: Node) -> None:
    topic = f"/interfaces/p{os.getpid()}"
    received: list[Detection3DArray] = []
    node.create_subscription(Detection3DArray, topic, received.append, 1)
    executor = rclpy.executors.SingleThreadedExecutor(context=node.context)
    executor.add_node(node)
    domain = {"ROS_DOMAIN_ID": str(node.context.get_domain_id())}
    sender = subprocess.Popen([sys.executable, "-c", PUBLISHER, topic], env=os.environ | domain)
    try:
        start = time.monotonic()
        while not received and time.monotonic() - start < DEADLINE_S:
            executor.spin_once(timeout_sec=0.1)
    finally:
        sender.terminate()
        sender.wait(DEADLINE_S)
        executor.shutdown()
    assert received, f"nothing arrived in {DEADLINE_S} s"
    (detection,) = received[0].detections
    assert (detection.id, detection.results[0].hypothesis.class_id) == ("a", "car")
    assert (detection.bbox.size.x, received[0].header.frame_id) == (4.5, "base_link")


def test_endpoints_of_these_types_leave_no_error_state() -> None:
    """Without introspection type support FastDDS left an error state, which the next endpoint printed."""
    script = (
        "import rclpy\n"
        "from diagnostic_msgs.msg import DiagnosticArray\n"
        "from tf2_msgs.msg import TFMessage\n"
        "from vision_msgs.msg import Detection3DArray\n"
        "rclpy.init()\n"
        "node = rclpy.create_node('endpoints')\n"
        "for number, kind in enumerate((Detection3DArray, DiagnosticArray, TFMessage, DiagnosticArray)):\n"
        "    node.create_subscription(kind, f'/endpoint_{number}', print, 1)\n"
    )
    finished = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert "error state is being overwritten" not in finished.stderr
