# SPDX-License-Identifier: Apache-2.0
"""Start the detector; rviz:=true also starts RViz.

ros2 launch ftkd_ros detector.launch.py weights:=/path/model.safetensors device:=cuda
"""

from typing import Any

from launch.actions import OpaqueFunction
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import Node

from ftkd_ros.launch_parts import SHARE, argument, declare, fail_with, is_true, use_dds_settings
from ftkd_ros.launch_settings import camera_list, detector_parameters, rviz_remappings
from launch import LaunchContext, LaunchDescription

# Launch arguments that override the parameter file if they are not empty.
OVERRIDES = {
    "weights": "weights file (empty: value of the parameter file)",
    "device": "auto, cpu, cuda or cuda:N (empty: value of the parameter file)",
    "runtime": "engine (empty: value of the parameter file)",
    "qos_reliability": "best_effort or reliable (empty: value of the parameter file)",
    "score_threshold": "minimum score, -1: recommended ones (empty: value of the parameter file)",
    "sync_deadline_s": "seconds until an incomplete round is processed (empty: value of the parameter file)",
    "summary_file": "JSON file for counters and latency (empty: value of the parameter file)",
    "cameras": "camera names separated by commas (empty: value of the parameter file)",
}
ARGUMENTS: dict[str, tuple[str | None, str]] = {
    "params_file": (str(SHARE / "config" / "detector.yaml"), "parameter file of the detector"),
    "namespace": ("", "namespace of the node and of its outputs"),
    "log_level": ("info", "debug, info, warn, error or fatal"),
    "respawn": ("false", "start the detector again 2 s after it ends"),
    "use_sim_time": ("false", "use the time of /clock"),
    "dds_settings": (
        "true",
        "use config/fastdds.xml and cyclonedds.xml, if you have no own settings",
    ),
    "rviz": ("false", "start RViz"),
}


def override(name: str, value: str) -> Any:
    """Return the parameter value of a launch argument."""
    if name == "cameras":
        return list(camera_list(value))
    return float(value) if name in ("sync_deadline_s", "score_threshold") else value


def start(context: LaunchContext) -> list[Any]:
    """Return the node with the parameter file and the overrides that are not empty, and RViz."""
    given = {name: value for name in OVERRIDES if (value := argument(name, context))}
    overrides: dict[str, Any] = {name: override(name, value) for name, value in given.items()}
    overrides["use_sim_time"] = is_true("use_sim_time", context)
    params_file, respawn = argument("params_file", context), is_true("respawn", context)
    parameters = detector_parameters(params_file, camera_list(given.get("cameras", "")))
    detector = Node(
        package="ftkd_ros",
        executable="detector",
        name="detector",
        namespace=argument("namespace", context),
        output="screen",
        parameters=[params_file, overrides],
        arguments=["--ros-args", "--log-level", argument("log_level", context)],
        respawn=respawn,
        respawn_delay=2.0,
    )
    actions: list[Any] = [detector] if respawn else [detector, fail_with(detector, "detector")]
    if is_true("rviz", context):
        rviz = Node(
            package="rviz2",
            executable="rviz2",
            arguments=["-d", str(SHARE / "rviz" / "ftkd.rviz")],
            parameters=[{"use_sim_time": LaunchConfiguration("use_sim_time")}],
            remappings=rviz_remappings(parameters, argument("namespace", context)),
        )
        actions.append(rviz)
    return actions


def generate_launch_description() -> LaunchDescription:
    """Return arguments, detector and RViz."""
    overrides: dict[str, tuple[str | None, str]] = {name: ("", text) for name, text in OVERRIDES.items()}
    return LaunchDescription(
        [*declare(overrides | ARGUMENTS), use_dds_settings(), OpaqueFunction(function=start)]
    )
