# SPDX-License-Identifier: Apache-2.0
"""`ftkd`: one command for everything around the detector that is not a ROS node.

Each subcommand imports what it needs when it runs, so that `ftkd --help` is instant and `ftkd convert` needs
no model. A `UserError` becomes one sentence on stderr and exit code 2.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ftkd_core.errors import UserError
from ftkd_ros import bench

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

_EPILOG = """a first tour:
  ftkd demo                                     the whole way, on synthetic data
  ftkd synth --output data/synth                a driving scene as a nuScenes data set
  ftkd convert --dataroot data/synth --version v1.0-synth --scene SCENE --output bags/input
  ftkd detect --bag bags/input --output bags/detections
  ftkd evaluate --detections bags/detections --bag bags/input \\
                --dataroot data/synth --version v1.0-synth --output results
  ftkd report --results results --detections bags/detections --bag bags/input

Nothing is ever overwritten: an output that exists is refused. `ftkd COMMAND --help` explains a command."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 0, 2 for bad input, 130 after Ctrl-C."""
    parsed = build_parser().parse_args(arguments)
    run: Callable[[argparse.Namespace], int] = parsed.run
    try:
        return run(parsed)
    except UserError as error:
        print(f"ftkd {parsed.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"ftkd {parsed.command}: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # as in `ftkd evaluate ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def build_parser() -> argparse.ArgumentParser:
    """The parser of all subcommands."""
    parser = argparse.ArgumentParser(
        prog="ftkd",
        description="Camera-only 3-D object detection on ROS 2: synthetic data, bags, replay, metrics.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (
        _add_synth, _add_convert, _add_detect, _add_evaluate, _add_report, _add_demo, _add_import_weights,
        _add_bench,
    ):  # fmt: skip
        add(commands)
    return parser


# -- synth -----------------------------------------------------------------------------------------------


def _add_synth(commands: "Commands") -> None:
    parser = _command(
        commands,
        "synth",
        _run_synth,
        "write synthetic driving scenes as a nuScenes data set",
        "Renders driving scenes (six cameras at 12 Hz, lidar key frames, ground truth) and writes them as a "
        "data set that the nuScenes devkit loads. The same seed gives the same scene.",
    )
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="new folder of the data set"
    )
    parser.add_argument("--version", default="v1.0-synth", help="folder of the tables (default %(default)s)")
    parser.add_argument(
        "--split", default="held_out", help="split that holds the scenes (default %(default)s)"
    )
    parser.add_argument("--scenes", type=int, default=1, metavar="N", help="how many (default %(default)s)")
    parser.add_argument(
        "--first-seed",
        type=int,
        default=900_000,
        metavar="SEED",
        help="of the first scene (default %(default)s)",
    )
    parser.add_argument(
        "--duration", type=float, default=20.0, metavar="S", help="seconds a scene (default 20)"
    )
    parser.add_argument(
        "--size", type=_size, default=(800, 450), metavar="WxH", help="of images (default 800x450)"
    )


def _run_synth(options: argparse.Namespace) -> int:
    from ftkd_core.data.synthetic.export import run_synth

    folder = run_synth(
        output=options.output,
        scenes=options.scenes,
        first_seed=options.first_seed,
        version=options.version,
        split=options.split,
        width=options.size[0],
        height=options.size[1],
        duration_s=options.duration,
    )
    print(f"wrote {folder}")
    return 0


# -- convert ---------------------------------------------------------------------------------------------


def _add_convert(commands: "Commands") -> None:
    parser = _command(
        commands,
        "convert",
        _run_convert,
        "write a nuScenes scene as a rosbag2 (MCAP) that any ROS 2 tool plays",
        "Writes untouched camera JPEGs, camera_info, /tf, /tf_static, /odom, ground truth and the sample "
        "token of each key frame. Needs no ROS.",
    )
    _add_dataset(parser)
    parser.add_argument("--scene", required=True, help="name of the scene, such as scene-0061")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="new folder of the bag")
    parser.add_argument(
        "--sweeps", action="store_true", help="all images (12 Hz), not only key frames (2 Hz)"
    )


