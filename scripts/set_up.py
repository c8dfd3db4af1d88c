#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Creates .venv with everything that this repository needs; does nothing where that has been done.

This file parses under any Python 3 (and 2.7), so that a wrong one is told so in a sentence. The work is done
by environment.py, under a Python that fits.
"""

import os
import subprocess
import sys

OLDEST = (3, 10)
NEWEST = (3, 12)
REPOSITORY = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def fits(version):
    """Whether a (major, minor) pair is a Python that all requirements have wheels for."""
    return OLDEST <= tuple(version) <= NEWEST


def find_other_python():
    """The path of a fitting interpreter on PATH, or None. Each is run, since a name may be an empty shim."""
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
    """Hand over to environment.py, under another interpreter if this one does not fit; give its exit code."""
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
        os.execv(sys._base_executable, [sys._base_executable] + sys.argv)
    import environment

    return environment.main(REPOSITORY)


if __name__ == "__main__":
    sys.exit(main())
