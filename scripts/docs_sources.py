# SPDX-License-Identifier: Apache-2.0
"""Parameters, topics, commands and settings as the code defines them; read by make_docs.py and the tests."""

import ast
import contextlib
import dataclasses
import functools
import io
import os
import re
import runpy
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from unittest import mock

from ftkd_core.config import describe

ROOT: Final = Path(__file__).resolve().parents[1]
HELP_WIDTH: Final = 100
"""Columns of the help texts."""
NODES: Final = {
    "detector": "ftkd_ros.node.detector_node",
    "player": "ftkd_ros.bag.player",
    "recorder": "ftkd_ros.bag.recorder",
}
"""Executables that are ROS nodes, and their modules."""
_CREATES_OUTPUT: Final = ("_create", "create_publisher", "create_lifecycle_publisher", "create_service")
_SOURCE_FOLDERS: Final = ("training", "benchmarks", "scripts")


@dataclass(frozen=True)
class Parameter:
    """One parameter of a node; `default` is written as in YAML."""

    name: str
    default: str
    description: str


@dataclass(frozen=True)
class Output:
    """A topic or service that the detector node offers; `type` includes the package."""

    name: str
    type: str
    is_service: bool


@dataclass(frozen=True)
class Setting:
    """One field of a configuration class with its dotted path."""

    path: str
    type: str
    default: str
    description: str


def detector_parameters() -> list[Parameter]:
    """Return the parameters of the detector node in the order of their definition."""
    from ftkd_ros.node.parameter_tables import DESCRIPTIONS
    from ftkd_ros.node.parameters import DetectorParameters

    return [
        Parameter(field.name, _yaml(field.default), DESCRIPTIONS[field.name])
        for field in dataclasses.fields(DetectorParameters)
    ]


def tool_parameters(node: str) -> list[Parameter]:
    """Return the parameters of the player or the recorder, from the calls that declare them."""
    path = ROOT / f"{NODES[node].replace('.', '/')}.py"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = []
    for call in _calls(tree):
        name = _called(call)
        if name in ("text_parameter", "texts_parameter"):
            _, parameter, description = call.args[:3]
            found.append(Parameter(_text(parameter), "", _text(description)))
        elif name == "number_parameter":
            _, parameter, default, description = call.args[:4]
            found.append(Parameter(_text(parameter), _yaml(ast.literal_eval(default)), _text(description)))
        elif name == "declare_parameter":
            parameter, default = call.args[:2]
            found.append(
                Parameter(_text(parameter), _yaml(ast.literal_eval(default)), _descriptor_text(tree, call))
            )
    return sorted(found, key=lambda parameter: parameter.name)


