# SPDX-License-Identifier: Apache-2.0
"""`ftkd check-rig`: check the cameras of a vehicle before anything else."""

from pathlib import Path

import click

from ftkd_ros.commands import options


@click.command(name="check-rig", short_help="Check the cameras of a vehicle or a bag: times, calibration.")
@click.option(
    "--bag",
    type=options.PATH,
    metavar="BAG",
    help="Bag with camera images, camera_info, /tf and /tf_static.  [default: record the running cameras]",
)
@click.option(
    "--seconds", type=float, default=5.0, show_default=True, help="Without --bag: how long to record."
)
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
def check_rig(
    bag: Path | None,
    seconds: float,
    output: Path,
    weights: Path | None,
    table: Path | None,
    image_geometry: str,
) -> int:
    """Write one page about the cameras of a vehicle, with a verdict per line.

    Without --bag, the running cameras are recorded to OUTPUT_bag first, which needs ROS. Draws a 10 m grid on
    the ground into the image of each camera and compares it with the camera that the weights were trained
    with.
    """
    from ftkd_ros.bag.check_rig import PAGE_NAME, summary_lines
    from ftkd_ros.bag.check_rig import check_rig as check

    if bag is None:
        from ftkd_ros.bag.io import check_new
        from ftkd_ros.bag.record_rig import record_rig

        check_new(output)
        bag = output.with_name(f"{output.name}_bag")
        print(record_rig(bag, seconds))
    result = check(bag, output, weights=weights, image_geometry=image_geometry, table=table)
    print("\n".join(summary_lines(result)))
    print(f"{output / PAGE_NAME}: {'all checks pass' if result['ok'] else 'some checks fail'}")
    return 0
