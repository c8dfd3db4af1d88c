#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Create .venv with all packages that this repository needs; do nothing if it is up to date.

This file parses under any Python 3 (and 2.7), so that an unsupported version is reported in one sentence.
environment.py does the work, under a supported Python.
"""

import os
import subprocess
import sys

OLDEST = (3, 10)
NEWEST = (3, 13)
REPOSITORY = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def fits(version):
    """Return whether all requirements have wheels for this (major, minor) version of Python."""
    return OLDEST <= tuple(version) <= NEWEST


def find_other_python():
    """Return a supported interpreter on PATH, or None. Each is run, because it may be an empty shim."""
    for minor in range(NEWEST[1], OLDEST[1] - 1, -1):
        for folder in os.environ.get("PATH", "").split(os.pathsep):
            candidate = os.path.join(folder, "python3.%d" % minor)
            if not os.access(candidate, os.X_OK):
                continue
            with open(os.devnull, "w") as nowhere:
                code = "import sys; sys.exit(sys.version_info[:2] != (3, %d))" % minor
                if subprocess.call([candidate, "-c", code], stdout=nowhere, stderr=nowhere) == 0:
                    return candidate
    return None


def main():
    """Run environment.py, under another interpreter if this one is unsupported; return the exit code."""
    if not fits(sys.version_info[:2]):
        other = find_other_python()
        if other is None:
            found = ".".join(str(number) for number in sys.version_info[:3])
            sys.stderr.write(
                "set-up: this is Python %s; install Python %d.%d to %d.%d (with its venv and dev packages) "
                "and run the same command with PYTHON=python3.%d.\n"
                % ((found,) + OLDEST + NEWEST + (NEWEST[1] - 1,))
            )
            return 2
        os.execv(other, [other] + sys.argv)
    inside = os.path.realpath(sys.prefix) == os.path.realpath(os.path.join(REPOSITORY, ".venv"))
    if inside:  # an activated .venv cannot replace itself
        os.execv(sys._base_executable, [sys._base_executable] + sys.argv)  # type: ignore[attr-defined]
    sys.path.insert(0, REPOSITORY)
    from scripts import environment

    return environment.main(REPOSITORY)


if __name__ == "__main__":
    sys.exit(main())
