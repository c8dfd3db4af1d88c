# SPDX-License-Identifier: Apache-2.0
"""Checks of the machine before the set-up starts; each raises SetUpError with one sentence."""

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
# .venv takes 2 GB with the CPU build of PyTorch, and pip needs another 2 GB to unpack the packages.
NEEDED_GIGABYTES = 4
# With the CUDA build of PyTorch, which is the default of package indexes, and its libraries.
NEEDED_GIGABYTES_CUDA = 12

C_COMPILERS = ("cc", "gcc", "clang")
CXX_COMPILERS = ("c++", "g++", "clang++")
DEBIAN_PACKAGES = "sudo apt install build-essential python3-venv python3-dev"


class SetUpError(Exception):
    """The set-up cannot continue; the message gives the reason and the remedy."""


def check_platform() -> None:
    """Raise SetUpError unless this is Linux on x86-64, the only platform with ROS 2 wheels."""
    found = f"{platform.system()} on {platform.machine()}"
    if found != "Linux on x86_64":
        raise SetUpError(
            f"ROS 2 comes as wheels for Linux on x86_64 only and this is {found}; source a ROS distribution "
            "(Humble, Jazzy or Kilted) and run the same command again."
        )


def check_compilers() -> None:
    """Raise SetUpError unless a C and a C++ compiler are found; both compile the message packages."""
    for language, variable, names in (("C", "CC", C_COMPILERS), ("C++", "CXX", CXX_COMPILERS)):
        chosen = os.environ.get(variable, "").split()[:1]
        if not any(shutil.which(name) for name in chosen or names):
            looked_for = f"{variable}={chosen[0]}" if chosen else ", ".join(names)
            raise SetUpError(
                f"no {language} compiler was found (looked for {looked_for}); install one, on Debian or "
                f"Ubuntu with `{DEBIAN_PACKAGES}`, and run the same command again."
            )


def check_python_headers() -> None:
    """Raise SetUpError unless Python.h is found; the message packages include a C extension."""
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.exists():
        raise SetUpError(
            f"the headers of {sys.executable} are missing ({header}); install them, on Debian or Ubuntu with "
            f"`{DEBIAN_PACKAGES}`, and run the same command again."
        )


def check_venv_module() -> None:
    """Raise SetUpError unless the module venv is installed; Debian packages it separately."""
    if importlib.util.find_spec("venv") is None or importlib.util.find_spec("ensurepip") is None:
        raise SetUpError(
            f"{sys.executable} has no module venv; install it, on Debian or Ubuntu with `{DEBIAN_PACKAGES}`, "
            "and run the same command again."
        )


def check_disk(folder: Path) -> None:
    """Raise SetUpError if `folder` has less free disk than the packages need."""
    free = shutil.disk_usage(folder).free / GIGABYTE
    if free < NEEDED_GIGABYTES:
        raise SetUpError(
            f"{folder} has {free:.1f} GB of disk free; make room: {NEEDED_GIGABYTES} GB are needed, or "
            f"{NEEDED_GIGABYTES_CUDA} GB if pip installs the CUDA build of PyTorch."
        )


def clean_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment variables for a child that runs another Python environment.

    A Python with ROS wheels sets _ROS_WHEELS_BOOTSTRAP_COMPLETE after it has set its library path. A child
    with its own wheels would then skip that step. PYTHONHOME and __PYVENV_LAUNCHER__ redirect a venv.
    """
    unwanted = {"_ROS_WHEELS_BOOTSTRAP_COMPLETE", "PYTHONHOME", "__PYVENV_LAUNCHER__"}
    return {name: value for name, value in environment.items() if name not in unwanted}
