# SPDX-License-Identifier: Apache-2.0
"""Play a bag of a nuScenes scene through the detector, record the detections and compute the metrics.

Writes the bag `detections`, `summary.json` and the folder `metrics` below `output`. The exit code is 1 if a
process fails.

ros2 launch ftkd_ros evaluate.launch.py bag:=/path/bag output:=/path/new dataroot:=/path version:=v1.0-mini
"""

import signal
import sys
from pathlib import Path
from typing import Any

from launch.actions import EmitEvent, ExecuteProcess, OpaqueFunction, SetLaunchConfiguration, TimerAction
from launch.events import Shutdown
from launch.events.matchers import matches_action
from launch.events.process import SignalProcess
from launch.substitutions import LaunchConfiguration

from ftkd_core.errors import UserError
from ftkd_ros.launch_parts import (
    REPLAY_ARGUMENTS,
    argument,
    declare,
    detector_of_replay,
    make_player,
    make_recorder,
    on_success,
    use_dds_settings,
)
from launch import LaunchContext, LaunchDescription

ARGUMENTS: dict[str, tuple[str | None, str]] = {
    "output": (None, "new folder of detections, summary and metrics"),
    "dataroot": (None, "folder of the nuScenes data set"),
    "version": (None, "version of the data set, such as v1.0-mini"),
}


def make_folder(context: LaunchContext) -> list[Any]:
    """Create the output folder and return the detector, which writes its summary there."""
    folder = Path(argument("output", context)).absolute()
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"launch argument output: {str(folder)!r} cannot be created: {error}") from None
    return [
        SetLaunchConfiguration("output", str(folder / "detections")),
        detector_of_replay(summary_file=str(folder / "summary.json")),
    ]


def play(context: LaunchContext) -> list[Any]:
    """Return the chain: player, end of the recorder, metrics, shutdown."""
    recording = Path(argument("output", context))
    player, recorder = make_player(context), make_recorder()
    command = [sys.executable, "-m", "ftkd_ros.cli", "evaluate", "--detections", str(recording)]
    for name in ("bag", "dataroot", "version"):
        command += [f"--{name}", argument(name, context)]
    metrics = ExecuteProcess(
        cmd=[*command, "--output", str(recording.parent / "metrics")], output="screen", name="evaluate"
    )
    stop = EmitEvent(
        event=SignalProcess(signal_number=signal.SIGINT, process_matcher=matches_action(recorder))
    )
    end = EmitEvent(event=Shutdown(reason="the metrics are written"))
    linger = TimerAction(period=LaunchConfiguration("linger_s"), actions=[stop])
    return [
        recorder,
        player,
        on_success(player, "player", lambda: [linger]),
        on_success(recorder, "recorder", lambda: [metrics]),
        on_success(metrics, "evaluation", lambda: [end]),
    ]


def generate_launch_description() -> LaunchDescription:
    """Return arguments, detector, recorder, player and evaluation."""
    return LaunchDescription(
        [
            *declare(REPLAY_ARGUMENTS | ARGUMENTS),
            use_dds_settings(),
            OpaqueFunction(function=make_folder),
            OpaqueFunction(function=play),
        ]
    )
