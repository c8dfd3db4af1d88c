# SPDX-License-Identifier: Apache-2.0
"""`make setup`: errors in one sentence, steps that are skipped or repeated; and consistent metadata."""

import importlib
import os
import re
import runpy
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).parents[1]


class Modules(NamedTuple):
    """The modules of the set-up."""

    set_up: ModuleType
    checks: ModuleType
    environment: ModuleType
    interfaces: ModuleType
    pip_runner: ModuleType


@pytest.fixture
def modules() -> Modules:
    return Modules(*(importlib.import_module(f"scripts.{name}") for name in Modules._fields))


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the files that the set-up reads, without .venv."""
    for folder in ("scripts", "requirements", "pip_ros/interfaces"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("setup.py", "setup.cfg", "Makefile"):
        shutil.copy(ROOT / file, tmp_path / file)
    return tmp_path


@pytest.fixture
def machine(modules: Modules, checkout: Path) -> Any:
    return modules.environment.Machine(root=checkout, distribution=None)


def assert_one_sentence(text: str) -> None:
    lines = text.strip().splitlines()
    assert len(lines) == 1, text
    assert lines[0].startswith("set-up: ")
    assert lines[0].endswith(".")
    assert "Traceback" not in text


def test_no_compiler_is_one_sentence_and_exit_code_2(checkout: Path, tmp_path: Path) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    environment = {"PATH": str(tools), "HOME": str(tmp_path)}
    result = subprocess.run(
        [sys._base_executable, checkout / "scripts" / "set_up.py"],  # type: ignore[attr-defined]
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 2, result.stderr
    assert_one_sentence(result.stderr)
    assert "no C compiler was found" in result.stderr
    assert not (checkout / ".venv").exists()


def test_a_c_compiler_alone_is_not_enough(
    modules: Modules, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gcc").write_text("#!/bin/sh\n")
    (tmp_path / "gcc").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(modules.checks.SetUpError, match=r"no C\+\+ compiler was found .*build-essential"):
        modules.checks.check_compilers()
    monkeypatch.setenv("CC", "none-such-cc")
    with pytest.raises(modules.checks.SetUpError, match=r"looked for CC=none-such-cc"):
        modules.checks.check_compilers()


@pytest.mark.parametrize(
    ("version", "fits"),
    [((2, 7), False), ((3, 9), False), ((3, 10), True), ((3, 11), True), ((3, 13), True), ((3, 14), False)],
)
def test_python_3_10_to_3_13_are_supported(modules: Modules, version: tuple[int, int], fits: bool) -> None:
    assert modules.set_up.fits(version) == fits


def test_an_unsupported_python_is_refused_in_one_sentence(
    modules: Modules, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(modules.set_up, "fits", lambda version: False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert modules.set_up.main() == 2
    error = capsys.readouterr().err
    assert_one_sentence(error)
    assert "install Python 3.10 to 3.13" in error


def test_another_python_on_the_path_is_used_only_if_it_runs(
    modules: Modules, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, exit_code in (("python3.12", 127), ("python3.10", 0)):
        (tmp_path / name).write_text(f"#!/bin/sh\nexit {exit_code}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert modules.set_up.find_other_python() == str(tmp_path / "python3.10")


def test_a_full_disk_is_reported_before_anything_is_written(
    modules: Modules, checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = shutil.disk_usage(checkout)._replace(free=700_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    monkeypatch.delenv("AMENT_PREFIX_PATH", raising=False)
    assert modules.environment.main(str(checkout)) == 2
    error = capsys.readouterr().err
    assert_one_sentence(error)
    assert "0.7 GB of disk free" in error
    assert not (checkout / ".venv").exists()


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        (
            ["ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device"],
            "disk filled up",
        ),
        (
            [
                "WARNING: Retrying after NewConnectionError('...')",
                "ERROR: No matching distribution found for a==1",
            ],
            "could not reach its package index",
        ),
        (
            ["Collecting a", "ERROR: No matching distribution found for a==1"],
            "pip failed: No matching distribution",
        ),
        ([], "pip failed: it printed nothing."),
    ],
)
def test_pip_failures_have_a_reason(modules: Modules, lines: list[str], sentence: str) -> None:
    assert sentence in modules.pip_runner.reason(lines)


def test_a_pip_failure_names_the_log(modules: Modules, tmp_path: Path) -> None:
    log = tmp_path / "build" / "set_up.log"
    missing = tmp_path / "none_such.txt"
    with pytest.raises(modules.checks.SetUpError, match="pip failed: .*none_such.txt") as failure:
        modules.pip_runner.PipRunner(Path(sys.executable), log).install("-r", str(missing))
    assert str(log) in str(failure.value)
    assert str(missing) in log.read_text()


def test_only_large_downloads_are_shown(modules: Modules, capsys: pytest.CaptureFixture[str]) -> None:
    modules.pip_runner.print_large_download("  Downloading torch-2.13.0-cp312-none-linux.whl (0.9 GB)\n")
    modules.pip_runner.print_large_download("  Downloading tqdm-4.0-py3-none-any.whl (70 kB)\n")
    modules.pip_runner.print_large_download("  Downloading numpy-1.26.4-cp312.whl (18.0 MB)\n")
    shown = " ".join(capsys.readouterr().out.split())
    assert shown == "set-up: downloading torch-2.13.0-cp312-none-linux.whl (0.9 GB)"


def test_compiler_and_cmake_errors_are_one_sentence(modules: Modules) -> None:
    first_error = modules.interfaces.first_error
    assert first_error("a\nb.c:3:1: error: unknown type\nmore") == "b.c:3:1: error: unknown type."
    assert first_error("CMake Error at x:1 (find_package):\n\n  No package.\n") == (
        "CMake Error at x:1 (find_package): No package."
    )
    assert first_error("killed") == "see the end of the output."


def prefix_with_rclpy(folder: Path) -> Path:
    marker = folder / "share" / "ament_index" / "resource_index" / "packages" / "rclpy"
    marker.parent.mkdir(parents=True)
    marker.touch()
    return folder


def test_a_sourced_distribution_is_found_and_prefixes_of_wheels_are_skipped(
    modules: Modules, tmp_path: Path
) -> None:
    find = modules.environment.ros_distribution
    distribution = prefix_with_rclpy(tmp_path / "opt")
    wheels = prefix_with_rclpy(tmp_path / "venv")
    (wheels / "pyvenv.cfg").touch()
    assert find({}) is None
    assert find({"AMENT_PREFIX_PATH": ""}) is None
    assert find({"AMENT_PREFIX_PATH": f"{wheels}:{tmp_path / 'workspace'}"}) is None
    assert find({"AMENT_PREFIX_PATH": f"{tmp_path / 'workspace'}:{distribution}"}) == distribution


def test_a_distribution_needs_neither_ros_wheels_nor_interfaces(modules: Modules, checkout: Path) -> None:
    machine = modules.environment.Machine(root=checkout, distribution=Path("/opt/ros/any"))
    assert [path.name for path in machine.requirement_files] == ["base.txt", "dev.txt"]
    assert list(modules.environment.step_keys(machine)) == ["environment", "requirements", "project"]


@pytest.fixture
def recorded_steps(modules: Modules, machine: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The steps that ran, in order; each is replaced by a function that appends its name."""
    ran: list[str] = []

    def recorder(name: str) -> Any:
        def step(machine: Any, progress: Any) -> None:
            ran.append(name)
            machine.python.parent.mkdir(parents=True, exist_ok=True)
            machine.python.touch()

        return step

    steps = {name: recorder(name) for name in modules.environment.STEPS}
    monkeypatch.setattr(modules.environment, "STEPS", steps)
    monkeypatch.setattr(modules.environment, "check_machine", lambda machine, steps: None)
    return ran


