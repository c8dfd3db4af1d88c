# SPDX-License-Identifier: Apache-2.0
"""`ftkd detect`, `ftkd evaluate` and `ftkd report`: from images to detections, metrics, a page."""

from pathlib import Path
from typing import Any

import click

from ftkd_ros.commands import options


@click.command(short_help="Run the detector on a bag without ROS: every round, the same result each time.")
@options.folder("--bag", "Bag with camera images.", "BAG")
@options.folder("--output", "New folder of the bag with the detections.")
@options.weights_and_device
@click.option(
    "--score-threshold", type=float, default=0.05, metavar="S", help="Drop detections that score lower."
)
@options.cameras
@click.option(
    "--image-topic",
    default="",
    help="Image topics, such as '/car/{camera}/image'; empty: the usual ones.",
)
@click.option("--camera-info-topic", default="/{camera}/camera_info", help="camera_info topics.")
@options.node_parameters
@click.option("--start", type=float, default=0.0, metavar="S", help="Seconds after the first round.")
@click.option("--duration", type=float, metavar="S", help="Seconds to process.  [default: all]")
@click.option("--every", type=int, default=1, metavar="N", help="Process every n-th round.")
@click.pass_context
def detect(context: click.Context, /, bag: Path, output: Path, **given: Any) -> int:
    """Read camera images from a bag and write /detections and /detections/velocities to a new bag.

    Runs the code of the ROS node with its parameters but without the middleware, so no round is dropped on a
    slow machine. Options such as --device override --params-file and -p. A run that was killed is resumed by
    the same command.
    """
    from ftkd_ros.bag.detect import Selection, detect_bag

    summary = detect_bag(
        bag,
        output,
        parameters=options.read_node_parameters(context, given),
        selection=Selection(start_s=given["start"], duration_s=given["duration"], every=given["every"]),
    )
    resumed = (
        f", {summary.resumed_rounds} of them from a run that was stopped" if summary.resumed_rounds else ""
    )
    print(
        f"{output}: {summary.detections} detections in {summary.rounds_detected} of "
        f"{summary.rounds_in} rounds{resumed} on {summary.device}"
    )
    for fault, count in summary.faults.items():
        print(f"note: {count} x {fault}")
    return 0


@click.command(short_help="Compute the official nuScenes metrics of recorded detections.")
@click.option("--detections", type=options.PATH, metavar="BAG", help="Bag with the topic /detections.")
@click.option("--bag", type=options.PATH, metavar="BAG", help="Bag that the detector read its images from.")
@click.option("--results", type=options.PATH, metavar="FILE", help="Score a nuScenes results file.")
@click.option("--split", help="Split that --results covers.  [default: all scenes]")
@options.dataset
@options.folder("--output", "New folder of the results.")
@click.option(
    "--summary",
    type=options.PATH,
    metavar="FILE",
    help="The detector node's summary_file (device, weights, latency), to include in the metrics.",
)
def evaluate(
    detections: Path | None,
    bag: Path | None,
    results: Path | None,
    split: str | None,
    dataroot: Path,
    version: str,
    output: Path,
    summary: Path | None,
) -> int:
    """Score recorded detections with the official nuScenes devkit.

    Joins the detections to the key frames of the input bag by time and writes results.json and metrics.json.
    """
    from ftkd_ros.bag.evaluate import evaluate_recording, evaluate_results, summary_lines
    from ftkd_ros.bag.io import check_new

    check_new(output)
    if results is not None:
        print(
            "\n".join(
                evaluate_results(results, dataroot=dataroot, version=version, split=split, output=output)
            )
        )
        return 0
    if detections is None or bag is None:
        raise click.UsageError("give --detections and --bag, or --results")
    metrics = evaluate_recording(
        detections, bag, dataroot=dataroot, version=version, output=output, summary_file=summary
    )
    print("\n".join(summary_lines(metrics)))
    return 0


@click.command(short_help="Write one HTML page with metrics and pictures.")
@options.folder("--results", "Folder that `ftkd evaluate` wrote.")
@options.detections_bag
@options.input_bag
@click.option("--frames", type=int, default=20, metavar="N", help="Number of key frames to show.")
def report(results: Path, detections: Path, bag: Path, frames: int) -> int:
    """Draw key frames with detected and true boxes.

    Writes report.html (self-contained), bev.png and surround.png next to metrics.json.
    """
    from ftkd_ros.bag.report import report_results

    print(f"wrote {report_results(results, detections, bag, max_frames=frames)}")
    return 0
