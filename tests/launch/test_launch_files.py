# SPDX-License-Identifier: Apache-2.0
"""Launch and parameter files refer to existing parameters, programs and topics.

test_launch_runs.py starts the launch files, which needs the `launch` packages of a ROS distribution.
"""

import ast
import json
import xml.etree.ElementTree as ElementTree
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from scipy.spatial.transform import Rotation

from ftkd_core.errors import UserError
from ftkd_core.visualization import CLASS_COLORS
from ftkd_ros.launch_settings import (
    camera_list,
    dds_environment,
    detector_parameters,
    optical_quaternion,
    rviz_remappings,
)
from ftkd_ros.node.parameter_tables import DESCRIPTIONS
from ftkd_ros.node.parameters import DetectorParameters

ROOT = Path(__file__).resolve().parents[2]
OTHER_PROGRAMS = {"rviz2", "static_transform_publisher", "component_container_mt"}
LAUNCH_FILES = sorted((ROOT / "launch").glob("*.launch.py"))


def parameters_of(name: str) -> dict[str, Any]:
    content = yaml.safe_load((ROOT / "config" / name).read_text(encoding="utf-8"))
    parameters: dict[str, Any] = content["/**"]["ros__parameters"]
    return parameters


def literal(path: Path, name: str) -> Any:
    """Return the value of a module constant that is a literal."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == [name]:
            return ast.literal_eval(node.value)
    raise AssertionError(f"{path.name} has no constant {name}")


def keyword_values(path: Path, keyword: str) -> set[str]:
    """Return all literal values of a keyword argument in a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return {
        argument.value.value
        for call in calls
        for argument in call.keywords
        if argument.arg == keyword and isinstance(argument.value, ast.Constant)
    }


def test_every_parameter_has_a_description() -> None:
    assert {entry.name for entry in fields(DetectorParameters)} == set(DESCRIPTIONS)


def test_detector_yaml_is_valid_and_has_the_default_cameras_and_topics() -> None:
    values = parameters_of("detector.yaml")
    lists = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    parameters = DetectorParameters(**lists)
    assert parameters.image_topics == DetectorParameters().image_topics
    assert parameters.camera_info_topics == DetectorParameters().camera_info_topics
    assert parameters.cameras == DetectorParameters().cameras


@pytest.mark.parametrize("node", ["player", "recorder"])
def test_player_and_recorder_yaml_contain_only_parameters_of_their_nodes(node: str) -> None:
    source = (ROOT / "ftkd_ros" / "bag" / f"{node}.py").read_text(encoding="utf-8")
    names = {
        child.value
        for child in ast.walk(ast.parse(source))
        if isinstance(child, ast.Constant) and child.value
    }
    assert set(parameters_of(f"{node}.yaml")) <= names


def test_launch_overrides_are_parameters_of_the_detector() -> None:
    assert set(literal(ROOT / "launch" / "detector.launch.py", "OVERRIDES")) <= set(DESCRIPTIONS)


def test_foxglove_layout_shows_the_topics_of_the_node_and_calibrated_cameras() -> None:
    layout = json.loads((ROOT / "rviz" / "foxglove.json").read_text(encoding="utf-8"))
    panels = layout["configById"]
    images = [panel["imageMode"] for name, panel in panels.items() if name.startswith("Image!")]
    parameters = DetectorParameters()
    pairs = set(zip(parameters.image_topics, parameters.camera_info_topics, strict=True))
    assert {(image["imageTopic"], image["calibrationTopic"]) for image in images} == pairs
    assert all("/detections/markers" in panel["topics"] for panel in panels.values() if "topics" in panel)

    def shown(node: str | dict[str, Any]) -> list[str]:
        return [node] if isinstance(node, str) else shown(node["first"]) + shown(node["second"])

    assert sorted(shown(layout["layout"])) == sorted(panels)


def test_colours_of_the_rviz_plugin_are_those_of_the_markers() -> None:
    content = yaml.safe_load((ROOT / "rviz" / "vision_msgs_colors.yaml").read_text(encoding="utf-8"))
    found = {name: (value["r"], value["g"], value["b"]) for name, value in content.items()}
    assert found == CLASS_COLORS


def test_launched_programs_are_installed() -> None:
    setup = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("setup.py", "setup.cfg"))
    sources = [*LAUNCH_FILES, ROOT / "ftkd_ros" / "launch_parts.py"]
    own = {name for path in sources for name in keyword_values(path, "executable")} - OTHER_PROGRAMS
    assert own == {"detector", "player", "recorder"}
    assert all(f"{program} = ftkd_ros." in setup for program in own)


def test_dds_settings_are_well_formed_and_large_enough() -> None:
    profile = ElementTree.parse(ROOT / "config" / "fastdds.xml").getroot()
    sizes = [element.text for element in profile.iter() if element.tag.endswith("segment_size")]
    assert sizes == [str(128 * 2**20)]
    assert ElementTree.parse(ROOT / "config" / "cyclonedds.xml").getroot().tag.endswith("CycloneDDS")


def test_own_dds_settings_are_kept() -> None:
    config = ROOT / "config"
    fast, old, cyclone = "FASTDDS_DEFAULT_PROFILES_FILE", "FASTRTPS_DEFAULT_PROFILES_FILE", "CYCLONEDDS_URI"
    assert set(dds_environment(config, {})) == {fast, cyclone}
    assert set(dds_environment(config, {"ROS_DISTRO": "jazzy"})) == {old, cyclone}
    for name in (fast, old):
        assert set(dds_environment(config, {name: "x"})) == {cyclone}
    assert not dds_environment(config, {fast: "x", cyclone: "x"})


def test_cameras_and_topics_follow_the_parameter_file(tmp_path: Path) -> None:
    parameters = detector_parameters(ROOT / "config" / "usb_cameras_detector.yaml", ("left", "right"))
    assert parameters.image_topics == ("/left/image_raw/compressed", "/right/image_raw/compressed")
    remapped = dict(rviz_remappings(parameters, "/roof/"))
    assert remapped["/left/image_raw/camera_info"] == "/left/camera_info"
    assert remapped["/detections/surround"] == "/roof/detections/surround"
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [")
    with pytest.raises(UserError, match=r"parameter file .*broken.yaml' cannot be read"):
        detector_parameters(broken)
    with pytest.raises(UserError, match="'a,,b'; expected names separated by commas"):
        camera_list("a,,b")


@pytest.mark.parametrize(("yaw", "pitch"), [(0.0, 0.0), (55.0, 0.0), (-110.0, 10.0), (180.0, -5.0)])
def test_optical_frames_look_where_yaw_and_pitch_point(yaw: float, pitch: float) -> None:
    rotation = Rotation.from_quat(optical_quaternion(yaw, pitch)).as_matrix()
    forward, right = rotation[:, 2], rotation[:, 0]
    assert np.rad2deg(np.arctan2(forward[1], forward[0])) % 360 == pytest.approx(yaw % 360, abs=1e-6)
    assert np.rad2deg(np.arcsin(forward[2])) == pytest.approx(-pitch, abs=1e-6)
    assert right[2] == pytest.approx(0, abs=1e-9) and np.linalg.det(rotation) == pytest.approx(1)


def test_rviz_view_shows_the_topics_of_the_node() -> None:
    view = yaml.safe_load((ROOT / "rviz" / "ftkd.rviz").read_text(encoding="utf-8"))
    displays = view["Visualization Manager"]["Displays"]
    topics = {display["Topic"]["Value"] for display in displays if "Topic" in display}
    assert topics == {"/detections/markers", "/detections/surround", "/detections/bird_eye"}
