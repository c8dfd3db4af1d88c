# SPDX-License-Identifier: Apache-2.0
"""Loading of the detector, and release of its memory."""

import gc
import sys
from collections.abc import Callable, Sequence
from typing import Any

from ftkd_core.errors import UserError
from ftkd_ros.node.parameters import DetectorParameters

DetectorFactory = Callable[[DetectorParameters], Any]


def load_detector(parameters: DetectorParameters) -> Any:
    """Load the detector of the node and log its engine."""
    from rclpy.logging import get_logger

    detector = make_detector(parameters)
    get_logger("detector").info(f"engine {detector.runtime}: {detector.runtime_reason}")
    return detector


def make_detector(parameters: DetectorParameters) -> Any:
    """Load the detector that the parameters select, without ROS.

    torch is imported here, so that bad parameters are reported without waiting for the import. The detector
    returns all scores, because the thresholds of the node can be changed at run time.
    """
    from ftkd_core.runtime.detector import Detector

    return Detector.from_weights(
        parameters.weights or None,
        preset=parameters.preset or None,
        device=parameters.device,
        runtime=parameters.runtime,
        score_threshold=0.0,
        max_detections=parameters.max_detections,
        camera_model=parameters.camera_model,
    )


def check_cameras(cameras: Sequence[str], channels: Sequence[str]) -> None:
    """Raise UserError if there are more cameras than the weights have channels."""
    if len(cameras) > len(channels):
        extra = cameras[len(channels) :]
        raise UserError(
            f"parameter cameras: {len(cameras)} cameras; expected at most {len(channels)}, the number of "
            f"cameras of the weights; remove {', '.join(extra)} or use weights for more cameras"
        )


def free_memory() -> None:
    """Give the memory of dropped detectors back, on a GPU too."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
