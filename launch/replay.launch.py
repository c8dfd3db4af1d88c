# SPDX-License-Identifier: Apache-2.0
"""Play a bag through the detector and shut down at the end of the bag; output:=DIR records the detections.

The exit code is 1 if the bag is missing, the output exists, or a process fails.

ros2 launch ftkd_ros replay.launch.py bag:=/path/bag output:=/path/detections rviz:=true
"""

from typing import Any

from launch.actions import EmitEvent, OpaqueFunction, TimerAction
from launch.events import Shutdown
from launch.substitutions import LaunchConfiguration

from ftkd_ros.launch_parts import (
    REPLAY_ARGUMENTS,
    declare,
    detector_of_replay,
    fail_with,
    is_true,
    make_player,
    make_recorder,
    on_success,
    use_dds_settings,
)
from launch import LaunchContext, LaunchDescription

ARGUMENTS: dict[str, tuple[str | None, str]] = {
    "output": ("", "new bag folder for the detections (empty: not recorded)"),
    "loop": ("false", "play again after the end"),
    "summary_file": ("", "JSON file for counters and latency (empty: value of the parameter file)"),
}


def play(context: LaunchContext) -> list[Any]:
    """Return player and recorder; all processes shut down after the player has ended."""
    player, recorder = make_player(context, loop=is_true("loop", context)), make_recorder()
    shutdown = TimerAction(
        period=LaunchConfiguration("linger_s"),
        actions=[EmitEvent(event=Shutdown(reason="the bag has ended"))],
    )
    return [
        recorder,
        fail_with(recorder, "recorder"),
        player,
        on_success(player, "player", lambda: [shutdown]),
    ]


def generate_launch_description() -> LaunchDescription:
    """Return arguments, detector, recorder and player."""
    detector = detector_of_replay(summary_file=LaunchConfiguration("summary_file"))
    return LaunchDescription(
        [*declare(REPLAY_ARGUMENTS | ARGUMENTS), use_dds_settings(), detector, OpaqueFunction(function=play)]
    )
