# SPDX-License-Identifier: Apache-2.0
"""Parameter files and `name:=value` mean the same to `ftkd detect` and to the node."""

from pathlib import Path

import pytest
import rclpy
from rclpy.context import Context

from ftkd_core.errors import UserError
from ftkd_ros.node.detector_node import DetectorNode
from ftkd_ros.node.parameter_files import changed_values, parse_assignment, read_parameters
from ftkd_ros.node.parameters import DetectorParameters

CONFIG = Path(__file__).parents[2] / "config"

YAML = """
/**:
  ros__parameters:
    sync_slop_s: 0.01
    min_cameras: 0x2
    image_topic: "/car/{camera}/image"
    publish_images: off
    use_sim_time: true
detector:
  ros__parameters:
    sync_slop_s: 1e-2
    cameras: [front, 'left', "right"]
    class_score_thresholds: [car=0.3, pedestrian=0.2]
    camera_time_offsets_s: [0.0, 1.5e-2, .03]
/camera_driver:
  ros__parameters:
    sync_policy: none_of_ours
"""


def node_parameters(arguments: list[str]) -> DetectorParameters:
    """Return the parameters of a node that was started with these arguments."""
    context = Context()
    rclpy.init(args=["--ros-args", *arguments], context=context)
    node = DetectorNode(context=context)
    try:
        return node.parameters
    finally:
        node.destroy_node()
        rclpy.shutdown(context=context)


@pytest.mark.parametrize(
    "assignments",
    [
        [],
        ["min_cameras:=3", "sync_policy:=anchor"],
        ["detector:cameras:=[a, b]", "detector:camera_time_offsets_s:=[0.1, 0.2]", "detector:sync_slop_s:=1"],
        ["publish_markers:=no", "map_frame:='odom'", "score_threshold:=.5", "detector:max_detections:=010"],
    ],
)
def test_node_and_command_read_the_same_parameters(tmp_path: Path, assignments: list[str]) -> None:
    path = tmp_path / "detector.yaml"
    path.write_text(YAML)
    arguments = ["--params-file", str(path), *(part for text in assignments for part in ("-p", text))]
    assert read_parameters([path], assignments) == node_parameters(arguments)


def test_shipped_files_are_read_in_order_and_without_notes() -> None:
    notes: list[str] = []
    files = [CONFIG / "detector.yaml", CONFIG / "nuscenes.yaml"]
    parameters = read_parameters(files, [], on_note=notes.append)
    arguments = [part for file in files for part in ("--params-file", str(file))]
    assert parameters == node_parameters(arguments)
    assert (parameters.sync_policy, notes) == ("surround", [])
    assert set(changed_values(parameters)) == {"sync_policy", "camera_time_offsets_s", "image_topic"}


def test_assignment_overrides_a_file_that_names_the_node(tmp_path: Path) -> None:
    """The node would keep the value of the file: rclpy gives a named section priority over `-p`."""
    path = tmp_path / "detector.yaml"
    path.write_text(YAML)
    assert read_parameters([path], ["sync_slop_s:=0.5"]).sync_slop_s == 0.5


def test_unknown_names_are_noted_in_files_and_refused_as_assignments(tmp_path: Path) -> None:
    path = tmp_path / "detector.yaml"
    path.write_text("/**:\n  ros__parameters: {min_camera: 3, qos_overrides: {/tf: {depth: 1}}}\n")
    notes: list[str] = []
    assert read_parameters([path], on_note=notes.append) == DetectorParameters()
    assert notes == [
        f"{path}: the detector has no parameter 'min_camera'; did you mean 'min_cameras'?; it is ignored"
    ]
    with pytest.raises(UserError, match="no parameter 'min_camera'; did you mean 'min_cameras'"):
        read_parameters([], ["min_camera:=3"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        ("/**: [", "cannot be read"),
        ("/camera: {ros__parameters: {a: 1}}", "no parameters of the detector"),
        ("/**: {ros__parameters: {min_cameras: 9}}", "parameter min_cameras: 9; expected 0 to 6"),
        ("/**: {ros__parameters: {min_cameras: '2'}}", "parameter min_cameras: '2' is a str"),
    ],
)
def test_bad_file_is_one_sentence_with_the_value(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "detector.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=message):
        read_parameters([path])


@pytest.mark.parametrize("text", ["min_cameras", "min_cameras=3", ":=3", "min_cameras:=[1"])
def test_bad_assignment_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="parameter"):
        parse_assignment(text)
