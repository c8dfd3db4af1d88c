# SPDX-License-Identifier: Apache-2.0
"""Options that several commands share."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click
from click.core import ParameterSource

if TYPE_CHECKING:
    from ftkd_ros.node.parameters import DetectorParameters

Function = TypeVar("Function", bound=Callable[..., Any])

PATH: Final = click.Path(path_type=Path)


def optional_size(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, int] | None:
    """Parse a size like 800x450; return (width, height) in pixels, None without one."""
    if value is None:
        return None
    try:
        width, height = (int(part) for part in value.lower().split("x"))
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a size; write it like 800x450", ctx, param) from None
    return width, height


def folder(name: str, text: str, metavar: str = "DIR") -> Callable[[Function], Function]:
    """Add a required option that names a folder."""
    return click.option(name, type=PATH, required=True, metavar=metavar, help=text)


def input_bag(function: Function) -> Function:
    """Add --bag: the bag that the detections were computed from."""
    return folder("--bag", "Bag that the detector read its images from.", "BAG")(function)


def detections_bag(function: Function) -> Function:
    """Add --detections: the bag that holds /detections."""
    return folder("--detections", "Bag with the topic /detections.", "BAG")(function)


def dataset(function: Function) -> Function:
    """Add --dataroot and --version: a data set in the nuScenes format."""
    function = click.option("--version", required=True, help="Its version, such as v1.0-mini.")(function)
    return folder("--dataroot", "Folder of the nuScenes data set.")(function)


def cameras(function: Function) -> Function:
    """Add --camera-model and --image-geometry: how the detector sees the cameras."""
    for option in (
        click.option(
            "--image-geometry",
            default="auto",
            help="rectified (images fit P), raw (K and D), or auto: by topic and D.",
        ),
        click.option(
            "--camera-model",
            default="auto",
            help="virtual (cameras as in training), as_is, or auto: virtual for cameras that differ.",
        ),
    ):
        function = option(function)
    return function


_NODE_OPTIONS: Final = (
    "weights",
    "device",
    "runtime",
    "score_threshold",
    "camera_model",
    "image_geometry",
    "image_topic",
    "camera_info_topic",
)
"""Options of a command that are parameters of the node."""


def node_parameters(function: Function) -> Function:
    """Add --params-file and -p: parameters of the detector node."""
    function = click.option(
        "-p",
        "--param",
        "assignments",
        multiple=True,
        metavar="NAME:=VALUE",
        help="Parameter of the node, such as min_cameras:=4; several times.",
    )(function)
    return click.option(
        "--params-file",
        "params_files",
        type=PATH,
        multiple=True,
        metavar="FILE",
        help="Parameters of the node, such as config/detector.yaml; several times.",
    )(function)


def read_node_parameters(files: Sequence[Path], assignments: Sequence[str]) -> "DetectorParameters":
    """Return the parameters of --params-file, then of -p, then of the other options of the command that were
    given."""
    from ftkd_core.errors import UserError
    from ftkd_core.runtime import RUNTIMES
    from ftkd_ros.node.parameter_files import read_parameters

    context = click.get_current_context()
    explicit = {
        name: str(context.params[name]) if isinstance(context.params[name], Path) else context.params[name]
        for name in _NODE_OPTIONS
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE
    }
    if explicit.get("runtime", "auto") not in RUNTIMES:
        raise UserError(f"runtime {explicit['runtime']!r}: expected one of {', '.join(RUNTIMES)}")
    return read_parameters(
        files,
        assignments,
        explicit,
        on_note=lambda text: print(f"note: {text}", file=sys.stderr),
    )


def ray_address(function: Function) -> Function:
    """Add --ray: the cluster that runs one task per scene or bag."""
    return click.option(
        "--ray", default="", metavar="ADDRESS", help="Ray cluster (auto, HOST:PORT) that runs the tasks."
    )(function)


def category_map(function: Function) -> Function:
    """Add --category-map: detection classes of a data set's own categories."""
    return click.option(
        "--category-map",
        multiple=True,
        metavar="NAME=CLASS",
        help="Detection class of a category; several times, or a JSON file.",
    )(function)


def open_dataset(dataroot: Path, version: str, entries: tuple[str, ...] = ()) -> Any:
    """Load the tables of a data set and print its notes. Imports the devkit."""
    from ftkd_core.data.nuscenes import open_dataset, parse_category_map

    dataset = open_dataset(dataroot, version, parse_category_map(entries) if entries else None)
    for note in dataset.notes:
        print(f"note: {note}", file=sys.stderr)
    return dataset


def weights_and_device(function: Function) -> Function:
    """Add --weights, --device and --runtime: the detector and the processor that runs it."""
    for option in (
        click.option(
            "--runtime",
            default="auto",
            help="Engine: openvino, onnx, fast, plain (slow reference), or auto: the fastest proven one.",
        ),
        click.option("--device", default="auto", help="auto, cpu, cuda or cuda:N."),
        click.option("--weights", type=PATH, metavar="FILE", help="Weights.  [default: the shipped ones]"),
    ):
        function = option(function)
    return function
