# SPDX-License-Identifier: Apache-2.0
"""`ftkd check-rig`: check the cameras of a vehicle before anything else."""

from pathlib import Path

import click

from ftkd_ros.commands import options


@click.command(name="check-rig", short_help="Check the cameras in a bag: times, calibration, mounting.")
@options.folder("--bag", "Bag with camera images, camera_info, /tf and /tf_static.", "BAG")
@options.folder("--output", "New folder of rig.json and rig.html.")
@click.option("--weights", type=options.PATH, metavar="FILE", help="Weights.  [default: the shipped ones]")
@click.option(
    "--table",
    type=options.PATH,
    metavar="FILE",
    help="Table of benchmarks.rigs for the expected mAP.  [default: that of the shipped weights]",
)
@click.option(
    "--image-geometry",
    default="auto",
    help="rectified (images fit P), raw (K and D), or auto: by topic and D.",
)
def check_rig(bag: Path, output: Path, weights: Path | None, table: Path | None, image_geometry: str) -> int:
    """Write one page about the cameras in a bag, with a verdict per line.

    Draws a 10 m grid on the ground into the image of each camera and compares it with the camera that the
    weights were trained with.
    """
    from ftkd_ros.bag.check_rig import PAGE_NAME, summary_lines
    from ftkd_ros.bag.check_rig import check_rig as check

    result = check(bag, output, weights=weights, image_geometry=image_geometry, table=table)
    print("\n".join(summary_lines(result)))
    print(f"{output / PAGE_NAME}: {'all checks pass' if result['ok'] else 'some checks fail'}")
    return 0
