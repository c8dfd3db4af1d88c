# SPDX-License-Identifier: Apache-2.0
"""Commands, links and pictures in Markdown files, and checks of them against the code."""

import ast
import re
import shlex
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Final, NamedTuple

from scripts import docs_sources as sources
from scripts.docs_sources import ROOT

SHELL_LANGUAGES: Final = ("", "bash", "console", "sh")
OTHER_PROGRAMS: Final = frozenset(
    [
        "cd",
        "colcon",
        "sbatch",
        "trtexec",
        "cp",
        "ray",
        "export",
        "git",
        "ls",
        "mcap",
        "pip",
        "rosdep",
        "source",
        "sudo",
        "tensorboard",
    ]
)
"""Programs that are not part of this repository; their arguments are not checked."""
_MODULE_FOLDERS: Final = ("benchmarks", "ftkd_core", "ftkd_ros", "scripts", "training")
_WRITTEN: Final = ("--out", "--output", "--json")
"""Options whose value is a file or folder that the command creates."""


class Shown(NamedTuple):
    """One command in a Markdown file."""

    file: str
    line: int
    text: str


def markdown_files() -> list[Path]:
    """Return all Markdown files of the repository, without virtual environments and build output."""
    hidden = {"build", "install", "log", "node_modules", "runs", "data"}
    found = []
    for path in sorted(ROOT.rglob("*.md")):
        parts = path.relative_to(ROOT).parts
        if not any(part in hidden or (part.startswith(".") and part != ".ci") for part in parts[:-1]):
            found.append(path)
    return found


def shown_commands(path: Path) -> Iterator[Shown]:
    """Yield the commands in the fenced blocks of a Markdown file; continued lines are joined."""
    language: str | None = None
    waiting = ""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        fence = re.match(r"\s*```(\w*)", line)
        if fence:
            language = fence[1] if language is None else None
            continue
        if language is None or language not in SHELL_LANGUAGES:
            continue
        waiting += line.strip()
        if waiting.endswith("\\"):
            waiting = waiting[:-1]
            continue
        if waiting and not waiting.startswith("#"):
            yield Shown(str(path.relative_to(ROOT)), number, waiting)
        waiting = ""


def problem(command: str) -> str | None:
    """Return an error text if a shown command contains a name that does not exist, otherwise None."""
    words = shlex.split(command, comments=True)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words.pop(0)
    if not words:
        return None
    program, rest = words[0].rpartition("/")[2], words[1:]
    wrong = _missing_path(words)
    if wrong or program in OTHER_PROGRAMS:
        return wrong
    if program == "ftkd":
        return _ftkd_problem(rest)
    if program == "make":
        return _make_problem(rest)
    if program in ("python", "python3", "torchrun"):
        return _module_problem(rest)
    if program == "ros2":
        return _ros_problem(rest)
    return f"program {program!r} is not known; add it to OTHER_PROGRAMS if it exists"


def dead_links(path: Path) -> list[str]:
    """Return the relative links and pictures of a Markdown file whose target does not exist."""
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"(?:src|href)=\"([^\"]+)\"", text)
    dead = []
    for target in targets:
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        if not file.exists() or (anchor and anchor not in _anchors(file)):
            dead.append(target)
    return dead


