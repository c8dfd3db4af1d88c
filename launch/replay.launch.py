# SPDX-License-Identifier: Apache-2.0
"""Play a bag through the detector; ends when the bag ends. With output:=DIR the detections are recorded.

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
    "bag": (None, "bag to play: the folder that holds metadata.yaml"),
    "output": ("", "folder for a bag of the detections (empty: not recorded)"),
    "rate": ("1.0", "speed, 1 is real time"),
    "loop": ("false", "start again at the end"),
    "weights": ("", "weights file (empty: that of the parameter file)"),
    "device": ("", "auto, cpu, cuda or cuda:N (empty: that of the parameter file)"),
    "summary_file": ("", "JSON file with the detector's counters and latency"),
    "rviz": ("false", "start RViz as well"),
    "linger_s": ("3.0", "seconds that the detector gets to finish after the end of the bag"),
}


def generate_launch_description() -> LaunchDescription:
    """Arguments, detector, recorder, player; the end of the player ends all."""
    # Reliable cameras and a patient deadline: in a replay no round is lost to a busy machine.
    detector = IncludeLaunchDescription(
        PythonLaunchDescriptionSource(str(SHARE / "launch" / "detector.launch.py")),
        launch_arguments={
            "use_sim_time": "true",
            "qos_reliability": "reliable",
            "sync_deadline_s": "1.0",
            **{name: LaunchConfiguration(name) for name in ("weights", "device", "summary_file", "rviz")},
        }.items(),
    )
    recorder = Node(
        package="ftkd_ros",
        executable="recorder",
        name="recorder",
        output="screen",
        parameters=[
            str(SHARE / "config" / "recorder.yaml"),
            {"output": ParameterValue(LaunchConfiguration("output"), value_type=str)},
        ],
        condition=IfCondition(PythonExpression(["'", LaunchConfiguration("output"), "' != ''"])),
    )
    player = Node(
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
    end = TimerAction(
        period=LaunchConfiguration("linger_s"),
        actions=[EmitEvent(event=Shutdown(reason="the bag has ended"))],
    )
    return LaunchDescription(
        [
            *[
                DeclareLaunchArgument(name, default_value=default, description=description)
                for name, (default, description) in ARGUMENTS.items()
            ],
            detector,
            recorder,
            player,
            RegisterEventHandler(OnProcessExit(target_action=player, on_exit=[end])),
        ]
    )