def _run_convert(options: argparse.Namespace) -> int:
    from ftkd_ros.bag.convert import convert_scene

    print(
        convert_scene(options.dataroot, options.version, options.scene, options.output, sweeps=options.sweeps)
    )
    return 0


# -- detect ----------------------------------------------------------------------------------------------


def _add_detect(commands: "Commands") -> None:
    parser = _command(
        commands,
        "detect",
        _run_detect,
        "run the detector on a bag without ROS: every round, the same result each time",
        "Reads the cameras of a bag, detects, and writes /detections and /detections/velocities to a new "
        "bag. The same code as in the ROS node, without the middleware: nothing is dropped, however slow the "
        "machine.",
    )
    parser.add_argument("--bag", type=Path, required=True, metavar="BAG", help="bag with cameras (folder)")
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="new folder for the detections bag"
    )
    _add_model(parser)
    parser.add_argument(
        "--score-threshold",
        type=float,
        default=0.05,
        metavar="S",
        help="keep detections from here (default 0.05)",
    )


def _run_detect(options: argparse.Namespace) -> int:
    from ftkd_ros.bag.detect import detect_bag

    summary = detect_bag(
        options.bag,
        options.output,
        weights=options.weights,
        device=options.device,
        score_threshold=options.score_threshold,
        runtime=options.runtime,
    )
    print(
        f"{options.output}: {summary.detections} detections in {summary.rounds_detected} of "
        f"{summary.rounds_in} rounds on {summary.device}"
    )
    for fault, count in summary.faults.items():
        print(f"note: {count} x {fault}")
    return 0


# -- evaluate --------------------------------------------------------------------------------------------


def _add_evaluate(commands: "Commands") -> None:
    parser = _command(
        commands,
        "evaluate",
        _run_evaluate,
        "official nuScenes metrics of recorded detections",
        "Joins the detections of a bag to the key frames of the input bag by time, writes them as nuScenes "
        "results and scores them with the official devkit: results.json and metrics.json.",
    )
    parser.add_argument("--detections", type=Path, required=True, metavar="BAG", help="bag with /detections")
    parser.add_argument(
        "--bag", type=Path, required=True, metavar="BAG", help="the bag the detector was fed from"
    )
    _add_dataset(parser)
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="new folder for the results"
    )
    parser.add_argument(
        "--summary",
        type=Path,
        metavar="FILE",
        help="the detector node's summary_file: device, weights, latency",
    )


def _run_evaluate(options: argparse.Namespace) -> int:
    from ftkd_ros.bag.evaluate import evaluate_recording, summary_lines
    from ftkd_ros.bag.io import check_new

    check_new(options.output)
    metrics = evaluate_recording(
        options.detections,
        options.bag,
        dataroot=options.dataroot,
        version=options.version,
        output=options.output,
        summary_file=options.summary,
    )
    print("\n".join(summary_lines(metrics)))
    return 0


# -- report ----------------------------------------------------------------------------------------------


def _add_report(commands: "Commands") -> None:
    parser = _command(
        commands,
        "report",
        _run_report,
        "one HTML page with metrics and pictures",
        "Draws key frames with detected and true boxes and writes report.html (self-contained), bev.png and "
        "surround.png beside metrics.json.",
    )
    parser.add_argument(
        "--results", type=Path, required=True, metavar="DIR", help="folder `ftkd evaluate` wrote"
    )
    parser.add_argument("--detections", type=Path, required=True, metavar="BAG", help="bag with /detections")
    parser.add_argument(
        "--bag", type=Path, required=True, metavar="BAG", help="the bag the detector was fed from"
    )
    parser.add_argument("--frames", type=int, default=20, metavar="N", help="key frames to show (default 20)")


def _run_report(options: argparse.Namespace) -> int:
    from ftkd_ros.bag.pages import report_results

    print(
        f"wrote {report_results(options.results, options.detections, options.bag, max_frames=options.frames)}"
    )
    return 0


# -- demo ------------------------------------------------------------------------------------------------


