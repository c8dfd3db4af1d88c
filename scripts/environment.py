# SPDX-License-Identifier: Apache-2.0
"""Create .venv in four steps: environment, requirements, interfaces, project.

Uses only the standard library. Each step has a key, the hash of its inputs. The key of each completed step is
stored in .venv, so a second run does nothing, and a changed requirement or interface file repeats only the
steps that depend on it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from scripts import checks, interfaces
from scripts.checks import SetUpError
from scripts.pip_runner import PipRunner

STAMP_NAME = "ftkd_set_up.json"
STAND_INS_FILE = "ftkd_ros_stand_ins.pth"
# Increase this to make every checkout create .venv again.
LAYOUT = 1


@dataclass(frozen=True)
class Machine:
    """Location of the virtual environment and the ROS installation that it uses.

    `distribution` is the prefix of the sourced ROS distribution; None installs ROS as wheels.
    """

    root: Path
    distribution: Path | None

    @property
    def venv(self) -> Path:
        """Folder of the virtual environment."""
        return self.root / ".venv"

    @property
    def python(self) -> Path:
        """Interpreter of the virtual environment."""
        return self.venv / "bin" / "python"

    @property
    def stamp(self) -> Path:
        """File with the keys of the completed steps."""
        return self.venv / STAMP_NAME

    @property
    def log(self) -> Path:
        """File with the full output of pip, CMake and the compiler."""
        return self.root / "build" / "set_up.log"

    @property
    def requirement_files(self) -> list[Path]:
        """Requirement files that this machine installs."""
        names = ["base", "dev"] if self.distribution else ["base", "dev", "ros"]
        return [self.root / "requirements" / f"{name}.txt" for name in names]


def main(root: str) -> int:
    """Bring .venv up to date and return the exit code: 0, 2 if something is missing, 130 if interrupted."""
    try:
        bring_up_to_date(Machine(root=Path(root), distribution=ros_distribution(os.environ)))
    except SetUpError as error:
        print(f"set-up: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nset-up: interrupted; run the same command again to continue.", file=sys.stderr)
        return 130
    return 0


def ros_distribution(environment: Mapping[str, str]) -> Path | None:
    """Return the prefix in AMENT_PREFIX_PATH that contains rclpy, or None. Prefixes of wheels are skipped."""
    for entry in environment.get("AMENT_PREFIX_PATH", "").split(os.pathsep):
        prefix = Path(entry)
        marker = prefix / "share" / "ament_index" / "resource_index" / "packages" / "rclpy"
        if entry and marker.exists() and not (prefix / "pyvenv.cfg").exists():
            return prefix
    return None


def bring_up_to_date(machine: Machine) -> None:
    """Run the steps whose key has changed, in order; a new environment runs all of them."""
    keys = step_keys(machine)
    if read_stamp(machine) == keys:
        return
    with exclusive_lock(machine):
        done = read_stamp(machine)
        if done.get("environment") != keys["environment"]:
            done = {}
        steps = [name for name in keys if done.get(name) != keys[name]]
        if not steps:
            return
        check_machine(machine, steps)
        progress = Progress(len(steps))
        for step in steps:
            STEPS[step](machine, progress)
            done[step] = keys[step]
            machine.stamp.write_text(json.dumps(done, indent=2) + "\n")
        progress.finish()


def step_keys(machine: Machine) -> dict[str, str]:
    """Return the key of each step, in the order in which they run."""
    source = f"{LAYOUT} {sys.version_info[:2]} {machine.venv} {machine.distribution}"
    keys = {"environment": digest([], source)}
    keys["requirements"] = digest([*machine.requirement_files, machine.root / "requirements" / "devkit.txt"])
    if machine.distribution is None:
        files = sorted(path for path in interfaces.folder(machine.root).rglob("*") if path.is_file())
        keys["interfaces"] = digest([*files, machine.root / "requirements" / "ros.txt"])
    keys["project"] = digest([machine.root / "setup.py", machine.root / "setup.cfg"])
    return keys


def digest(files: list[Path], text: str = "") -> str:
    """Return the hash of a text and of the names and contents of files."""
    total = hashlib.sha256(text.encode())
    for path in files:
        total.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return total.hexdigest()


def read_stamp(machine: Machine) -> dict[str, str]:
    """Return the keys of the completed steps; empty if .venv is missing, incomplete or damaged."""
    try:
        stamp = json.loads(machine.stamp.read_text())
    except (OSError, ValueError):
        return {}
    return dict(stamp) if isinstance(stamp, dict) and machine.python.exists() else {}


@contextlib.contextmanager
def exclusive_lock(machine: Machine) -> Iterator[None]:
    """Hold the lock of this checkout, so that only one `make` command at a time writes .venv."""
    machine.log.parent.mkdir(exist_ok=True)
    with open(machine.log.parent / "set_up.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            print("set-up: waiting for another set-up of this checkout", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def check_machine(machine: Machine, steps: list[str]) -> None:
    """Raise SetUpError, before anything is written, if these steps cannot succeed."""
    if "environment" in steps:
        checks.check_venv_module()
    if "requirements" in steps:
        checks.check_disk(machine.root)
    if machine.distribution is None:
        checks.check_platform()
        if "interfaces" in steps:
            checks.check_compilers()
            checks.check_python_headers()


def make_environment(machine: Machine, progress: Progress) -> None:
    """Create .venv; an existing one is removed."""
    if machine.distribution:
        progress.begin(f"virtual environment on the ROS distribution in {machine.distribution}")
    else:
        progress.begin(f"virtual environment with Python {sys.version_info[0]}.{sys.version_info[1]}")
    if machine.venv.exists() or machine.venv.is_symlink():
        remove(machine.venv)
    command = [sys.executable, "-m", "venv", str(machine.venv)]
    if machine.distribution:
        command.append("--system-site-packages")
    result = subprocess.run(
        command, capture_output=True, text=True, check=False, env=checks.clean_environment(os.environ)
    )
    if result.returncode:
        last_line = (result.stderr.strip() or result.stdout.strip()).splitlines()[-1:]
        raise SetUpError(f"Python could not create a virtual environment: {' '.join(last_line)}")


def remove(path: Path) -> None:
    """Remove a folder; of a symbolic link, remove only the link."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path)


