# SPDX-License-Identifier: Apache-2.0
"""Build and install the message packages in pip_ros/interfaces with the rosidl of the ROS wheels."""

from __future__ import annotations

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from scripts.checks import SetUpError, clean_environment

PACKAGES = ("vision_msgs", "tf2_msgs")


def folder(root: Path) -> Path:
    """Return the folder of the message definitions."""
    return root / "pip_ros" / "interfaces"


def build_and_install(root: Path, venv: Path, log: Path) -> None:
    """Build all packages in parallel and install them into venv; SetUpError names a package that failed."""
    build = root / "build" / "interfaces"
    shutil.rmtree(build, ignore_errors=True)
    with ThreadPoolExecutor(max_workers=len(PACKAGES)) as pool:
        outputs = list(pool.map(lambda name: build_package(name, root, venv, build / name), PACKAGES))
    with open(log, "a") as file:
        file.writelines(output for output, _ in outputs)
    for name, (output, succeeded) in zip(PACKAGES, outputs, strict=True):
        if not succeeded:
            raise SetUpError(f"{name} could not be built: {first_error(output)} The full output is in {log}.")
    shutil.rmtree(build)


def build_package(name: str, root: Path, venv: Path, build: Path) -> tuple[str, bool]:
    """Configure, compile and install one package; return the output and whether all commands succeeded."""
    environment = clean_environment(os.environ)
    environment.pop("PYTHONPATH", None)
    environment["PATH"] = f"{venv / 'bin'}{os.pathsep}{environment.get('PATH', '')}"
    environment["AMENT_PREFIX_PATH"] = environment["CMAKE_PREFIX_PATH"] = str(venv)
    cmake = str(venv / "bin" / "cmake")
    configure = [
        cmake, "-S", str(folder(root) / name), "-B", str(build), "-G", "Ninja", "-DBUILD_TESTING=OFF",
        "-DCMAKE_BUILD_TYPE=Release", f"-DCMAKE_INSTALL_PREFIX={venv}",
        f"-DCMAKE_MAKE_PROGRAM={venv / 'bin' / 'ninja'}", f"-DPython3_EXECUTABLE={venv / 'bin' / 'python'}",
    ]  # fmt: skip
    output = ""
    for command in (configure, [cmake, "--build", str(build)], [cmake, "--install", str(build)]):
        output += f"$ {' '.join(command)}\n"
        result = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        output += result.stdout
        if result.returncode:
            return output, False
    return output, True


def first_error(output: str) -> str:
    """Return the first error line of CMake or the compiler, as a sentence."""
    lines = [line.strip() for line in output.splitlines()]
    for position, line in enumerate(lines):
        if line.startswith("CMake Error"):
            detail = next((text for text in lines[position + 1 :] if text), "")
            return f"{line} {detail}".rstrip(".:") + "."
        if "error:" in line:
            return line.rstrip(".") + "."
    return "see the end of the output."
