# SPDX-License-Identifier: Apache-2.0
"""The detector node with a stub network that takes 5 ms, in a process of its own.

    python -m benchmarks.stub_node --ros-args -p summary_file:=FILE

The stub returns one box; its x is the number of cameras of the round.
"""

import sys
import time
from typing import Any, Final

import numpy as np

from ftkd_core.classes import CAMERA_CHANNELS
from ftkd_core.types import CameraRound, ObjectList
from ftkd_ros.node import detector_node

STEP_S: Final = 0.005


class StubDetector:
    """Takes the time of a fast network and returns one car at x = number of cameras."""

    channels = CAMERA_CHANNELS
    weights_name = "stub"
    training = "none"
    device = "cpu"
    assigns_by_yaw = True

    def __init__(self) -> None:
        self.faults: dict[str, str] = {}
        self.recommended_thresholds: dict[str, float] = {}
        self.warnings: list[str] = []

    def warm_up(self) -> None:
        return None

    def reset(self) -> None:
        return None

    def step(self, camera_round: CameraRound) -> ObjectList:
        time.sleep(STEP_S)
        cameras = sum(view is not None for view in camera_round.views)
        return ObjectList(
            boxes=np.array([[cameras, 0.0, 1.0, 4.5, 1.9, 1.6, 0.0, 0.0, 0.0]]),
            scores=np.array([0.9]),
            labels=np.array([0]),
            stamp_ns=camera_round.reference_stamp_ns,
        )


class StubNode(detector_node.DetectorNode):
    """The detector node with the stub."""

    def __init__(self, **options: Any) -> None:
        super().__init__(lambda _: StubDetector(), **options)


def main() -> int:
    """Run the node as `ros2 run ftkd_ros detector` does."""
    detector_node.DetectorNode = StubNode  # type: ignore[misc,assignment]
    return detector_node.main()


if __name__ == "__main__":
    sys.exit(main())