def detector_outputs() -> list[Output]:
    """Return the topics and services of the detector node, from the calls that create them."""
    found = []
    for path in sorted((ROOT / "ftkd_ros" / "node").glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        packages = _message_packages(tree)
        for call in _calls(tree):
            literal = len(call.args) > 1 and isinstance(call.args[1], ast.Constant)
            if _called(call) in _CREATES_OUTPUT and literal:
                kind = ast.unparse(call.args[0])
                is_service = _called(call) == "create_service"
                found.append(Output(_text(call.args[1]), f"{packages[kind]}/{kind}", is_service))
    return found


@functools.cache
def command_help() -> dict[str, str]:
    """Return the help text of `ftkd` (under the name "") and of each of its commands."""
    from ftkd_ros.cli import main

    texts = {"": _printed(lambda: main(["--help"]))}
    listed = re.search(r"^(?: *COMMAND|Commands:) *\n((?: +\S.*\n)+)", texts[""], re.MULTILINE)
    if listed is None:
        raise RuntimeError("`ftkd --help` has no list of commands; expected a line `COMMAND` or `Commands:`")
    for name in re.findall(r"^ {2,4}([a-z][a-z0-9-]*)(?: {2,}|$)", listed[1], re.MULTILINE):
        texts[name] = _printed(lambda name=name: main([name, "--help"]))
    return texts


@functools.cache
def module_help(module: str) -> str:
    """Return what `python -m MODULE --help` prints; run in this process."""
    with mock.patch.object(sys, "argv", [module, "--help"]), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return _printed(lambda: runpy.run_module(module, run_name="__main__", alter_sys=True))


def programs() -> list[str]:
    """Return the modules outside `ftkd_ros` that are programs with options."""
    names = []
    for folder in _SOURCE_FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            text = path.read_text(encoding="utf-8")
            if "\nif __name__ ==" in text and ".parse_args(" in text:
                names.append(".".join(path.relative_to(ROOT).with_suffix("").parts))
    return names


def settings(kind: type[Any]) -> list[Setting]:
    """Return the settings of a configuration class, those of nested classes in place."""
    return [
        Setting(
            entry.path,
            entry.type,
            "required" if entry.default is dataclasses.MISSING else _yaml(entry.default),
            entry.docstring,
        )
        for entry in describe(kind)
    ]


def training_classes() -> dict[str, type[Any]]:
    """Return the configuration classes of a student's run, a teacher's run, FTKD and the baseline methods."""
    from ftkd_core.distillation.baselines import BaselineConfig
    from ftkd_core.distillation.config import FTKDConfig
    from training.config import TrainConfig, WindowTrainConfig

    return {
        "student": TrainConfig,
        "teacher": WindowTrainConfig,
        "ftkd": FTKDConfig,
        "baseline": BaselineConfig,
    }


def presets() -> dict[str, str]:
    """Return the presets and the docstring of each."""
    from ftkd_core.presets import PRESETS, SPARSE_BEV_PRESETS

    students = {name: _one_line(make.__doc__) for name, make in PRESETS.items()}
    return students | {name: _one_line(make.__doc__) for name, make in SPARSE_BEV_PRESETS.items()}


def recipe_tables() -> tuple[str, str, str]:
    """Return as Markdown the recipes, their comparison with the public code, and the public files."""
    from ftkd_core.weights.public_files import table
    from training.recipe_table import comparison
    from training.recipes import overview

    return overview(), comparison(), table()


def recipes() -> dict[str, list[str]]:
    """Return the recipes and the assignments that each makes for one process."""
    from training.recipes import RECIPES

    return {name: [f"preset={recipe.preset}", *recipe.settings(1)] for name, recipe in RECIPES.items()}


def methods() -> list[str]:
    """Return the names of the distillation methods."""
    from ftkd_core.distillation.methods import METHODS

    return list(METHODS)


def launch_arguments(name: str) -> set[str]:
    """Return the arguments of a launch file; found in its source, because `launch` has no wheel.

    They are the keys of its dictionaries, and those of REPLAY_ARGUMENTS if the file imports them.
    """
    source = (ROOT / "launch" / name).read_text(encoding="utf-8")
    shared = (ROOT / "ftkd_ros" / "launch_parts.py").read_text(encoding="utf-8")
    nodes = ast.parse(source).body + (ast.parse(shared).body if "REPLAY_ARGUMENTS" in source else [])
    return {
        _text(key)
        for node in nodes
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and isinstance(node.value, ast.Dict)
        for key in node.value.keys
        if isinstance(key, ast.Constant)
    }


def executables() -> set[str]:
    """Return the names of the console scripts of the package."""
    text = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("setup.py", "pyproject.toml"))
    return set(re.findall(r"^\s*\"?([a-z_]+) ?= ?\"?[a-z_.]+:[a-z_]+\"", text, re.MULTILINE))


def make_targets() -> set[str]:
    """Return the targets of the Makefile."""
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    return set(re.findall(r"^([a-z][a-z_-]*):", text, re.MULTILINE))


def options(help_text: str) -> set[str]:
    """Return the long options that a help text names."""
    return set(re.findall(r"(--[a-z][a-z0-9-]*)", help_text))


def _printed(run: Any) -> str:
    """Return what a call prints on stdout at a fixed width; SystemExit ends the call."""
    stream = io.StringIO()
    with (
        mock.patch.dict(os.environ, {"COLUMNS": str(HELP_WIDTH), "NO_COLOR": "1"}),
        contextlib.redirect_stdout(stream),
        contextlib.suppress(SystemExit),
    ):
        run()
    return stream.getvalue().replace(str(ROOT), ".")


def _calls(tree: ast.AST) -> Iterator[ast.Call]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call))


def _called(call: ast.Call) -> str:
    """Return the last name of the called function: `create_publisher` of `self.create_publisher(...)`."""
    return ast.unparse(call.func).rpartition(".")[2]


def _text(node: ast.AST) -> str:
    return str(ast.literal_eval(node))


def _descriptor_text(tree: ast.AST, call: ast.Call) -> str:
    """Return the description of a declare_parameter call whose descriptor is a variable."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == ast.unparse(call.args[2]):
            assert isinstance(node.value, ast.Call)
            return next(_text(item.value) for item in node.value.keywords if item.arg == "description")
    raise RuntimeError(f"line {call.lineno}: the descriptor of this parameter was not found")


def _message_packages(tree: ast.AST) -> dict[str, str]:
    """Return the ROS package of each imported message or service type."""
    return {
        name.asname or name.name: str(node.module).partition(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and str(node.module).endswith((".msg", ".srv"))
        for name in node.names
    }


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split())


def _yaml(value: Any) -> str:
    """Return a value as a user writes it in YAML or on the command line; empty for an empty text or list."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_yaml, value))}]" if value else ""
    return str(value)
