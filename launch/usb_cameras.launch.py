# SPDX-License-Identifier: Apache-2.0
"""Example of a vehicle: six USB cameras in one process, their positions in tf, and the detector.

ros2 launch ftkd_ros usb_cameras.launch.py cameras_file:=/path/cameras.yaml
Needs the package usb_cam (or driver:=v4l2_camera) and a source of the transform odom to base_link.
"""

from pathlib import Path
from typing import Any

import yaml
from launch.actions import IncludeLaunchDescription, OpaqueFunction
from launch.launch_description_sources import PythonLaunchDescriptionSource
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import ComposableNodeContainer, Node
from launch_ros.descriptions import ComposableNode

from ftkd_core.errors import UserError
from ftkd_ros.launch_parts import SHARE, argument, declare, use_dds_settings
from ftkd_ros.launch_settings import optical_quaternion
from launch import LaunchContext, LaunchDescription

ARGUMENTS: dict[str, tuple[str | None, str]] = {
    "cameras_file": (str(SHARE / "config" / "usb_cameras.yaml"), "devices, calibration and positions"),
    "params_file": (str(SHARE / "config" / "usb_cameras_detector.yaml"), "parameter file of the detector"),
    "driver": ("usb_cam", "usb_cam or v4l2_camera"),
    "dds_settings": ("true", "use config/fastdds.xml and cyclonedds.xml, if you have no own settings"),
    "rviz": ("false", "start RViz"),
}
PLUGINS = {"usb_cam": "usb_cam::UsbCamNode", "v4l2_camera": "v4l2_camera::V4L2Camera"}


def driver_parameters(
    driver: str, name: str, camera: dict[str, Any], image: dict[str, Any]
) -> dict[str, Any]:
    """Return the parameters of one camera driver."""
    shared = {"camera_info_url": camera["calibration"]}
    if driver == "usb_cam":
        frame = {"camera_name": name, "frame_id": f"{name}_optical"}
        return shared | frame | image | {"video_device": camera["device"]}
    size = [image["image_width"], image["image_height"]]
    return shared | {
        "video_device": camera["device"],
        "image_size": size,
        "camera_frame_id": f"{name}_optical",
    }


def start(context: LaunchContext) -> list[Any]:
    """Return the container with the drivers and one static transform per camera."""
    driver = argument("driver", context)
    if driver not in PLUGINS:
        raise UserError(f"launch argument driver: {driver!r}; expected {' or '.join(PLUGINS)}")
    content = yaml.safe_load(Path(argument("cameras_file", context)).read_text(encoding="utf-8"))
    drivers, transforms = [], []
    for name, camera in content["cameras"].items():
        drivers.append(
            ComposableNode(
                package=driver,
                plugin=PLUGINS[driver],
                name="driver",
                namespace=name,
                parameters=[driver_parameters(driver, name, camera, content["image"])],
                extra_arguments=[{"use_intra_process_comms": True}],
            )
        )
        position = [str(camera[axis]) for axis in "xyz"]
        rotation = [str(part) for part in optical_quaternion(camera["yaw"], camera["pitch"])]
        transforms.append(
            Node(
                package="tf2_ros",
                executable="static_transform_publisher",
                name=f"{name}_position",
                arguments=[
                    *[text for pair in zip(("--x", "--y", "--z"), position, strict=True) for text in pair],
                    *[
                        text
                        for pair in zip(("--qx", "--qy", "--qz", "--qw"), rotation, strict=True)
                        for text in pair
                    ],
                    *["--frame-id", "base_link", "--child-frame-id", f"{name}_optical"],
                ],
            )
        )
    container = ComposableNodeContainer(
        name="cameras",
        namespace="",
        package="rclcpp_components",
        executable="component_container_mt",
        composable_node_descriptions=drivers,
        output="screen",
    )
    return [container, *transforms]


def generate_launch_description() -> LaunchDescription:
    """Return arguments, cameras, transforms and the detector."""
    detector = IncludeLaunchDescription(
        PythonLaunchDescriptionSource(str(SHARE / "launch" / "detector.launch.py")),
        launch_arguments={
            name: LaunchConfiguration(name) for name in ("params_file", "rviz", "dds_settings")
        }.items(),
    )
    return LaunchDescription(
        [*declare(ARGUMENTS), use_dds_settings(), OpaqueFunction(function=start), detector]
    )
