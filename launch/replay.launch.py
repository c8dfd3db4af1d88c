# SPDX-License-Identifier: Apache-2.0
"""Play a bag through the detector and shut down at the end of the bag; output:=DIR records the detections.

ros2 launch ftkd_ros replay.launch.py bag:=/path/bag output:=/path/detections rviz:=true
"""

from pathlib import Path

from ament_index_python.packages import get_package_share_directory
from launch.actions import (
    DeclareLaunchArgument,
    EmitEvent,
    IncludeLaunchDescription,
    RegisterEventHandler,
    TimerAction,
)
from launch.conditions import IfCondition
from launch.event_handlers import OnProcessExit
from launch.events import Shutdown
from launch.launch_description_sources import PythonLaunchDescriptionSource
from launch.substitutions import LaunchConfiguration, PythonExpression
from launch_ros.actions import Node
from launch_ros.parameter_descriptions import ParameterValue

from launch import LaunchDescription

SHARE = Path(get_package_share_directory("ftkd_ros"))

ARGUMENTS = {
    "bag": (None, "bag to play: the folder that contains metadata.yaml"),
    "output": ("", "new bag folder for the detections (empty: not recorded)"),
    "rate": ("1.0", "playback speed; 1 is real time"),
    "loop": ("false", "play again after the end"),
    "weights": ("", "weights file (empty: value of the parameter file)"),
    "device": ("", "auto, cpu, cuda or cuda:N (empty: value of the parameter file)"),
    "summary_file": ("", "JSON file for counters and latency (empty: value of the parameter file)"),
    "rviz": ("false", "start RViz"),
    "linger_s": ("3.0", "seconds between the end of the bag and the shutdown of the detector"),
}


def make_detector() -> IncludeLaunchDescription:
    """Return the detector with reliable QoS and a long deadline, so that a slow machine loses no round."""
    return IncludeLaunchDescription(
        PythonLaunchDescriptionSource(str(SHARE / "launch" / "detector.launch.py")),
        launch_arguments={
            "use_sim_time": "true",
            "qos_reliability": "reliable",
            "sync_deadline_s": "1.0",
            **{name: LaunchConfiguration(name) for name in ("weights", "device", "summary_file", "rviz")},
        }.items(),
    )


def make_recorder() -> Node:
    """Return the recorder, which starts only if `output` is not empty."""
    return Node(
        package="ftkd_ros",
        executable="recorder",
        name="recorder",
        output="screen",
        parameters=[
            str(SHARE / "config" / "recorder.yaml"),
            {
                "output": ParameterValue(LaunchConfiguration("output"), value_type=str),
                "use_sim_time": True,
            },
        ],
        condition=IfCondition(PythonExpression(["'", LaunchConfiguration("output"), "' != ''"])),
    )


def make_player() -> Node:
    """Return the player."""
    return Node(
        package="ftkd_ros",
        executable="player",
        name="player",
        output="screen",
        parameters=[
            str(SHARE / "config" / "player.yaml"),
            {
                "bag": ParameterValue(LaunchConfiguration("bag"), value_type=str),
                "rate": ParameterValue(LaunchConfiguration("rate"), value_type=float),
                "loop": ParameterValue(LaunchConfiguration("loop"), value_type=bool),
            },
        ],
    )


def generate_launch_description() -> LaunchDescription:
    """Return arguments, detector, recorder and player; all processes shut down after the player exits."""
    player = make_player()
    shutdown = TimerAction(
        period=LaunchConfiguration("linger_s"),
        actions=[EmitEvent(event=Shutdown(reason="the bag has ended"))],
    )
    return LaunchDescription(
        [
            *[
                DeclareLaunchArgument(name, default_value=default, description=description)
                for name, (default, description) in ARGUMENTS.items()
            ],
            make_detector(),
            make_recorder(),
            player,
            RegisterEventHandler(OnProcessExit(target_action=player, on_exit=[shutdown])),
        ]
    )
