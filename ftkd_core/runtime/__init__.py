# SPDX-License-Identifier: Apache-2.0
"""From a round of camera images to detections: preprocessing and the detector."""
