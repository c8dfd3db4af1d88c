# SPDX-License-Identifier: Apache-2.0
"""The documentation agrees with the code: generated pages, links, pictures and shown commands."""

import re
import subprocess
from pathlib import Path

import pytest

from scripts import docs_sources as sources
from scripts import make_docs
from scripts.docs_sources import ROOT
from tests.shown_commands import dead_links, markdown_files, problem, shown_commands, wrong_imports

PAGES = [pytest.param(path, id=str(path.relative_to(ROOT))) for path in markdown_files()]


@pytest.mark.parametrize("name", ["parameters.md", "topics.md", "commands.md", "settings.md", "recipes.md"])
def test_reference_page_is_up_to_date(name: str) -> None:
    written = (make_docs.FOLDER / name).read_text(encoding="utf-8")
    assert written == make_docs.pages()[name], f"docs/reference/{name} is out of date; run `make docs`"


def test_check_reports_an_outdated_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(make_docs, "FOLDER", tmp_path)
    assert make_docs.main([]) == 0
    assert make_docs.main(["--check"]) == 0
    page = tmp_path / "topics.md"
    page.write_text(page.read_text(encoding="utf-8") + "an edit by hand\n", encoding="utf-8")
    assert make_docs.main(["--check"]) == 1
    assert "topics.md out of date" in capsys.readouterr().out


@pytest.mark.parametrize("path", PAGES)
def test_links_and_pictures_exist(path: Path) -> None:
    assert dead_links(path) == []


@pytest.mark.parametrize("path", PAGES)
def test_shown_commands_exist(path: Path) -> None:
    wrong = [f"line {item.line}: {text}" for item in shown_commands(path) if (text := problem(item.text))]
    assert wrong == []


def test_documents_cited_in_code_exist() -> None:
    pattern = re.compile(r"\b(?:docs|research)/[\w/.-]+\.md\b")
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    cited = {
        f"{name}: {cite}"
        for name in files.splitlines()
        if name.endswith((".py", ".yaml", ".toml"))
        and name != "tests/test_docs.py"
        and (ROOT / name).is_file()
        for cite in pattern.findall((ROOT / name).read_text(encoding="utf-8"))
        if not (ROOT / cite).is_file()
    }
    assert cited == set()


@pytest.mark.parametrize(
    "command",
    [
        "ftkd detekt --bag x",
        "ftkd detect --bagg x",
        "python -m training.trains --preset tiny",
        "python -m training.train --presett tiny",
        "python -m training.train --preset tinyy",
        "python -m training.train --preset tiny --set optim.rate=1",
        "python -m training.distill --method ftkd --set-method bev=1",
        "torchrun --nproc-per-node 2 -m training.train --presett tiny",
        "python -m ftkd_core.geometry",
        "make demonstration",
        "make demo ROOT=x",
        "ros2 launch ftkd_ros detect.launch.py",
        "ros2 launch ftkd_ros detector.launch.py weight:=x",
        "ros2 run ftkd_ros play",
        "ros2 run ftkd_ros player --ros-args -p speed:=2",
        "python -m ftkd_ros.node.detector_node --ros-args -p weight:=x",
        "python -m training.validate --weights research/weights/none.safetensors",
        "nosuchprogram --help",
    ],
)
def test_a_name_that_does_not_exist_is_found(command: str) -> None:
    assert problem(command) is not None


@pytest.mark.parametrize(
    "command",
    [
        "ftkd detect --bag bags/input --output bags/detections",
        "ROS_DOMAIN_ID=1 ftkd demo --rate 0.5  # a comment",
        "python -m training.train --preset tiny --out runs/tiny --set optim.lr=1e-3",
        "torchrun --nproc-per-node 8 -m training.train --preset tiny --out runs/tiny",
        "python -m ftkd_ros.node.detector_node --ros-args -p device:=cpu",
        "make demo DATAROOT=/data VERSION=v1.0-mini SCENE=scene-0061",
        "make test ARGS='-k name'",
        "ros2 launch ftkd_ros replay.launch.py bag:=bags/input rviz:=true",
        "python -m pytest tests/test_docs.py",
    ],
)
def test_a_right_command_passes(command: str) -> None:
    assert problem(command) is None


def test_commands_are_read_from_fenced_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.shown_commands.ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text(
        "ftkd no\n```\n# a comment\nftkd synth \\\n    --output x\n```\n```python\nimport os\n```\n"
        "```bash\nmake test\n```\n"
    )
    assert [(item.line, item.text) for item in shown_commands(page)] == [
        (5, "ftkd synth --output x"),
        (11, "make test"),
    ]


def test_dead_links_and_anchors_are_found(tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text("# A heading, with `code`\n")
    page = tmp_path / "page.md"
    page.write_text(
        "# Here\n[a](other.md) [b](other.md#a-heading-with-code) [c](#here) [d](https://example.org) "
        '![e](missing.png) [f](other.md#none) <img src="missing.svg">\n'
    )
    assert dead_links(page) == ["missing.png", "other.md#none", "missing.svg"]


def test_every_command_and_program_has_help() -> None:
    assert {"synth", "convert", "detect", "evaluate", "report", "demo"} <= set(sources.command_help())
    assert all("--" in sources.module_help(module) for module in sources.programs())


def test_launch_arguments_are_found() -> None:
    assert {"bag", "output", "rviz"} <= sources.launch_arguments("replay.launch.py")
    assert {"weights", "params_file", "rviz"} <= sources.launch_arguments("detector.launch.py")


@pytest.mark.parametrize("path", PAGES)
def test_imports_in_shown_python_exist(path: Path) -> None:
    assert wrong_imports(path.read_text(encoding="utf-8")) == []


def test_a_wrong_import_is_found() -> None:
    page = (
        "```python\nimport os\nfrom ftkd_core.types import CameraRound, Sphere\nimport nosuchmodule\n"
        "from nosuchmodule.parts import a\n```\nimport outside\n```python\nfrom pathlib import Path\n```\n"
    )
    assert wrong_imports(page) == [
        "from ftkd_core.types import CameraRound, Sphere",
        "import nosuchmodule",
        "from nosuchmodule.parts import a",
    ]


def test_nodes_are_executables_with_parameters() -> None:
    assert set(sources.NODES) < sources.executables()
    assert all(sources.tool_parameters(node) for node in ("player", "recorder"))
