# SPDX-License-Identifier: Apache-2.0
"""`ftkd train`, `ftkd distill` and `ftkd validate`: pass their arguments to the programs in `training/`."""

from typing import Any, Final

import click

# The programs parse their own arguments, --help included.
_PASS_THROUGH: Final[dict[str, Any]] = {
    "add_help_option": False,
    "context_settings": {"ignore_unknown_options": True, "allow_interspersed_args": False},
    "options_metavar": "[OPTIONS]",
}
_arguments = click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="")


@click.command(short_help="Train a detector on the synthetic world or on nuScenes.", **_PASS_THROUGH)
@_arguments
def train(arguments: tuple[str, ...]) -> int:
    """Train a detector, as `python -m training.train` does."""
    from training.train import main

    return main(list(arguments), prog="ftkd train")


@click.command(short_help="Train a student with a teacher (FTKD and its baselines).", **_PASS_THROUGH)
@_arguments
def distill(arguments: tuple[str, ...]) -> int:
    """Train a student with a teacher, as `python -m training.distill` does."""
    from training.distill import main

    return main(list(arguments), prog="ftkd distill")


@click.command(short_help="Compute the nuScenes metrics of weights on a split.", **_PASS_THROUGH)
@_arguments
def validate(arguments: tuple[str, ...]) -> int:
    """Score weights on a split, as `python -m training.validate` does."""
    from training.validate import main

    return main(list(arguments), prog="ftkd validate")
