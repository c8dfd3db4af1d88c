# SPDX-License-Identifier: Apache-2.0
"""Start the detector, and RViz with rviz:=true.

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

# Arguments that replace a value of the parameter file where they are given.
OVERRIDES = {
    "weights": "weights file (empty: that of the parameter file)",
    "device": "auto, cpu, cuda or cuda:N (empty: that of the parameter file)",
    "runtime": "auto, fast or plain (empty: that of the parameter file)",
    "qos_reliability": "best_effort or reliable (empty: that of the parameter file)",
    "sync_deadline_s": "seconds until an incomplete round goes masked (empty: that of the parameter file)",
    "summary_file": "JSON file with counters and latency (empty: that of the parameter file)",
}


def start_detector(context: LaunchContext) -> list[Node]:
    """The node, with the parameter file and the arguments that are not empty."""
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
    """Arguments, detector, RViz."""
    arguments = [
        DeclareLaunchArgument(name, default_value="", description=OVERRIDES[name]) for name in OVERRIDES
    ]
    return LaunchDescription(
        [
            *arguments,
            DeclareLaunchArgument(
                "params_file",
                default_value=str(SHARE / "config" / "detector.yaml"),
                description="parameters of the detector",
            ),
            DeclareLaunchArgument(
                "use_sim_time", default_value="false", description="take the time from /clock"
            ),
            DeclareLaunchArgument("rviz", default_value="false", description="start RViz as well"),
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
