# SPDX-License-Identifier: Apache-2.0
"""`ftkd import-weights`: public checkpoints as weights of this project."""

from pathlib import Path

import click

from ftkd_core.errors import UserError
from ftkd_ros.commands import options


@click.command(short_help="Convert a public checkpoint (StreamPETR, SparseBEV, ResNet) to .safetensors.")
@click.argument("file", type=options.PATH, required=False, metavar="[FILE]")
@click.option("--output", type=options.PATH, metavar="FILE", help="New .safetensors file.")
@click.option("--format", "source_format", metavar="NAME", help="Format of FILE.  [default: recognised]")
@click.option("--dry-run", is_flag=True, help="Print the planned conversion and write nothing.")
@click.option("--list-formats", is_flag=True, help="Print the supported formats.")
def import_weights(
    file: Path | None, output: Path | None, source_format: str | None, dry_run: bool, list_formats: bool
) -> int:
    """Convert a public checkpoint FILE (.pth, .pt or .safetensors) to weights of this project.

    Recognises the checkpoint, checks it against an explicit key map and writes a .safetensors file. Tensors
    that do not match are listed and the file is refused. No code in the file is executed.

    \b
    StreamPETR  for `ftkd detect --weights`, the node and training
    SparseBEV   for the same, and as a teacher in training
    ResNet      for training, as the initial backbone
    """
    from ftkd_core.weights.importing import format_lines, import_weights, plan_import

    if list_formats:
        print("\n".join(format_lines()))
        return 0
    if file is None:
        raise UserError("no checkpoint given; expected FILE, or --list-formats")
    if output is None and not dry_run:
        raise UserError("no --output given; expected a new .safetensors file, or --dry-run")
    plan = plan_import(file, source_format)
    if output is None or dry_run:
        print("\n".join(plan.lines()))
        plan.state()
        return 0
    print(f"wrote {import_weights(plan, output)} ({plan.public.name})")
    return 0
