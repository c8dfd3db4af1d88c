# SPDX-License-Identifier: Apache-2.0
"""Entry points of the ROS nodes, for `ros2 run`; a missing ROS package is named in one sentence."""

import importlib
import sys

from ftkd_ros.commands.packages import missing_package
from ftkd_ros.signals import exit_quietly_on_signals


def detector() -> int:
    """Start the detector node."""
    return _run("detector", "ftkd_ros.node.detector_node")


def player() -> int:
    """Start the bag player."""
    return _run("player", "ftkd_ros.bag.player")


def recorder() -> int:
    """Start the bag recorder."""
    return _run("recorder", "ftkd_ros.bag.recorder")


def _run(name: str, module: str) -> int:
    """Import the node's module and run its `main`. Returns the exit code."""
    exit_quietly_on_signals()
    try:
        program = importlib.import_module(module)
    except ModuleNotFoundError as error:
        advice = missing_package(error)
        if advice is None:
            raise
        print(f"{name}: {advice}", file=sys.stderr)
        return 2
    return int(program.main())
