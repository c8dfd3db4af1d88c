# SPDX-License-Identifier: Apache-2.0
"""Pictures of detections: a bird's-eye view and the six camera images with projected boxes.

Predictions are solid and coloured by class. Ground truth is white: thin in camera images, dashed in the
bird's-eye view. All images are RGB uint8. Ego is base_link at the reference stamp. In the bird's-eye view,
forward points up and left points left.
"""

from ftkd_core.visualization.bird_eye import draw_bird_eye
from ftkd_core.visualization.camera_images import draw_boxes, draw_surround, moved_to
from ftkd_core.visualization.style import CLASS_COLORS

__all__ = ["CLASS_COLORS", "draw_bird_eye", "draw_boxes", "draw_surround", "moved_to"]
