# SPDX-License-Identifier: Apache-2.0
"""Start the detector; rviz:=true also starts RViz.

ros2 launch ftkd_ros detector.launch.py weights:=/path/model.safetensors device:=cuda
"""

from pathlib import Path
from typing import Any

from ament_index_python.packages import get_package_share_directory
from launch.actions import DeclareLaunchArgument, OpaqueFunction
from launch.conditions import IfCondition
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import Node

from launch import LaunchContext, LaunchDescription

SHARE = Path(get_package_share_directory("ftkd_ros"))

# Launch arguments that override the parameter file if they are not empty.
OVERRIDES = {
    "weights": "weights file (empty: value of the parameter file)",
    "device": "auto, cpu, cuda or cuda:N (empty: value of the parameter file)",
    "runtime": "auto, fast or plain (empty: value of the parameter file)",
    "qos_reliability": "best_effort or reliable (empty: value of the parameter file)",
    "sync_deadline_s": "seconds until an incomplete round is processed (empty: value of the parameter file)",
    "summary_file": "JSON file for counters and latency (empty: value of the parameter file)",
}


def start_detector(context: LaunchContext) -> list[Node]:
    """Return the node with the parameter file and the overrides that are not empty."""
    overrides: dict[str, Any] = {
        name: float(value) if name == "sync_deadline_s" else value
        for name in OVERRIDES
        if (value := LaunchConfiguration(name).perform(context))
    }
    overrides["use_sim_time"] = LaunchConfiguration("use_sim_time").perform(context).lower() == "true"
    return [
        Node(
            package="ftkd_ros",
            executable="detector",
            name="detector",
            output="screen",
            parameters=[LaunchConfiguration("params_file").perform(context), overrides],
        )
    ]


def generate_launch_description() -> LaunchDescription:
    """Return arguments, detector and RViz."""
    arguments = [
        DeclareLaunchArgument(name, default_value="", description=OVERRIDES[name]) for name in OVERRIDES
    ]
    return LaunchDescription(
        [
            *arguments,
            DeclareLaunchArgument(
                "params_file",
                default_value=str(SHARE / "config" / "detector.yaml"),
                description="parameter file of the detector",
            ),
            DeclareLaunchArgument(
                "use_sim_time", default_value="false", description="use the time of /clock"
            ),
            DeclareLaunchArgument("rviz", default_value="false", description="start RViz"),
            OpaqueFunction(function=start_detector),
            Node(
                package="rviz2",
                executable="rviz2",
                arguments=["-d", str(SHARE / "rviz" / "ftkd.rviz")],
                parameters=[{"use_sim_time": LaunchConfiguration("use_sim_time")}],
                condition=IfCondition(LaunchConfiguration("rviz")),
            ),
        ]
    )
