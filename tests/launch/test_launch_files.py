# SPDX-License-Identifier: Apache-2.0
"""Launch and parameter files refer to existing parameters, programs and topics.

Only `test_launch_file_loads` needs the `launch` packages of a ROS distribution, which have no wheel.
"""

import ast
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from ftkd_ros.node.parameters import DESCRIPTIONS, DetectorParameters

ROOT = Path(__file__).resolve().parents[2]
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


@pytest.mark.parametrize("path", LAUNCH_FILES, ids=lambda path: path.name)
def test_launched_programs_are_installed(path: Path) -> None:
    setup = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("setup.py", "setup.cfg"))
    own = keyword_values(path, "executable") - {"rviz2"}
    assert own
    assert all(f"{program} = ftkd_ros." in setup for program in own)


def test_rviz_view_shows_the_topics_of_the_node() -> None:
    view = yaml.safe_load((ROOT / "rviz" / "ftkd.rviz").read_text(encoding="utf-8"))
    displays = view["Visualization Manager"]["Displays"]
    topics = {display["Topic"]["Value"] for display in displays if "Topic" in display}
    assert topics == {"/detections/markers", "/detections/surround", "/detections/bird_eye"}


@pytest.mark.parametrize("path", LAUNCH_FILES, ids=lambda path: path.name)
def test_launch_file_loads(path: Path) -> None:
    pytest.importorskip("launch_ros", reason="needs the launch packages of a ROS distribution")
    from launch.launch_description_sources import get_launch_description_from_python_launch_file

    from launch import LaunchContext

    description = get_launch_description_from_python_launch_file(str(path))
    assert all(argument.description for argument in description.get_launch_arguments())
    assert [entity for entity in description.entities if entity.describe()]
    assert LaunchContext()