def _anchors(path: Path) -> set[str]:
    """Return the anchors of the headings of a Markdown file, as GitHub forms them."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def _missing_path(words: list[str]) -> str | None:
    """Return a complaint if a word names a file in a folder of the repository and the file is missing."""
    for before, word in zip(["", *words], words, strict=False):
        value = word.partition(":=")[2] or word
        first = Path(value).parts[:1]
        inside = (
            bool(first) and "/" in value and (ROOT / first[0]).is_dir() and first[0] not in ("build", "data")
        )
        if inside and before not in _WRITTEN and not value.startswith("/") and not (ROOT / value).exists():
            return f"there is no {value!r}"
    return None


def _ftkd_problem(words: list[str]) -> str | None:
    texts = sources.command_help()
    name = words[0] if words and not words[0].startswith("-") else ""
    if name not in texts:
        return f"`ftkd` has no command {name!r}"
    return _option_problem(f"ftkd {name}", texts[name], words)


def _module_problem(words: list[str]) -> str | None:
    """Check `-m MODULE OPTIONS`; arguments before `-m` belong to Python or torchrun."""
    if "-m" not in words:
        return None if words[:1] == ["-c"] else f"expected -m MODULE in {' '.join(words)!r}"
    at = words.index("-m")
    module, rest = words[at + 1], words[at + 2 :]
    if module.partition(".")[0] not in _MODULE_FOLDERS:
        return None if find_spec(module.partition(".")[0]) else f"there is no module {module!r}"
    try:
        found = find_spec(module) is not None
    except ModuleNotFoundError:
        found = False
    if not found:
        return f"there is no module {module!r}"
    for name, own in sources.NODES.items():
        if own == module:
            return _parameter_problem(name, rest)
    if module == "ftkd_ros.cli":
        return _ftkd_problem(rest)
    if module not in sources.programs():
        return f"module {module!r} is not a program"
    return _option_problem(module, sources.module_help(module), rest)


def _option_problem(name: str, help_text: str, words: list[str]) -> str | None:
    known = sources.options(help_text)
    for word, value in zip(words, [*words, ""][1:], strict=False):
        option, _, joined = word.partition("=")
        if not option.startswith("--"):
            continue
        if option not in known:
            return f"{name} has no option {option}"
        wrong = _value_problem(option, joined or value)
        if wrong:
            return wrong
    return None


def _value_problem(option: str, value: str) -> str | None:
    """Check the values that name a setting, preset, recipe or method."""
    name = value.partition("=")[0]
    known = _choices().get(option)
    return f"{option} {name}: there is none of this name" if known and name not in known else None


@cache
def _choices() -> dict[str, set[str]]:
    """Return the known values of the options that name a setting, preset, recipe or method."""
    kinds = sources.training_classes()
    return {
        "--set": {item.path for key in ("student", "teacher") for item in sources.settings(kinds[key])},
        "--set-method": {item.path for key in ("ftkd", "baseline") for item in sources.settings(kinds[key])},
        "--preset": {*sources.presets(), "init", "PRESET"},
        "--teacher-preset": set(sources.presets()),
        "--past-preset": set(sources.presets()),
        "--recipe": set(sources.recipes()),
        "--method": set(sources.methods()),
    }


def _make_problem(words: list[str]) -> str | None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    for word in words:
        name, is_variable, _ = word.partition("=")
        known = re.search(rf"^{name}\s*\??=", text, re.MULTILINE)
        if (is_variable and not known) or (not is_variable and name not in sources.make_targets()):
            return f"the Makefile has no {name!r}"
    return None


def _ros_problem(words: list[str]) -> str | None:
    if len(words) < 3 or words[0] not in ("launch", "run") or words[1] != "ftkd_ros":
        return None if words[:1] in (["bag"], ["param"], ["service"], ["topic"]) else "expected launch or run"
    name, rest = words[2], words[3:]
    if words[0] == "run":
        return _ftkd_problem(rest) if name == "ftkd" else _parameter_problem(name, rest)
    if not (ROOT / "launch" / name).is_file():
        return f"there is no launch file {name!r}"
    for word in rest:
        if word.partition(":=")[0] not in sources.launch_arguments(name):
            return f"{name} has no argument {word.partition(':=')[0]!r}"
    return None


def _parameter_problem(node: str, words: list[str]) -> str | None:
    """Check `-p NAME:=VALUE` of a node."""
    if node not in sources.executables():
        return f"ftkd_ros has no executable {node!r}"
    declared = sources.detector_parameters() if node == "detector" else sources.tool_parameters(node)
    known = {parameter.name for parameter in declared} | {"use_sim_time"}
    for word, value in pairwise(words):
        name = value.partition(":=")[0]
        if word == "-p" and name not in known and not name.startswith("qos_overrides."):
            return f"{node} has no parameter {name!r}"
    return None


def wrong_imports(text: str) -> list[str]:
    """Return the import statements of the Python blocks in Markdown text that fail."""
    wrong = []
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        for statement in ast.parse(block).body:
            if not isinstance(statement, (ast.Import, ast.ImportFrom)):
                continue
            try:
                exec(compile(ast.Module([statement], []), "<page>", "exec"), {})
            except ImportError:
                wrong.append(ast.unparse(statement))
    return wrong
