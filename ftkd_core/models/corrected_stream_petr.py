# SPDX-License-Identifier: Apache-2.0
"""StreamPETR with three corrections of the public code.

The presets use it for training from scratch. Imported weights need the uncorrected `StreamPETR`. Symbols as
in stream_petr.py.
"""

from torch import Tensor, nn

from ftkd_core.config import DetectorConfig
from ftkd_core.models.memory import AlignedMemory, Memory, align_memory
from ftkd_core.models.position import TokenGeometry
from ftkd_core.models.stream_petr import StreamPETR
from ftkd_core.types import CameraRig, Frame


class CorrectedStreamPETR(StreamPETR):
    """StreamPETR whose spatial alignment and memory velocities are geometrically consistent."""

    def __init__(self, config: DetectorConfig) -> None:
        super().__init__(config)
        self.input_projection = nn.Linear(config.backbone.neck_channels, config.decoder.channels)

    def project_tokens(self, features: Tensor) -> Tensor:
        """Return tokens (B, L, C), projected from the width of the neck to that of the decoder."""
        tokens: Tensor = self.input_projection(super().project_tokens(features))
        return tokens

    def geometry(self, rig: CameraRig) -> TokenGeometry:
        """Return the token geometry with each token's own focal lengths and points in inverse-sigmoid
        space."""
        return self._token_geometry(rig, published_cone=False)

    def align_memory(self, memory: Memory, frame: Frame) -> AlignedMemory:
        """Return the memory in the current frame, velocities rotated into its axes."""
        return align_memory(memory, frame, self.points_in_metres(self.pseudo_points))