def install_requirements(machine: Machine, progress: Progress) -> None:
    """Install the pinned packages."""
    progress.begin("pinned packages (PyTorch is the large one)")
    pip = PipRunner(machine.python, machine.log)
    files = [argument for path in machine.requirement_files for argument in ("-r", str(path))]
    pip.install(*files)
    pip.install("--no-deps", "-r", str(machine.root / "requirements" / "devkit.txt"))


def build_interfaces(machine: Machine, progress: Progress) -> None:
    """Generate, compile and install the message packages that have no wheel."""
    progress.begin("message packages without a wheel (" + ", ".join(interfaces.PACKAGES) + ")")
    interfaces.build_and_install(machine.root, machine.venv, machine.log)


def install_project(machine: Machine, progress: Progress) -> None:
    """Install this checkout in editable mode; with ROS wheels, also add the stand-in packages to the path."""
    progress.begin("this checkout")
    pip = PipRunner(machine.python, machine.log)
    pip.install("--no-deps", "--no-build-isolation", "-e", str(machine.root))
    if machine.distribution is None:
        stand_ins = machine.root / "pip_ros" / "python"
        (site_packages(machine) / STAND_INS_FILE).write_text(f"{stand_ins}\n")
    result = subprocess.run(
        [machine.python, "-c", "import rclpy, vision_msgs.msg, tf2_msgs.msg"],
        capture_output=True, text=True, check=False, env=checks.clean_environment(os.environ),
    )  # fmt: skip
    if result.returncode:
        reason = " ".join(result.stderr.strip().splitlines()[-1:])
        if machine.distribution:
            raise SetUpError(
                f"the ROS distribution in {machine.distribution} does not load under Python "
                f"{sys.version_info[0]}.{sys.version_info[1]} ({reason}); name its own Python with "
                "PYTHON=... and check that vision_msgs and tf2_msgs are installed (rosdep install)."
            )
        raise SetUpError(
            f"the ROS packages in {machine.venv} do not load ({reason}); run `make clean setup`."
        )


def site_packages(machine: Machine) -> Path:
    """Return the folder site-packages of the environment."""
    return machine.venv / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"


@dataclass
class Progress:
    """Prints the running step and the elapsed time."""

    total: int
    number: int = 0
    started: float = field(default_factory=time.monotonic)

    def begin(self, step: str) -> None:
        """Print the number and name of the next step."""
        self.number += 1
        elapsed = time.monotonic() - self.started
        print(f"set-up: [{self.number}/{self.total}] {elapsed:4.0f} s  {step}", flush=True)

    def finish(self) -> None:
        """Print the total time."""
        print(f"set-up: done in {time.monotonic() - self.started:.0f} s", flush=True)


STEPS = {
    "environment": make_environment,
    "requirements": install_requirements,
    "interfaces": build_interfaces,
    "project": install_project,
}
