# SPDX-License-Identifier: Apache-2.0
"""2-D head of StreamPETR, used in training only.

Source: exiawsh/StreamPETR (`FocalHead`, after Focal-PETR, Wang et al. 2022), re-implemented. Symbols: B
batch, N cameras, K classes, C channels, H/W feature size.
"""

from typing import Final

import torch
from torch import Tensor, nn

from ftkd_core.geometry import full_precision
from ftkd_core.models.position import inverse_sigmoid
from ftkd_core.models.predictions import FocalMaps
from ftkd_core.types import CameraRig

_GROUPS: Final = 32  # of group normalisation
_PRIOR_LOGIT: Final = -4.59512  # a score of 0.01


class FocalHead(nn.Module):
    """Compute `FocalMaps` of feature maps (B, N, C, H, W); the rig of the cameras is not used."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.shared_cls, self.shared_reg = _tower(channels), _tower(channels)
        self.cls, self.centerness = (nn.Conv2d(channels, width, 1) for width in (num_classes, 1))
        self.ltrb, self.center2d = (nn.Conv2d(channels, width, 1) for width in (4, 2))
        for layer in (self.cls, self.centerness):
            nn.init.constant_(layer.bias, _PRIOR_LOGIT)  # type: ignore[arg-type]

    def forward(self, features: Tensor, _rig: CameraRig | None = None) -> FocalMaps:
        shape = features.shape[:2]
        flat = features.flatten(0, 1)
        class_features, box_features = self.shared_cls(flat), self.shared_reg(flat)
        maps = (
            self.cls(class_features), self.centerness(class_features), self.ltrb(box_features),
            self.center2d(box_features),
        )  # fmt: skip
        logits, centerness, edges, offset = (
            values.unflatten(0, shape).permute(0, 1, 3, 4, 2).float() for values in maps
        )
        return FocalMaps(logits, centerness[..., 0], *_decode_boxes(edges, offset))


@full_precision
def _decode_boxes(edges: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """Return boxes and centres in 0..1 of edge distances (B, N, H, W, 4) and centre offsets (., 2) of the
    cells, both before the sigmoid."""
    height, width = edges.shape[2:4]
    x = (torch.arange(width, device=edges.device) + 0.5) / width
    y = (torch.arange(height, device=edges.device) + 0.5) / height
    cells = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)  # (H, W, 2)
    edges = edges.sigmoid()
    boxes = torch.cat([cells - edges[..., :2], cells + edges[..., 2:]], dim=-1).clamp(0.0, 1.0)
    return boxes, (inverse_sigmoid(cells) + offset).sigmoid()


def _tower(channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=1), nn.GroupNorm(_GROUPS, channels), nn.ReLU(inplace=True)
    )
