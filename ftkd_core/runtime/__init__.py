# SPDX-License-Identifier: Apache-2.0
"""From a round of camera images to detections: preprocessing and the detector."""

from typing import Final

RUNTIMES: Final = ("auto", "fast", "plain")
"""The choice of an engine, see `detector.Detector`; here, so that a parameter is checked without torch."""
