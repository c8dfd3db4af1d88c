# SPDX-License-Identifier: Apache-2.0
"""`ftkd demo`: all steps from data to a page with metrics, through ROS 2."""

from pathlib import Path
from typing import Any

import click

from ftkd_ros.commands import options
from ftkd_ros.commands.packages import require


@click.command(short_help="Run all steps: data, bag, ROS 2 replay through the detector, metrics, page.")
@click.option(
    "--dataroot", type=options.PATH, metavar="DIR", help="nuScenes data set.  [default: a synthetic scene]"
)
@click.option("--version", help="Version of that data set, such as v1.0-mini.")
@click.option("--scene", help="Scene of that data set.  [default: its first]")
@click.option(
    "--rig",
    default="nuscenes",
    help="Cameras of the synthetic scene, such as truck or shuttle_fisheye (see ftkd synth --help).",
)
@click.option(
    "--output",
    type=options.PATH,
    default=Path("build/demo"),
    metavar="DIR",
    help="Output folder; a folder that an earlier demo wrote is replaced.",
)
@click.option("--sweeps", is_flag=True, help="Play all images (12 Hz), not only key frames (2 Hz).")
@click.option("--rate", type=float, default=1.0, help="Speed of the replay; 1 is real time.")
@click.option("--domain-id", type=int, metavar="N", help="ROS_DOMAIN_ID.  [default: one for this run]")
@options.weights_and_device
def demo(**chosen: Any) -> int:
    """Replay a scene through the detector node in ROS 2, then write metrics and an HTML page.

    Without --dataroot a synthetic scene is rendered once and reused. ROS messages stay on this machine.
    """
    require("rclpy")
    from ftkd_ros.demo import DemoOptions, run_demo

    run_demo(DemoOptions(**chosen))
    return 0
