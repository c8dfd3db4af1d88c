# SPDX-License-Identifier: Apache-2.0
"""The `ftkd` command: help, and bad input as one sentence with exit code 2."""

import importlib.util
import inspect
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from types import ModuleType

import click
import pytest
from driving_scene import SCENE, VERSION, write_drive

from ftkd_core.errors import UserError
from ftkd_ros import cli
from ftkd_ros.commands.packages import missing_package
from ftkd_ros.demo import DemoOptions

COMMANDS = ("demo", "synth", "convert", "detect", "evaluate", "report", "import-weights", "bench")
PASSED_THROUGH = ("train", "distill", "validate")


def run(*arguments: object) -> int:
    return cli.main([str(argument) for argument in arguments])


def one_sentence(capsys: pytest.CaptureFixture[str]) -> str:
    text = capsys.readouterr().err.strip()
    assert "\n" not in text
    assert "Traceback" not in text
    return text


@pytest.fixture(scope="module")
def dataroot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_drive(tmp_path_factory.mktemp("cli") / "data")


def replace_command(monkeypatch: pytest.MonkeyPatch, name: str, error: BaseException) -> None:
    """Let the command `name` raise an error."""

    def fail() -> int:
        raise error

    monkeypatch.setitem(cli.app.commands, name, click.Command(name, callback=fail))


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    text = capsys.readouterr().out
    assert all(f"\n  {command} " in text for command in (*COMMANDS, *PASSED_THROUGH))


def test_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version") == 0
    assert "0.1.0" in capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(command, "--help") == 0
    assert len(capsys.readouterr().out) > 300


@pytest.mark.parametrize("command", cli.COMMANDS, ids=lambda command: str(command.name))
def test_options_match_the_function_parameters_and_have_help(command: click.Command) -> None:
    assert command.callback is not None
    names = set(inspect.signature(command.callback).parameters)
    if command.name == "demo":  # it passes its options on as a dataclass
        names = {field.name for field in fields(DemoOptions)}
    assert {str(option.name) for option in command.params} == names
    missing = [
        option.name for option in command.params if isinstance(option, click.Option) and not option.help
    ]
    assert not missing


@pytest.mark.parametrize("command", PASSED_THROUGH)
def test_training_commands_print_the_help_of_their_program(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        run(command, "--help")
    assert end.value.code == 0
    assert "--device" in capsys.readouterr().out


@pytest.mark.parametrize("command", PASSED_THROUGH)
def test_training_commands_pass_their_arguments_unchanged(
    command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    received: list[list[str]] = []

    def main(arguments: list[str], prog: str) -> int:
        assert prog == f"ftkd {command}"
        received.append(arguments)
        return 3

    program = ModuleType(f"training.{command}")
    monkeypatch.setattr(program, "main", main, raising=False)
    monkeypatch.setitem(sys.modules, program.__name__, program)
    arguments = [
        "--set",
        "optim.lr=1e-4",
        "--out",
        "runs/a b",
        "--preset=tiny",
        "rest",
        "--",
        "--threads",
        "2",
    ]
    assert run(command, *arguments) == 3
    assert received == [arguments]


def test_help_imports_neither_torch_nor_ros() -> None:
    script = (
        "import sys\nfrom ftkd_ros.cli import main\nmain(['--help'])\n"
        "names = ('torch', 'rclpy', 'nuscenes', 'cv2', 'numpy')\n"
        "print([name for name in names if name in sys.modules], file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stderr.strip() == "[]"


def test_without_a_command_the_error_lists_all_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 2
    text = one_sentence(capsys)
    assert "COMMAND" in text
    assert all(command in text for command in (*COMMANDS, *PASSED_THROUGH))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["evalute"], "ftkd: no command 'evalute'; did you mean 'evaluate'?"),
        (["xyz"], "ftkd: no command 'xyz'; expected one of demo, synth"),
        (["convert"], "ftkd convert: missing option '--dataroot'"),
        (["report", "--frames", "x"], "ftkd report: invalid value for '--frames': 'x'"),
        (["detect", "--bags", "x"], "ftkd detect: no such option '--bags'"),
        (["bench", "--repeats"], "ftkd bench: option '--repeats' requires an argument"),
        (["synth", "extra", "--output", "x"], "ftkd synth: got unexpected extra argument (extra)"),
    ],
)
def test_usage_errors_are_one_sentence(
    arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments) == 2
    error = one_sentence(capsys)
    assert error.startswith(text)
    assert "--help`" in error


def test_user_errors_are_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    replace_command(monkeypatch, "demo", UserError("scene 'x' not found; there is scene-0061"))
    assert run("demo") == 2
    assert one_sentence(capsys) == "ftkd demo: scene 'x' not found; there is scene-0061"


def test_ctrl_c_stops_with_exit_code_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    replace_command(monkeypatch, "demo", KeyboardInterrupt())
    assert run("demo") == 130
    assert one_sentence(capsys) == "ftkd demo: stopped"


