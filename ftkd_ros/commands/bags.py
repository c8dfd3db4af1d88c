# SPDX-License-Identifier: Apache-2.0
"""`ftkd detect`, `ftkd evaluate` and `ftkd report`: from images to detections, metrics, a page."""

from pathlib import Path

import click

from ftkd_ros.commands import options


@click.command(short_help="Run the detector on a bag without ROS: every round, the same result each time.")
@click.option(
    "--bag", "bags", type=options.PATH, multiple=True, required=True, metavar="BAG",
    help="Bag with camera images; several times.",
)  # fmt: skip
@options.folder("--output", "New bag of the detections; with several bags, the folder of one bag each.")
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
@click.option("--jobs", type=click.IntRange(1), default=1, metavar="N", help="Bags at the same time.")
@options.ray_address
@click.option("--ray-gpus", type=float, default=0.0, metavar="N", help="GPUs per bag on Ray, such as 0.5.")
def detect(
    bags: tuple[Path, ...],
    output: Path,
    weights: Path | None,
    device: str,
    runtime: str,
    score_threshold: float,
    camera_model: str,
    image_geometry: str,
    image_topic: str,
    camera_info_topic: str,
    params_files: tuple[Path, ...],
    assignments: tuple[str, ...],
    start: float,
    duration: float | None,
    every: int,
    jobs: int,
    ray: str,
    ray_gpus: float,
) -> int:
    """Read camera images from a bag and write /detections and /detections/velocities to a new bag.

    Runs the code of the ROS node with its parameters but without the middleware, so no round is dropped on a
    slow machine. Options such as --device override --params-file and -p. A run that was killed is resumed by
    the same command. With several bags, finished ones are kept, and bags that fail are reported at the end.
    """
    from ftkd_ros.bag.detect import Selection, detect_bag
    from ftkd_ros.bag.detect_bags import detect_bags, summary_lines
    from ftkd_ros.bag.fleet import Workers

    parameters = options.read_node_parameters(params_files, assignments)
    selection = Selection(start_s=start, duration_s=duration, every=every)
    if len(bags) == 1 and not ray:
        summary = detect_bag(bags[0], output, parameters=parameters, selection=selection)
        print("\n".join(summary_lines(output, summary)))
    else:
        workers = Workers(jobs=jobs, ray=ray, gpus=ray_gpus)
        detect_bags(bags, output, parameters=parameters, selection=selection, workers=workers)
    return 0


@click.command(short_help="Compute the official nuScenes metrics of recorded detections.")
@click.option(
    "--detections", type=options.PATH, multiple=True, metavar="BAG",
    help="Bag with the topic /detections; several times, each with its --bag.",
)  # fmt: skip
@click.option(
    "--bag", "bags", type=options.PATH, multiple=True, metavar="BAG",
    help="Bag that the detector read its images from.",
)  # fmt: skip
@click.option("--results", type=options.PATH, metavar="FILE", help="Score a nuScenes results file.")
@click.option("--split", help="Score all key frames of a split.  [default: those of the bags, or all scenes]")
@options.dataset
@options.folder("--output", "New folder of the results.")
@click.option(
    "--summary",
    type=options.PATH,
    metavar="FILE",
    help="The detector node's summary_file (device, weights, latency), to include in the metrics.",
)
@click.option("--details", is_flag=True, help="Also score by distance, visibility and time in view.")
@click.option(
    "--require", multiple=True, metavar="EXPR",
    help="Requirement such as 'mAP>=0.35' or 'car.AP@30m>=0.4'; exit code 1 if one fails.",
)  # fmt: skip
@click.option("--criteria", type=options.PATH, metavar="FILE", help="YAML list of requirements.")
@click.option("--jobs", type=click.IntRange(1), default=1, metavar="N", help="Bags to read at the same time.")
@options.ray_address
def evaluate(
    detections: tuple[Path, ...],
    bags: tuple[Path, ...],
    results: Path | None,
    split: str | None,
    dataroot: Path,
    version: str,
    output: Path,
    summary: Path | None,
    details: bool,
    require: tuple[str, ...],
    criteria: Path | None,
    jobs: int,
    ray: str,
) -> int:
    """Score recorded detections with the official nuScenes devkit.

    Joins the detections to the key frames of the input bags by time and writes results.json and metrics.json.
    With requirements, prints a table, writes criteria.json, and returns 1 if one of them fails.
    """
    from ftkd_core.evaluation.requirements import parse_requirement, read_criteria, verdict_table
    from ftkd_ros.bag.evaluate import (
        EvaluationOptions,
        evaluate_recordings,
        evaluate_results,
        summary_lines,
    )
    from ftkd_ros.bag.fleet import Workers
    from ftkd_ros.bag.io import check_new

    check_new(output)
    requirements = [*map(parse_requirement, require), *(read_criteria(criteria) if criteria else ())]
    chosen = EvaluationOptions(split=split, details=details, requirements=requirements)
    if results is not None and (detections or bags):
        raise click.UsageError("give --detections and --bag, or --results, not both")
    if results is not None:
        metrics, verdicts = evaluate_results(
            results, dataroot=dataroot, version=version, output=output, options=chosen
        )
    elif not detections or len(detections) != len(bags):
        raise click.UsageError(
            f"{len(detections)} --detections and {len(bags)} --bag; give both equally often, or --results"
        )
    else:
        metrics, verdicts = evaluate_recordings(
            list(zip(detections, bags, strict=True)),
            dataroot=dataroot,
            version=version,
            output=output,
            summary_file=summary,
            options=chosen,
            workers=Workers(jobs=jobs, ray=ray),
        )
    print("\n".join(summary_lines(metrics)))
    if verdicts:
        print("\n".join(verdict_table(verdicts)))
    return 0 if all(verdict.passed for verdict in verdicts) else 1


@click.command(short_help="Write one HTML page with metrics and pictures.")
@click.option(
    "--results", type=options.PATH, multiple=True, required=True, metavar="DIR",
    help="Folder that `ftkd evaluate` wrote; several times to compare runs.",
)  # fmt: skip
@click.option(
    "--detections", type=options.PATH, multiple=True, required=True, metavar="BAG",
    help="Bag with the topic /detections of each run.",
)  # fmt: skip
@click.option(
    "--bag", "bags", type=options.PATH, multiple=True, required=True, metavar="BAG",
    help="Bag that the detector read its images from; one for all runs, or one per run.",
)  # fmt: skip
@click.option(
    "--output", type=options.PATH, metavar="DIR", help="Folder of the page.  [default: the first DIR]"
)
@click.option("--frames", type=int, metavar="N", help="Number of key frames to show.  [default: all]")
def report(
    results: tuple[Path, ...],
    detections: tuple[Path, ...],
    bags: tuple[Path, ...],
    output: Path | None,
    frames: int | None,
) -> int:
    """Draw key frames with detected and true boxes.

    Writes report.html (self-contained), bev.png and surround.png. With several runs, the page compares their
    metrics, curves and pictures.
    """
    from ftkd_ros.bag.report import report_runs

    sources = bags * len(results) if len(bags) == 1 else bags
    if len(detections) != len(results) or len(sources) != len(results):
        raise click.UsageError(
            f"{len(results)} --results, {len(detections)} --detections and {len(bags)} --bag; give one of "
            "each per run, or one --bag for all"
        )
    runs = list(zip(results, detections, sources, strict=True))
    print(f"wrote {report_runs(runs, output or results[0], max_frames=frames)}")
    return 0
