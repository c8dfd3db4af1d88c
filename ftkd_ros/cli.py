# SPDX-License-Identifier: Apache-2.0
"""`ftkd`: the command line for everything around the detector that is not a ROS node.

The commands are the functions in `ftkd_ros/commands/`. Each imports torch, the nuScenes devkit and ROS when
it runs, so that `ftkd --help` is fast and `ftkd convert` loads no model. Bad input is reported as one
sentence on stderr with exit code 2.
"""

import difflib
import errno
import os
import sys
from collections.abc import Sequence

import click

from ftkd_core.errors import UserError
from ftkd_ros.commands import bags, bench, data, demo, export, rig, training, weights
from ftkd_ros.commands.packages import missing_package

COMMANDS: tuple[click.Command, ...] = (
    demo.demo,
    data.synth,
    data.convert,
    rig.check_rig,
    data.check_data,
    data.export_nuscenes,
    bags.detect,
    bags.evaluate,
    bags.report,
    training.train,
    training.distill,
    training.validate,
    weights.fetch_weights,
    weights.import_weights,
    export.export,
    bench.bench,
)

_FILE_ERRORS = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EISDIR,
    errno.ENAMETOOLONG,
)  # fmt: skip
"""Errors of the operating system that the user can fix."""

_EPILOG = """A first tour:

\b
  ftkd demo                                     all steps below on synthetic data
  ftkd synth --output data/synth                a driving scene as a nuScenes data set
  ftkd convert --dataroot data/synth --version v1.0-synth --scene SCENE --output bags/input
  ftkd detect --bag bags/input --output bags/detections
  ftkd evaluate --detections bags/detections --bag bags/input \\
                --dataroot data/synth --version v1.0-synth --output results
  ftkd report --results results --detections bags/detections --bag bags/input

A command refuses an output that exists; only `ftkd demo` replaces its own folder. `ftkd COMMAND --help`
explains a command."""


class _Commands(click.Group):
    """The group of all commands: lists them in the order of the table and suggests the nearest name."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name not in self.commands:
            nearest = difflib.get_close_matches(name, self.commands, 1)
            suggestion = f"; did you mean {nearest[0]!r}?" if nearest else ""
            raise click.UsageError(f"no command {name!r}{suggestion or '; ' + _expected()}", ctx)
        return super().resolve_command(ctx, args)


@click.group(
    cls=_Commands,
    commands={str(command.name): command for command in COMMANDS},
    invoke_without_command=True,
    subcommand_metavar="COMMAND [ARGS]...",
    epilog=_EPILOG,
    context_settings={"show_default": True, "max_content_width": 110},
)
@click.version_option(package_name="ftkd_ros", prog_name="ftkd")
@click.pass_context
def app(context: click.Context) -> None:
    """Camera-only 3-D object detection on ROS 2: synthetic data, bags, replay, metrics, training."""
    if context.invoked_subcommand is None:
        raise click.UsageError(f"no COMMAND given; {_expected()}", context)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code: 0, 2 for bad input, 130 after Ctrl-C."""
    name = "ftkd"
    try:
        with app.make_context("ftkd", list(sys.argv[1:] if arguments is None else arguments)) as context:
            try:
                return int(app.invoke(context) or 0)
            finally:
                name = f"ftkd {context.invoked_subcommand}" if context.invoked_subcommand else "ftkd"
    except click.exceptions.Exit as end:  # --help and --version
        return end.exit_code
    except click.UsageError as error:
        path = error.ctx.command_path if error.ctx else name
        return _fail(path, f"{_sentence(error)}; see `{path} --help`")
    except UserError as error:
        return _fail(name, str(error))
    except ModuleNotFoundError as error:
        advice = missing_package(error)
        if advice is None:
            raise
        return _fail(name, advice)
    except KeyboardInterrupt:
        print(f"{name}: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # as in `ftkd evaluate ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.errno not in _FILE_ERRORS:
            raise
        path = error.filename or "a file"
        return _fail(name, f"{path}: {error.strerror}; check the path, its permissions and the disk")


def _fail(name: str, text: str) -> int:
    """Print one sentence on stderr; return the exit code for bad input."""
    print(f"{name}: {text}", file=sys.stderr)
    return 2


def _sentence(error: click.UsageError) -> str:
    """Return click's message on one line, without the full stop."""
    text = " ".join(error.format_message().split()).rstrip(".")
    return text[:1].lower() + text[1:]


def _expected() -> str:
    return "expected one of " + ", ".join(str(command.name) for command in COMMANDS)


if __name__ == "__main__":
    sys.exit(main())
