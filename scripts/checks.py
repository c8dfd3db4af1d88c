# SPDX-License-Identifier: Apache-2.0
"""What a machine must have before the set-up starts; each check raises SetUpError with one sentence."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path

GIGABYTE = 1e9
# The environment takes 2 GB with the CPU build of PyTorch, and as much again while pip unpacks.
NEEDED_GIGABYTES = 4
# The CUDA build of PyTorch, which package indexes serve by default, and its libraries.
NEEDED_GIGABYTES_CUDA = 12

C_COMPILERS = ("cc", "gcc", "clang")
CXX_COMPILERS = ("c++", "g++", "clang++")
DEBIAN_PACKAGES = "sudo apt install build-essential python3-venv python3-dev"


class SetUpError(Exception):
    """The set-up cannot go on; the text says why and what to do."""


def check_platform() -> None:
    """ROS 2 wheels exist for Linux on x86-64 alone."""
    found = f"{platform.system()} on {platform.machine()}"
    if found != "Linux on x86_64":
        raise SetUpError(
            f"ROS 2 comes as wheels for Linux on x86_64 only and this is {found}; source a ROS distribution "
            "(Humble, Jazzy or Kilted) and run the same command again."
        )


def check_compilers() -> None:
    """The message packages are compiled, as C and C++."""
    for language, variable, names in (("C", "CC", C_COMPILERS), ("C++", "CXX", CXX_COMPILERS)):
        chosen = os.environ.get(variable, "").split()[:1]
        if not any(shutil.which(name) for name in chosen or names):
            looked_for = f"{variable}={chosen[0]}" if chosen else ", ".join(names)
            raise SetUpError(
                f"no {language} compiler was found (looked for {looked_for}); install one, on Debian or "
                f"Ubuntu with `{DEBIAN_PACKAGES}`, and run the same command again."
            )


def check_python_headers() -> None:
    """The message packages have a compiled Python part."""
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.exists():
        raise SetUpError(
            f"the headers of {sys.executable} are missing ({header}); install them, on Debian or Ubuntu with "
            f"`{DEBIAN_PACKAGES}`, and run the same command again."
        )


def check_venv_module() -> None:
    """Debian splits venv off from Python."""
    if importlib.util.find_spec("venv") is None or importlib.util.find_spec("ensurepip") is None:
        raise SetUpError(
            f"{sys.executable} comes without venv; install it, on Debian or Ubuntu with `{DEBIAN_PACKAGES}`, "
            "and run the same command again."
        )


def check_disk(folder: Path) -> None:
    """The packages are large."""
    free = shutil.disk_usage(folder).free / GIGABYTE
    if free < NEEDED_GIGABYTES:
        raise SetUpError(
            f"{folder} has {free:.1f} GB of disk free; make room: at least {NEEDED_GIGABYTES} GB are needed, "
            f"{NEEDED_GIGABYTES_CUDA} GB where pip takes the CUDA build of PyTorch."
        )


def clean_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment for a child that must find its own packages.

    A Python with ROS wheels marks its children as prepared, which would keep another environment's Python
    from finding its own libraries; PYTHONHOME and __PYVENV_LAUNCHER__ redirect a virtual environment.
    """
    unwanted = {"_ROS_WHEELS_BOOTSTRAP_COMPLETE", "PYTHONHOME", "__PYVENV_LAUNCHER__"}
    return {name: value for name, value in environment.items() if name not in unwanted}
