# SPDX-License-Identifier: Apache-2.0
"""Detection losses of decoder layers, denoising queries and 2-D heads.

Criteria return a dict of *weighted* terms whose sum is the loss. Source of the 3-D part: exiawsh/StreamPETR.
Symbols: B batch, N cameras, Q queries, G slots, K classes, Y layers.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ftkd_core.boxes import encode_boxes
from ftkd_core.config import DetectorConfig, SparseBEVConfig
from ftkd_core.losses.dense_head import dense_head_losses
from ftkd_core.losses.focal import sigmoid_focal_loss
from ftkd_core.losses.focal_head import focal_head_losses
from ftkd_core.losses.headings import target_heading
from ftkd_core.losses.matching import BOX_WEIGHT, CLASS_WEIGHT, CODE_WEIGHTS, match
from ftkd_core.losses.normalizer import shared_count
from ftkd_core.models.predictions import FocalMaps, Predictions
from ftkd_core.types import CameraRig, DenoisingQueries, Targets, pad_targets


class DetectionCriterion(nn.Module):
    """Compute `terms = criterion(predictions, targets, rig, denoising)`, a dict of weighted scalars."""

    code_weights: Tensor

    def __init__(self, config: DetectorConfig | SparseBEVConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("code_weights", torch.tensor(CODE_WEIGHTS), persistent=False)

    def forward(
        self,
        predictions: Predictions,
        targets: Targets,
        rig: CameraRig,
        denoising: DenoisingQueries | None = None,
    ) -> dict[str, Tensor]:
        if targets.labels.shape[1] == 0:
            targets = pad_targets(targets, 1)
        terms: dict[str, Tensor] = {}
        layers = range(len(predictions.logits))
        for layer in layers:
            logits, codes = predictions.logits[layer].float(), predictions.codes[layer].float()
            name = f"layer{layer}"
            weighted = self.config.loss.weighted_matching
            assigned = match(logits, codes, targets, part=name, weighted=weighted)
            terms |= self._layer(name, logits, codes, assigned, targets, None)
        if denoising is not None and predictions.denoising_logits is not None:
            assert predictions.denoising_codes is not None
            assigned = torch.where(denoising.positive, denoising.target, -1)
            for layer in layers:
                logits, codes = (
                    predictions.denoising_logits[layer].float(),
                    predictions.denoising_codes[layer].float(),
                )
                name = f"denoising{layer}"
                terms |= self._layer(name, logits, codes, assigned, targets, denoising.real)
        if predictions.auxiliary is not None:
            stride = self.config.backbone.auxiliary_stride
            if isinstance(predictions.auxiliary, FocalMaps):
                auxiliary = focal_head_losses(predictions.auxiliary, targets, stride)
            else:
                names = self.config.class_names
                auxiliary = dense_head_losses(predictions.auxiliary, targets, rig, stride, names)
            terms |= auxiliary
        return terms

    def _layer(
        self,
        name: str,
        logits: Tensor,
        codes: Tensor,
        assigned: Tensor,
        targets: Targets,
        real: Tensor | None,
    ) -> dict[str, Tensor]:
        """Return classification and box terms of one layer.

        logits (B, Q, K), codes (B, Q, 10), assigned (B, Q) as of `match`, real (B, Q) bool or None.
        """
        positive = assigned >= 0
        count = shared_count(positive.sum())
        index = assigned.clamp(min=0)
        labels = targets.labels.gather(1, index)
        one_hot = F.one_hot(labels, logits.shape[-1]).to(logits.dtype) * positive[..., None]
        classification = sigmoid_focal_loss(logits, one_hot)
        if real is not None:
            classification = classification * real[..., None]
        target = encode_boxes(targets.boxes.float().gather(1, index[..., None].expand(-1, -1, 9)))
        heading = target_heading(target[..., 6:8], codes.detach()[..., 6:8], labels, self.config.class_names)
        target = torch.cat([target[..., :6], heading, target[..., 8:]], dim=-1)
        known = torch.isfinite(target) & positive[..., None]  # nan: unknown velocity, no heading
        difference = (codes - torch.where(known, target, codes.detach())).abs() * self.code_weights
        return {
            f"{name}/class": CLASS_WEIGHT * classification.sum() / count,
            f"{name}/box": BOX_WEIGHT * difference.sum() / count,
        }