@pytest.mark.parametrize(
    ("package", "advice"),
    [
        ("lightning_fabric.strategies", "pip install '.[train]'"),
        ("tensorboard", "pip install '.[train]'"),
        ("nuscenes.eval", "pip install '.[evaluate]'"),
        ("rclpy", "source a ROS 2 distribution"),
        ("vision_msgs.msg", "source a ROS 2 distribution"),
    ],
)
def test_a_missing_optional_package_is_one_sentence_with_the_command_that_installs_it(
    package: str, advice: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    replace_command(monkeypatch, "train", ModuleNotFoundError(f"No module named {package!r}", name=package))
    assert run("train") == 2
    text = one_sentence(capsys)
    assert text.startswith(f"ftkd train: the Python package {package.partition('.')[0]!r} is not installed")
    assert advice in text


def test_other_import_errors_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    error = ModuleNotFoundError("No module named 'ftkd_core.x'", name="ftkd_core.x")
    assert missing_package(error) is None
    replace_command(monkeypatch, "detect", error)
    with pytest.raises(ModuleNotFoundError):
        run("detect")


def test_demo_without_ros_names_the_missing_package_before_it_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert run("demo", "--output", tmp_path / "demo") == 2
    assert "'rclpy' is not installed; source a ROS 2 distribution" in one_sentence(capsys)
    assert not (tmp_path / "demo").exists()


@pytest.mark.parametrize("name", ["detector", "player", "recorder"])
def test_nodes_without_ros_name_the_missing_package(name: str) -> None:
    script = (
        f"import sys\nsys.modules['rclpy'] = None\nfrom ftkd_ros import programs\nsys.exit(programs.{name}())"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == 2, result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert result.stderr.startswith(f"{name}: the Python package 'rclpy' is not installed")


def test_an_unknown_scene_is_refused_with_the_names_of_the_scenes(
    dataroot: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ("--dataroot", dataroot, "--version", VERSION)
    assert run("convert", *data, "--scene", "scene-9999", "--output", tmp_path / "bag") == 2
    assert SCENE in one_sentence(capsys)
    assert not (tmp_path / "bag").exists()


def test_an_output_folder_with_files_is_refused_and_kept(
    dataroot: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "busy").mkdir()
    (tmp_path / "busy" / "precious").write_text("data")
    data = ("--dataroot", dataroot, "--version", VERSION)
    assert run("convert", *data, "--scene", SCENE, "--output", tmp_path / "busy") == 2
    assert "busy" in one_sentence(capsys)
    assert run("synth", "--output", tmp_path / "busy") == 2
    assert "busy" in one_sentence(capsys)
    assert run("demo", *data, "--output", tmp_path / "busy") == 2
    assert "files that the demo did not write" in one_sentence(capsys)
    assert [path.name for path in (tmp_path / "busy").iterdir()] == ["precious"]


def test_detect_refuses_a_bag_that_does_not_exist(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("detect", "--bag", tmp_path / "nowhere", "--output", tmp_path / "out") == 2
    assert "nowhere" in one_sentence(capsys)


@pytest.mark.parametrize(
    ("option", "text"),
    [("--device", "device 'abacus'"), ("--runtime", "runtime 'abacus': expected one of auto, fast, plain")],
)
def test_detect_refuses_an_unknown_device_or_runtime(
    option: str, text: str, dataroot: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ("--dataroot", dataroot, "--version", VERSION)
    assert run("convert", *data, "--scene", SCENE, "--output", tmp_path / "bag") == 0
    capsys.readouterr()
    assert run("detect", "--bag", tmp_path / "bag", "--output", tmp_path / "out", option, "abacus") == 2
    assert text in one_sentence(capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("size", ["800", "axb", "800x450x3"])
def test_synth_refuses_an_invalid_size(size: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("synth", "--output", tmp_path / "out", "--size", size) == 2
    assert "800x450" in one_sentence(capsys)


def test_export_refuses_outputs_that_it_cannot_write(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    existing = tmp_path / "there.onnx"
    existing.touch()
    assert run("export", "--output", existing) == 2
    assert "exists already" in one_sentence(capsys)
    assert run("export", "--output", tmp_path / "model.bin") == 2
    assert "ends in .onnx" in one_sentence(capsys)
    assert run("export", "--output", tmp_path / "a.onnx", "--weights", existing, "--preset", "tiny") == 2
    assert "--weights and --preset" in one_sentence(capsys)
    assert run("export", "--output", tmp_path / "a.onnx", "--max-detections", 0) == 2
    assert "--max-detections 0" in one_sentence(capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["there.onnx"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_exported_detector_agrees_with_the_plain_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for target in ("onnx", "pt2"):
        assert run("export", "--format", target, "--output", tmp_path / f"tiny.{target}") == 0
        assert "against the plain engine over 20 rounds" in capsys.readouterr().out
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"tiny.onnx", "tiny.rig.onnx", "tiny.pt2", "tiny.rig.pt2"}
