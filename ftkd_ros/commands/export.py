# SPDX-License-Identifier: Apache-2.0
"""`ftkd export`: a detector as ONNX files or torch.export programs."""

from pathlib import Path

import click

from ftkd_core.errors import UserError
from ftkd_ros.commands import options


@click.command(short_help="Export the detector to ONNX (TensorRT, OpenVINO, ONNX Runtime) or torch.export.")
@click.option(
    "--format",
    "target",
    default="onnx",
    type=click.Choice(["onnx", "pt2"]),
    help="pt2: torch.export.",
)
@click.option("--output", type=options.PATH, required=True, metavar="FILE", help="New .onnx or .pt2 file.")
@click.option("--weights", type=options.PATH, metavar="FILE", help="Weights.  [default: the shipped ones]")
@click.option("--preset", metavar="NAME", help="Preset with random weights, to measure its speed.")
@click.option("--max-detections", type=int, default=300, metavar="N", help="Detections per round.")
@click.option("--check/--no-check", default=True, help="Compare with the plain engine over 20 rounds.")
def export(
    target: str, output: Path, weights: Path | None, preset: str | None, max_detections: int, check: bool
) -> int:
    """Write FILE and FILE.rig: one round of the stream, and the encoding of the cameras.

    The memory is an input and an output of the first file. The second one only has to run when a calibration
    changes. Shapes are fixed; all numbers are float32, int64, bool or uint8. After writing, ONNX files pass
    ONNX's checker, and a stream of 20 rounds with ego motion must give the plain engine's detections.
    `ftkd detect` and the node run FILE.onnx if it lies next to FILE.safetensors.
    """
    from ftkd_core.evaluation import export_check
    from ftkd_core.runtime import export as exporting
    from ftkd_core.weights import SHIPPED, weights_hash

    if max_detections < 1:
        raise UserError(f"--max-detections {max_detections}: expected at least 1")
    if weights is not None and preset is not None:
        raise UserError("--weights and --preset: expected one of them; weights have their own preset")
    model = export_check.load_model(weights, preset)
    name = f"random weights of {preset}" if preset else weights_hash(weights or SHIPPED)
    write = exporting.export_onnx if target == "onnx" else exporting.export_pt2
    files = write(model, output, weights_hash=name, max_detections=max_detections)
    for file in files:
        print(f"wrote {file} ({file.stat().st_size / 1e6:.1f} MB)")
    if target == "onnx":
        print("\n".join(export_check.operator_lines(files)))
    if check:
        found = export_check.compare(model, output, target, max_detections)
        print(found.text)
        if not found.passed:
            print("the exported detector does not compute what the plain engine does; do not use it")
            return 1
    return 0
