# SPDX-License-Identifier: Apache-2.0
"""`ftkd fetch-weights` and `ftkd import-weights`: public checkpoints as weights of this project."""

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


@click.command(short_help="Download a public checkpoint to start from, and check it.")
@click.argument("name", required=False, metavar="[NAME]")
@click.option(
    "--folder", type=options.PATH, default=Path("build/public"), metavar="DIR", help="Where to put it."
)
@click.option("--list", "list_files", is_flag=True, help="Print names, sizes, hashes and addresses.")
@click.option("--url", default="", metavar="URL", help="Download from this address instead, e.g. a mirror.")
@click.option("--sha256", default="", metavar="HEX", help="Expect this hash instead.")
def fetch_weights(name: str | None, folder: Path, list_files: bool, url: str, sha256: str) -> int:
    """Download the public checkpoint NAME, and check its SHA-256 if one is known.

    A download that was cut resumes with the same command. Without internet, put the file into the folder
    yourself: the command prints the address and the place, and checks a file that is there. The files of
    SparseBEV are on Google Drive, which needs a browser.
    """
    from ftkd_core.weights.fetching import fetch, find_file
    from ftkd_core.weights.public_files import table

    if list_files:
        print(table())
        return 0
    if name is None:
        raise UserError("no name given; expected NAME, or --list")
    path, checked = fetch(find_file(name), folder, url, sha256)
    print(f"{path}: {checked}")
    print(f"next: ftkd import-weights {path} --output build/{name}.safetensors")
    return 0
