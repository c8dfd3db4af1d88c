# SPDX-License-Identifier: Apache-2.0
"""The `ftkd` command: help for newcomers, and bad input as one sentence with exit code 2."""

import subprocess
import sys
from pathlib import Path

import pytest
from driving_scene import SCENE, VERSION, write_drive

from ftkd_core.errors import UserError
from ftkd_ros import cli

COMMANDS = ("synth", "convert", "detect", "evaluate", "report", "demo", "bench")


def run(*arguments: object) -> int:
    return cli.main([str(argument) for argument in arguments])


def one_sentence(capsys: pytest.CaptureFixture[str]) -> str:
    said = capsys.readouterr().err.strip()
    assert "\n" not in said
    assert "Traceback" not in said
    return said


@pytest.fixture(scope="module")
def dataroot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_drive(tmp_path_factory.mktemp("cli") / "data")


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        run("--help")
    assert end.value.code == 0
    said = capsys.readouterr().out
    assert all(f"    {command}" in said for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        run(command, "--help")
    assert end.value.code == 0
    assert len(capsys.readouterr().out) > 300


def test_help_needs_neither_torch_nor_ros() -> None:
    script = (
        "import sys\nfrom ftkd_ros.cli import build_parser\nbuild_parser().format_help()\n"
        "print([name for name in ('torch', 'rclpy', 'nuscenes', 'cv2') if name in sys.modules])"
    )
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert said.strip() == "[]"


def test_no_command_is_told_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        run()
    assert end.value.code == 2
    assert "COMMAND" in capsys.readouterr().err


def test_user_errors_become_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: object) -> int:
        raise UserError("scene 'x' not found; there is scene-0061")

    monkeypatch.setattr(cli, "_run_demo", fail)
    assert run("demo") == 2
    assert one_sentence(capsys) == "ftkd demo: scene 'x' not found; there is scene-0061"


def test_ctrl_c_ends_quietly(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_run_demo", interrupted)
    assert run("demo") == 130
    assert "stopped" in one_sentence(capsys)


def test_a_scene_that_does_not_exist_names_those_that_do(
    dataroot: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ("--dataroot", dataroot, "--version", VERSION)
    assert run("convert", *data, "--scene", "scene-9999", "--output", tmp_path / "bag") == 2
    assert SCENE in one_sentence(capsys)
    assert not (tmp_path / "bag").exists()


def test_a_busy_output_is_refused_and_kept(
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
    assert "files of others" in one_sentence(capsys)
    assert [path.name for path in (tmp_path / "busy").iterdir()] == ["precious"]


def test_a_bag_without_cameras_is_told_by_detect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("detect", "--bag", tmp_path / "nowhere", "--output", tmp_path / "out") == 2
    assert "nowhere" in one_sentence(capsys)


@pytest.mark.parametrize(
    ("option", "text"),
    [("--device", "device 'abacus'"), ("--runtime", "runtime 'abacus': expected one of auto, fast, plain")],
)
def test_a_device_or_runtime_that_is_not_there_is_named(
    option: str, text: str, dataroot: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ("--dataroot", dataroot, "--version", VERSION)
    assert run("convert", *data, "--scene", SCENE, "--output", tmp_path / "bag") == 0
    capsys.readouterr()
    assert run("detect", "--bag", tmp_path / "bag", "--output", tmp_path / "out", option, "abacus") == 2
    assert text in one_sentence(capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("size", ["800", "axb", "800x450x3"])
def test_a_size_that_is_none_is_refused(
    size: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        run("synth", "--output", tmp_path / "out", "--size", size)
    assert end.value.code == 2
    assert "800x450" in capsys.readouterr().err
