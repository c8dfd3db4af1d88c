# SPDX-License-Identifier: Apache-2.0
"""Inference: preprocessing, the detector and its engines."""

from typing import Final

RUNTIMES: Final = ("auto", "fast", "plain", "onnx", "openvino")
"""Names of engines, see `detector.Detector`; defined here so that parameters can be checked without importing
torch."""
