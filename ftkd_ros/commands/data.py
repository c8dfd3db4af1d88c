# SPDX-License-Identifier: Apache-2.0
"""`ftkd synth` and `ftkd convert`: data sets in the nuScenes format and bags made of them."""

from pathlib import Path

import click

from ftkd_ros.commands import options


@click.command(short_help="Write synthetic driving scenes as a nuScenes data set.")
@options.folder("--output", "New folder of the data set.")
@click.option("--version", default="v1.0-synth", help="Name of the folder with the tables.")
@click.option("--split", default="held_out", help="Split that the scenes belong to.")
@click.option("--scenes", type=int, default=1, metavar="N", help="Number of scenes.")
@click.option("--first-seed", type=int, default=900_000, metavar="SEED", help="Seed of the first scene.")
@click.option("--duration", type=float, default=20.0, metavar="S", help="Seconds per scene.")
@click.option(
    "--size", callback=options.size, default="800x450", metavar="WxH", help="Width and height of the images."
)
@click.option("--world", default="ordinary", help="ordinary, or traffic: dense and moving.")
def synth(
    output: Path,
    version: str,
    split: str,
    scenes: int,
    first_seed: int,
    duration: float,
    size: tuple[int, int],
    world: str,
) -> int:
    """Render driving scenes and write them as a data set that the nuScenes devkit loads.

    A scene has six cameras at 12 Hz, lidar key frames and ground truth. The same seed gives the same scene.
    """
    from ftkd_core.data.synthetic.export import run_synth

    written = run_synth(
        output=output,
        scenes=scenes,
        first_seed=first_seed,
        version=version,
        split=split,
        width=size[0],
        height=size[1],
        duration_s=duration,
        world=world,
    )
    print(f"wrote {written}")
    return 0


@click.command(short_help="Write a nuScenes scene as a rosbag2 (MCAP) that any ROS 2 tool plays.")
@options.dataset
@click.option("--scene", required=True, help="Name of the scene, such as scene-0061.")
@options.folder("--output", "New folder of the bag.")
@click.option("--sweeps", is_flag=True, help="Write all images (12 Hz), not only key frames (2 Hz).")
def convert(dataroot: Path, version: str, scene: str, output: Path, sweeps: bool) -> int:
    """Write a nuScenes scene as a rosbag2 (MCAP). Needs no ROS.

    The bag holds the original camera JPEGs, camera_info, /tf, /tf_static, /odom, the ground truth and the
    sample token of each key frame.
    """
    from ftkd_ros.bag.convert import convert_scene

    print(convert_scene(dataroot, version, scene, output, sweeps=sweeps))
    return 0
