# SPDX-License-Identifier: Apache-2.0
"""Parameters of the detector from YAML files and `name:=value` texts, read as ROS 2 reads them; without ROS.

A file holds `/**: ros__parameters:` or `/detector: ros__parameters:`; the latter has priority. Later files
override earlier ones, and `name:=value` overrides all files (in rclpy, a section with the name of the node
would win against it).
"""

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Final

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from ftkd_core.errors import UserError
from ftkd_ros.node.parameters import DetectorParameters, typed_value

_NODES: Final = ("/**", "/detector")
"""Names of the node in files, in ascending priority, as in rclpy."""
_OF_ROS: Final = re.compile(r"use_sim_time|qos_overrides\..*|start_type_description_service")
_TRUE: Final = ("y", "Y", "yes", "Yes", "YES", "true", "True", "TRUE", "on", "On", "ON")
_FALSE: Final = ("n", "N", "no", "No", "NO", "false", "False", "FALSE", "off", "Off", "OFF")
_INTEGER: Final = re.compile(r"[+-]?(0|[1-9][0-9]*|0[xX][0-9a-fA-F]+|0[0-7]+)")
_FLOAT: Final = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_SPECIAL_FLOAT: Final = re.compile(r"([+-]?)\.?(inf|nan)", re.IGNORECASE)


def read_parameters(
    files: Sequence[Path] = (),
    assignments: Sequence[str] = (),
    overrides: Mapping[str, Any] | None = None,
    on_note: Callable[[str], None] = lambda _: None,
) -> DetectorParameters:
    """Return the parameters of files, then of `name:=value` texts, then of `overrides`.

    `on_note` gets a sentence per name in a file that the detector does not have; the node ignores such names
    too. Raises UserError for a file or text that cannot be read, an unknown name in a text, and a bad value.
    """
    values: dict[str, Any] = {}
    known = {entry.name: entry.default for entry in fields(DetectorParameters)}
    for path in files:
        for name, value in read_file(path).items():
            if name in known:
                values[name] = value
            elif not _OF_ROS.fullmatch(name):
                on_note(f"{path}: {_unknown(name, known)}; it is ignored")
    for text in assignments:
        name, value = parse_assignment(text)
        if _OF_ROS.fullmatch(name):
            continue
        if name not in known:
            raise UserError(_unknown(name, known))
        values[name] = value
    values |= overrides or {}
    typed = {name: typed_value(name, value, known[name]) for name, value in values.items()}
    return DetectorParameters(**typed)


def changed_values(parameters: DetectorParameters) -> dict[str, Any]:
    """Return the parameters that differ from their defaults, as JSON values."""
    changed = {
        entry.name: getattr(parameters, entry.name)
        for entry in fields(DetectorParameters)
        if getattr(parameters, entry.name) != entry.default
    }
    return {name: list(value) if isinstance(value, tuple) else value for name, value in changed.items()}


def read_file(path: Path) -> dict[str, Any]:
    """Return the detector's values in a ROS 2 parameter file by name."""
    try:
        root = YAML().compose(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"parameter file {str(path)!r} does not exist") from None
    except (OSError, UnicodeDecodeError, YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"parameter file {str(path)!r} cannot be read ({reason}); expected YAML") from error
    found = _sections(root)
    if not found:
        raise UserError(
            f"parameter file {str(path)!r} has no parameters of the detector; expected /** or /detector with "
            "ros__parameters below it"
        )
    values: dict[str, Any] = {}
    for name in _NODES:
        for section in found.get(name, []):
            values |= _flat(section, str(path))
    return values


def parse_assignment(text: str) -> tuple[str, Any]:
    """Return name and value of `name:=value`; the value is YAML, as on the command line of ROS 2."""
    name, separator, content = text.partition(":=")
    name = name.removeprefix("detector:").strip()
    if not separator or not name:
        raise UserError(f"parameter {text!r}; expected NAME:=VALUE, such as min_cameras:=4")
    try:
        node = YAML().compose(content)
    except YAMLError as error:
        raise UserError(
            f"parameter {text!r}: the value is not YAML ({' '.join(str(error).split())})"
        ) from None
    return name, "" if node is None else _value(node, name)


def _sections(root: Node | None) -> dict[str, list[MappingNode]]:
    """Return the parameters of the detector by node name; names may be nested as namespaces are."""
    found: dict[str, list[MappingNode]] = {}

    def visit(node: Node | None, path: str) -> None:
        if not isinstance(node, MappingNode):
            return
        for key, value in node.value:
            if key.value == "ros__parameters" and isinstance(value, MappingNode):
                found.setdefault(path or "/", []).append(value)
            else:
                visit(value, f"{path}/{str(key.value).strip('/')}")

    visit(root, "")
    return {name: sections for name, sections in found.items() if name in _NODES}


def _flat(section: MappingNode, source: str, prefix: str = "") -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, node in section.value:
        name = f"{prefix}{key.value}"
        if isinstance(node, MappingNode):
            values |= _flat(node, source, f"{name}.")
        else:
            values[name] = _value(node, name)
    return values


def _value(node: Node, name: str) -> Any:
    if isinstance(node, SequenceNode):
        return [_value(item, name) for item in node.value]
    if not isinstance(node, ScalarNode):
        raise UserError(f"parameter {name}: expected a value or a list")
    return node.value if node.style in ("'", '"') else _scalar(node.value)


def _scalar(text: str) -> Any:
    """Return a plain scalar with the type that ROS 2 gives it; in YAML 1.2, `yes` and `1e3` are texts."""
    if text in _TRUE or text in _FALSE:
        return text in _TRUE
    if _INTEGER.fullmatch(text):
        digits = text.lstrip("+-")
        base = 16 if digits[:2] in ("0x", "0X") else 8 if digits[0] == "0" and digits != "0" else 10
        return int(digits, base) * (-1 if text[0] == "-" else 1)
    if _FLOAT.fullmatch(text):
        return float(text)
    if special := _SPECIAL_FLOAT.fullmatch(text):
        return float(f"{special[1]}{special[2]}")
    return text


def _unknown(name: str, known: Mapping[str, Any]) -> str:
    nearest = difflib.get_close_matches(name, known, 1)
    advice = f"did you mean {nearest[0]!r}?" if nearest else "docs/reference/parameters.md lists them"
    return f"the detector has no parameter {name!r}; {advice}"
