# SPDX-License-Identifier: Apache-2.0
"""Launch files with the launch packages of a ROS distribution: arguments, exit codes, environment.

The package is installed by links into a temporary prefix, so no colcon is needed.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.ros.recorded_drive import record_drive

pytest.importorskip("launch_ros", reason="needs the launch packages of a ROS distribution")

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = {
    "detector": "ftkd_ros.node.detector_node",
    "player": "ftkd_ros.bag.player",
    "recorder": "ftkd_ros.bag.recorder",
}
RUN = """
import sys
from launch import LaunchDescription, LaunchService
from launch.actions import IncludeLaunchDescription
from launch.launch_description_sources import PythonLaunchDescriptionSource
file, *given = sys.argv[1:]
service = LaunchService()
source = PythonLaunchDescriptionSource(file)
pairs = [tuple(text.split(":=", 1)) for text in given]
service.include_launch_description(
    LaunchDescription([IncludeLaunchDescription(source, launch_arguments=pairs)])
)
sys.exit(service.run())
"""


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a prefix with the package: markers, data files and programs that run from the sources."""
    folder = tmp_path_factory.mktemp("prefix")
    index = folder / "share" / "ament_index" / "resource_index" / "packages"
    index.mkdir(parents=True)
    (index / "ftkd_ros").touch()
    share, programs = folder / "share" / "ftkd_ros", folder / "lib" / "ftkd_ros"
    share.mkdir()
    programs.mkdir(parents=True)
    for name in ("launch", "config", "rviz", "package.xml"):
        (share / name).symlink_to(ROOT / name)
    for name, module in PROGRAMS.items():
        program = programs / name
        program.write_text(f'#!/bin/sh\nexec {sys.executable} -m {module} "$@"\n')
        program.chmod(0o755)
    return folder


def launch(prefix: Path, file: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a launch file as `ros2 launch` does and return exit code and output."""
    paths = [str(prefix), *os.environ.get("AMENT_PREFIX_PATH", "").split(os.pathsep)]
    return subprocess.run(
        [sys.executable, "-c", RUN, str(ROOT / "launch" / file), *arguments],
        check=False,
        capture_output=True,
        text=True,
        timeout=110,
        env={
            **os.environ,
            "AMENT_PREFIX_PATH": os.pathsep.join(path for path in paths if path),
            "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
            "ROS_LOG_DIR": str(prefix / "log"),
            **environment,
        },
    )


def output_of(finished: subprocess.CompletedProcess[str]) -> str:
    return finished.stdout + finished.stderr


@pytest.fixture
def actions(prefix: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Return a function that evaluates a launch file and returns its nodes and the launch context."""
    from launch.actions import IncludeLaunchDescription, OpaqueFunction
    from launch.launch_description_sources import get_launch_description_from_python_launch_file

    from launch import LaunchContext

    before = dict(os.environ)  # the context of a launch changes it
    monkeypatch.setenv("AMENT_PREFIX_PATH", str(prefix))

    def evaluate(file: str, **given: str) -> tuple[list[Any], Any]:
        context = LaunchContext()
        context.launch_configurations.update(given)
        description = get_launch_description_from_python_launch_file(
            str(prefix / "share/ftkd_ros/launch" / file)
        )
        found: list[Any] = []
        for entity in description.entities:
            results = entity.visit(context) or []
            if isinstance(entity, OpaqueFunction):
                found += results
            elif not isinstance(entity, IncludeLaunchDescription):
                assert not results
        return found, context

    yield evaluate
    os.environ.clear()
    os.environ.update(before)


def node_arguments(node: Any) -> list[str]:
    """Return the arguments that are plain text."""
    return [part.text for parts in node.cmd for part in parts if hasattr(part, "text")]


def test_arguments_of_the_detector_reach_the_node(actions: Any) -> None:
    given = {"namespace": "roof", "log_level": "debug", "respawn": "true", "cameras": "front, back"}
    (detector, rviz), context = actions("detector.launch.py", rviz="true", **given)
    assert "debug" in node_arguments(detector)
    detector._perform_substitutions(context)
    assert detector.expanded_node_namespace == "/roof"
    file = detector._Node__expanded_parameter_arguments[-1][0]
    assert "    - front\n    - back\n" in Path(file).read_text()
    rviz._perform_substitutions(context)
    remapped = dict(rviz.expanded_remapping_rules)
    assert remapped["/detections/markers"] == "/roof/detections/markers"
    assert remapped["/front/image/camera_info"] == "/front/camera_info"


def test_dds_settings_are_used_unless_the_user_has_own(actions: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FASTDDS_DEFAULT_PROFILES_FILE", "FASTRTPS_DEFAULT_PROFILES_FILE", "CYCLONEDDS_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ROS_DISTRO", "kilted")
    _, context = actions("detector.launch.py")
    assert context.environment["FASTDDS_DEFAULT_PROFILES_FILE"].endswith("config/fastdds.xml")
    for name in ("FASTDDS_DEFAULT_PROFILES_FILE", "CYCLONEDDS_URI"):
        monkeypatch.delenv(name)
    _, context = actions("detector.launch.py", dds_settings="false")
    assert "CYCLONEDDS_URI" not in context.environment


def test_example_of_usb_cameras_has_a_driver_and_a_transform_per_camera(actions: Any) -> None:
    (container, *transforms), _ = actions("usb_cameras.launch.py")
    drivers = container._ComposableNodeContainer__composable_node_descriptions
    assert len(drivers) == len(transforms) == 6
    assert "front_optical" in node_arguments(transforms[0])


@pytest.mark.ros
@pytest.mark.parametrize("case", ["missing bag", "existing output", "bad parameter"])
def test_replay_fails_if_a_process_fails(prefix: Path, tmp_path: Path, case: str) -> None:
    bag, arguments = tmp_path / "bag", []
    if case != "missing bag":
        bag = record_drive(tmp_path / "drive").key_frames
    if case == "existing output":
        (tmp_path / "output").mkdir()
        arguments = [f"output:={tmp_path / 'output'}"]
    if case == "bad parameter":
        arguments = ["weights:=/nowhere/weights.safetensors"]
    finished = launch(prefix, "replay.launch.py", f"bag:={bag}", *arguments)
    assert finished.returncode == 1, output_of(finished)
    assert "ended with exit code 2; its error is above" in output_of(finished)
    assert "Traceback" not in output_of(finished)


@pytest.mark.ros
def test_evaluation_fails_without_a_bag(prefix: Path, tmp_path: Path) -> None:
    given = [
        f"bag:={tmp_path / 'none'}",
        f"output:={tmp_path / 'new'}",
        f"dataroot:={tmp_path}",
        "version:=v",
    ]
    finished = launch(prefix, "evaluate.launch.py", *given)
    assert finished.returncode == 1 and "the player ended with exit code 2" in output_of(finished)
    again = launch(prefix, "evaluate.launch.py", *given)
    assert again.returncode == 1 and "launch argument output:" in output_of(again)


@pytest.mark.ros
def test_wrong_argument_is_one_sentence(prefix: Path) -> None:
    finished = launch(prefix, "detector.launch.py", "respawn:=maybe")
    assert finished.returncode == 1
    assert "launch argument respawn: 'maybe'; expected true or false" in output_of(finished)