def test_a_second_run_does_nothing(modules: Modules, machine: Any, recorded_steps: list[str]) -> None:
    modules.environment.bring_up_to_date(machine)
    assert recorded_steps == ["environment", "requirements", "interfaces", "project"]
    modules.environment.bring_up_to_date(machine)
    assert len(recorded_steps) == 4


@pytest.mark.parametrize(
    ("changed", "repeated"),
    [
        ("requirements/base.txt", ["requirements"]),
        ("requirements/devkit.txt", ["requirements"]),
        ("requirements/ros.txt", ["requirements", "interfaces"]),
        ("pip_ros/interfaces/vision_msgs/msg/Detection3D.msg", ["interfaces"]),
        ("setup.py", ["project"]),
    ],
)
def test_a_changed_file_repeats_only_the_steps_that_depend_on_it(
    modules: Modules, machine: Any, recorded_steps: list[str], changed: str, repeated: list[str]
) -> None:
    modules.environment.bring_up_to_date(machine)
    recorded_steps.clear()
    file = machine.root / changed
    file.write_text(file.read_text() + "\n")
    modules.environment.bring_up_to_date(machine)
    assert recorded_steps == repeated


def test_a_failed_step_is_repeated_and_completed_steps_are_not(
    modules: Modules, machine: Any, recorded_steps: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(machine: Any, progress: Any) -> None:
        raise modules.checks.SetUpError("no.")

    good = modules.environment.STEPS["interfaces"]
    monkeypatch.setitem(modules.environment.STEPS, "interfaces", fail)
    with pytest.raises(modules.checks.SetUpError):
        modules.environment.bring_up_to_date(machine)
    monkeypatch.setitem(modules.environment.STEPS, "interfaces", good)
    modules.environment.bring_up_to_date(machine)
    assert recorded_steps == ["environment", "requirements", "interfaces", "project"]


@pytest.mark.parametrize("stamp", ["trunca", "[]", ""])
def test_a_damaged_stamp_recreates_the_environment(
    modules: Modules, machine: Any, recorded_steps: list[str], stamp: str
) -> None:
    modules.environment.bring_up_to_date(machine)
    recorded_steps.clear()
    machine.stamp.write_text(stamp)
    modules.environment.bring_up_to_date(machine)
    assert recorded_steps == ["environment", "requirements", "interfaces", "project"]


def test_a_copied_checkout_creates_its_own_environment(
    modules: Modules, machine: Any, recorded_steps: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    modules.environment.bring_up_to_date(machine)
    recorded_steps.clear()
    copy = tmp_path_factory.mktemp("other") / "checkout"
    shutil.copytree(machine.root, copy)
    modules.environment.bring_up_to_date(modules.environment.Machine(root=copy, distribution=None))
    assert recorded_steps[0] == "environment"


def test_every_requirement_is_pinned() -> None:
    for path in sorted((ROOT / "requirements").glob("*.txt")):
        lines = [line.partition("#")[0].strip() for line in path.read_text().splitlines()]
        unpinned = [line for line in lines if line and "==" not in line.partition(";")[0]]
        assert any(lines), f"{path.name} is empty"
        assert not unpinned, f"{path.name} has requirements without a version: {unpinned}"


def make_output(checkout: Path, target: str, *arguments: str) -> str:
    command = ["make", "--no-print-directory", "-C", str(checkout), "--dry-run", target, *arguments]
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))
    }
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


