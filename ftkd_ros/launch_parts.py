# SPDX-License-Identifier: Apache-2.0
"""Parts of the launch files: detector, player, recorder, and the end of a launch when a process fails.

Only launch files import this module, because `launch` has no wheel.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from ament_index_python.packages import get_package_share_directory
from launch.actions import (
    DeclareLaunchArgument,
    ExecuteProcess,
    IncludeLaunchDescription,
    OpaqueFunction,
    RegisterEventHandler,
)
from launch.conditions import IfCondition
from launch.event_handlers import OnProcessExit
from launch.launch_description_sources import PythonLaunchDescriptionSource
from launch.substitutions import LaunchConfiguration, PythonExpression
from launch_ros.actions import Node
from launch_ros.parameter_descriptions import ParameterValue

from ftkd_core.errors import UserError
from ftkd_ros.launch_settings import camera_list, dds_environment, detector_parameters
from launch import LaunchContext

SHARE: Final = Path(get_package_share_directory("ftkd_ros"))
REPLAY_ARGUMENTS: Final[dict[str, tuple[str | None, str]]] = {
    "bag": (None, "bag to play: the folder that contains metadata.yaml"),
    "rate": ("1.0", "playback speed; 1 is real time"),
    "weights": ("", "weights file (empty: value of the parameter file)"),
    "device": ("", "auto, cpu, cuda or cuda:N (empty: value of the parameter file)"),
    "score_threshold": ("0.05", "minimum score; low, because the metrics need all detections"),
    "params_file": (str(SHARE / "config" / "detector.yaml"), "parameter file of the detector"),
    "cameras": ("", "camera names separated by commas (empty: value of the parameter file)"),
    "log_level": ("info", "debug, info, warn, error or fatal"),
    "rviz": ("false", "start RViz"),
    "dds_settings": ("true", "use config/fastdds.xml and cyclonedds.xml, if you have no own settings"),
    "linger_s": ("3.0", "seconds between the end of the bag and the shutdown of the detector"),
}
"""Default and description of the arguments of every replay; None: required."""


def declare(arguments: dict[str, tuple[str | None, str]]) -> list[DeclareLaunchArgument]:
    """Return the declarations of launch arguments."""
    return [
        DeclareLaunchArgument(name, default_value=default, description=description)
        for name, (default, description) in arguments.items()
    ]


def argument(name: str, context: LaunchContext) -> str:
    """Return the value of a launch argument."""
    return str(LaunchConfiguration(name).perform(context))


def is_true(name: str, context: LaunchContext) -> bool:
    """Return the value of a launch argument that is true or false."""
    text = argument(name, context).lower()
    if text not in ("true", "false", "1", "0"):
        raise UserError(f"launch argument {name}: {text!r}; expected true or false")
    return text in ("true", "1")


def use_dds_settings() -> OpaqueFunction:
    """Return an action that selects our DDS settings for later processes, unless the user has own ones."""

    def select(context: LaunchContext) -> None:
        if is_true("dds_settings", context):
            context.environment.update(dds_environment(SHARE / "config", context.environment))

    return OpaqueFunction(function=select)


def fail_with(process: ExecuteProcess, what: str, *, may_end: bool = False) -> RegisterEventHandler:
    """Return a handler that ends the launch with exit code 1 if a process fails.

    may_end: exit code 0 is expected before the shutdown.
    """

    def check(event: Any, context: LaunchContext) -> None:
        if event.returncode == 0 and (may_end or context.is_shutdown):
            return
        raise RuntimeError(f"the {what} ended with exit code {event.returncode}; its error is above")

    return RegisterEventHandler(OnProcessExit(target_action=process, on_exit=check))


def detector_of_replay(**fixed: str) -> IncludeLaunchDescription:
    """Return the detector with reliable QoS and a long deadline, so that a slow machine loses no round."""
    passed = ("weights", "device", "score_threshold", "rviz", "params_file", "cameras", "log_level")
    return IncludeLaunchDescription(
        PythonLaunchDescriptionSource(str(SHARE / "launch" / "detector.launch.py")),
        launch_arguments={
            "use_sim_time": "true",
            "qos_reliability": "reliable",
            "sync_deadline_s": "1.0",
            **{name: LaunchConfiguration(name) for name in passed},
            **fixed,
        }.items(),
    )


def make_recorder() -> Node:
    """Return the recorder, which starts only if launch argument `output` is not empty."""
    return Node(
        package="ftkd_ros",
        executable="recorder",
        name="recorder",
        output="screen",
        parameters=[
            str(SHARE / "config" / "recorder.yaml"),
            {"output": ParameterValue(LaunchConfiguration("output"), value_type=str), "use_sim_time": True},
        ],
        condition=IfCondition(PythonExpression(["'", LaunchConfiguration("output"), "' != ''"])),
    )


def make_player(context: LaunchContext, *, loop: bool = False) -> Node:
    """Return the player, which waits until the detector has subscribed to its last camera."""
    cameras = camera_list(argument("cameras", context))
    topics = detector_parameters(argument("params_file", context), cameras).image_topics
    return Node(
        package="ftkd_ros",
        executable="player",
        name="player",
        output="screen",
        parameters=[
            str(SHARE / "config" / "player.yaml"),
            {
                "bag": argument("bag", context),
                "rate": float(argument("rate", context)),
                "loop": loop,
                "wait_for_subscribers": [topics[-1]],
            },
        ],
    )


def on_success(process: ExecuteProcess, what: str, then: Callable[[], list[Any]]) -> RegisterEventHandler:
    """Return a handler that continues with `then()` after exit code 0; other codes end the launch with 1."""

    def check(event: Any, context: LaunchContext) -> list[Any] | None:
        if event.returncode != 0:
            raise RuntimeError(f"the {what} ended with exit code {event.returncode}; its error is above")
        return None if context.is_shutdown else then()

    return RegisterEventHandler(OnProcessExit(target_action=process, on_exit=check))