def _add_demo(commands: "Commands") -> None:
    parser = _command(
        commands,
        "demo",
        _run_demo,
        "the whole way: data, bag, ROS 2 replay through the detector, metrics, page",
        "Without --dataroot a synthetic scene is rendered (once). ROS messages stay on this machine.",
    )
    parser.add_argument(
        "--dataroot", type=Path, metavar="DIR", help="nuScenes data set instead of a synthetic scene"
    )
    parser.add_argument("--version", help="version of that data set, such as v1.0-mini")
    parser.add_argument("--scene", help="scene of that data set (default: its first)")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("build/demo"),
        metavar="DIR",
        help="(default build/demo; replaced each time)",
    )
    parser.add_argument(
        "--sweeps", action="store_true", help="play all images (12 Hz), not only key frames (2 Hz)"
    )
    parser.add_argument("--rate", type=float, default=1.0, help="of the replay, 1 is real time (default 1)")
    parser.add_argument("--domain-id", type=int, metavar="N", help="ROS_DOMAIN_ID (default: one of its own)")
    _add_model(parser)


def _run_demo(options: argparse.Namespace) -> int:
    from ftkd_ros.demo import DemoOptions, run_demo

    run_demo(
        DemoOptions(
            output=options.output,
            dataroot=options.dataroot,
            version=options.version,
            scene=options.scene,
            sweeps=options.sweeps,
            rate=options.rate,
            domain_id=options.domain_id,
            weights=options.weights,
            device=options.device,
            runtime=options.runtime,
        )
    )
    return 0


# -- import-weights ----------------------------------------------------------------------------------------


def _add_import_weights(commands: "Commands") -> None:
    parser = _command(
        commands,
        "import-weights",
        _run_import_weights,
        "convert a public checkpoint (StreamPETR, SparseBEV, ResNet) to weights of ours",
        "Recognises the checkpoint, holds it against an explicit key map and writes a .safetensors file: a "
        "StreamPETR for `ftkd detect --weights`, the node or training; a SparseBEV, which `ftkd detect` does "
        "not run, as a teacher or student in training; a ResNet for a backbone to start from. Whatever does "
        "not fit is listed and refused. No code in the file is ever run.",
    )
    parser.add_argument("file", type=Path, nargs="?", metavar="FILE", help=".pth, .pt or .safetensors")
    parser.add_argument("--output", type=Path, metavar="FILE", help="new .safetensors file")
    parser.add_argument("--format", metavar="NAME", help="what it is (default: recognised)")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done; write nothing")
    parser.add_argument("--list-formats", action="store_true", help="say which formats are known")


def _run_import_weights(options: argparse.Namespace) -> int:
    from ftkd_core.weights.importing import format_lines, import_weights, plan_import

    if options.list_formats:
        print("\n".join(format_lines()))
        return 0
    if options.file is None:
        raise UserError("no checkpoint given; expected FILE, or --list-formats")
    if options.output is None and not options.dry_run:
        raise UserError("no --output given; expected a new .safetensors file, or --dry-run")
    plan = plan_import(options.file, options.format)
    if options.dry_run:
        print("\n".join(plan.lines()))
        plan.state()
        return 0
    print(f"wrote {import_weights(plan, options.output)} ({plan.public.name})")
    return 0


# -- bench -----------------------------------------------------------------------------------------------


def _add_bench(commands: "Commands") -> None:
    bench.add_arguments(_command(commands, "bench", bench.run, bench.SUMMARY, bench.DESCRIPTION))


# -- shared ----------------------------------------------------------------------------------------------


def _command(
    commands: "Commands", name: str, run: Callable[[argparse.Namespace], int], summary: str, description: str
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=summary, description=description)
    parser.set_defaults(run=run)
    return parser


def _add_dataset(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dataroot", type=Path, required=True, metavar="DIR", help="folder of the nuScenes data set"
    )
    parser.add_argument("--version", required=True, help="its version, such as v1.0-mini")


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--weights", type=Path, metavar="FILE", help="weights (default: the ones shipped)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default auto)")
    parser.add_argument(
        "--runtime",
        default="auto",
        help="fast, plain (its slower, straightforward twin), or auto: fast on a CPU, plain on a GPU "
        "(default auto)",
    )


def _size(text: str) -> tuple[int, int]:
    try:
        width, height = (int(part) for part in text.lower().split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write it like 800x450") from None
    return width, height


if __name__ == "__main__":
    sys.exit(main())