def domain_of(output: str) -> int:
    return int(output.partition("ROS_DOMAIN_ID=")[2].split()[0])


def test_demo_and_tests_use_separate_ros_domains(checkout: Path, tmp_path: Path) -> None:
    demo, test = domain_of(make_output(checkout, "demo")), domain_of(make_output(checkout, "test"))
    assert 1 <= demo <= 99
    assert test == demo + 1
    assert demo % 4 == 1, "the up to three test processes use the three domains after it"
    others = []
    for number in range(8):
        other = tmp_path / f"checkout{number}"
        other.mkdir()
        shutil.copy(checkout / "Makefile", other)
        others.append(domain_of(make_output(other, "demo")))
    assert len(set(others)) > 3, f"checkouts in different folders share the domains {others}"


def test_make_demo_passes_the_data_set_to_ftkd_demo(checkout: Path) -> None:
    plain = make_output(checkout, "demo")
    assert "ftkd_ros.cli demo" in plain
    assert "--dataroot" not in plain
    output = make_output(checkout, "demo", "DATAROOT=/some data", "VERSION=v1.0-mini", "SCENE=scene-0061")
    assert "--dataroot '/some data' --version 'v1.0-mini' --scene 'scene-0061'" in output


def setup_arguments(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The arguments that setup.py passes to setuptools."""
    arguments: dict[str, Any] = {}
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("setuptools.setup", lambda **given: arguments.update(given))
    runpy.run_path(str(ROOT / "setup.py"))
    return arguments


def test_setup_py_and_package_xml_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = setup_arguments(monkeypatch)
    manifest = ElementTree.parse(ROOT / "package.xml").getroot()
    maintainer = manifest.find("maintainer")
    assert maintainer is not None
    assert arguments["name"] == manifest.findtext("name")
    assert arguments["version"] == manifest.findtext("version")
    assert arguments["license"] == manifest.findtext("license")
    assert (arguments["maintainer"], arguments["maintainer_email"]) == (
        maintainer.text,
        maintainer.get("email"),
    )


def test_every_dependency_in_setup_py_is_pinned_in_requirements(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned = set()
    for path in (ROOT / "requirements").glob("*.txt"):
        pinned |= {line.partition("==")[0].strip().lower() for line in path.read_text().splitlines()}
    arguments = setup_arguments(monkeypatch)
    assert {"train", "evaluate", "dev"} <= set(arguments["extras_require"])
    wanted = [
        *arguments["install_requires"],
        *(name for e in arguments["extras_require"].values() for name in e),
    ]
    names = {re.split(r"[<>=; ]", requirement)[0].lower() for requirement in wanted}
    assert names <= pinned


def test_every_data_file_of_the_package_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    for folder, files in setup_arguments(monkeypatch)["data_files"]:
        assert files, f"nothing to install in {folder}"
        assert all((ROOT / file).is_file() for file in files)


def test_every_program_of_the_package_is_a_function(monkeypatch: pytest.MonkeyPatch) -> None:
    programs = setup_arguments(monkeypatch)["entry_points"]["console_scripts"]
    assert [text.partition(" = ")[0] for text in programs] == ["ftkd", "detector", "player", "recorder"]
    for text in programs:
        module, _, name = text.partition(" = ")[2].partition(":")
        assert callable(getattr(importlib.import_module(module), name))
