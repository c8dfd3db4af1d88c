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
from ftkd_core.losses.linking import linking_losses
from ftkd_core.losses.matching import BOX_WEIGHT, CLASS_WEIGHT, CODE_WEIGHTS, match, matching_weights
from ftkd_core.losses.normalizer import shared_count
from ftkd_core.models.predictions import FocalMaps, Predictions
from ftkd_core.noise_scale import noise_scale
from ftkd_core.types import CameraRig, DenoisingQueries, Targets, pad_targets


class DetectionCriterion(nn.Module):
    """Compute `terms = criterion(predictions, targets, rig, denoising)`, a dict of weighted scalars."""

    code_weights: Tensor

    def __init__(self, config: DetectorConfig | SparseBEVConfig) -> None:
        super().__init__()
        self.config, self.published = config, config.decoder.as_published
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
            weights = matching_weights(self.config)
            assigned = match(logits, codes, targets, part=name, code_weights=weights)
            terms |= self._layer(name, logits, codes, assigned, targets)
        if denoising is not None and predictions.denoising_logits is not None:
            assert predictions.denoising_codes is not None
            for layer in layers:
                terms |= self._denoising_layer(
                    f"denoising{layer}", predictions.denoising_logits[layer].float(),
                    predictions.denoising_codes[layer].float(), targets, denoising,
                )  # fmt: skip
        if predictions.auxiliary is not None:
            stride = self.config.backbone.auxiliary_stride
            if isinstance(predictions.auxiliary, FocalMaps):
                auxiliary = focal_head_losses(predictions.auxiliary, targets, stride)
            else:
                names = self.config.class_names
                auxiliary = dense_head_losses(predictions.auxiliary, targets, rig, stride, names)
            terms |= auxiliary
        if predictions.linked is not None:
            terms |= linking_losses(predictions.linked, targets)
        return terms

    def _denoising_layer(
        self, name: str, logits: Tensor, codes: Tensor, targets: Targets, denoising: DenoisingQueries
    ) -> dict[str, Tensor]:
        """Return the terms of the denoising queries of one layer.

        As published, boxes of negatives are trained too, and the class term is divided by the expected number
        of positives. Otherwise only positives have boxes and both terms are divided by their number [ours].
        """
        positive = torch.where(denoising.positive, denoising.target, -1)
        if not self.published:
            return self._layer(name, logits, codes, positive, targets, real=denoising.real)
        real = torch.where(denoising.real, denoising.target, -1)
        share = noise_scale(self.config).positive_share
        return self._layer(
            name, logits, codes, positive, targets, real=denoising.real, boxes=real,
            class_count=shared_count(denoising.real.sum() * share),
        )  # fmt: skip

    def _layer(
        self, name: str, logits: Tensor, codes: Tensor, assigned: Tensor, targets: Targets, *,
        real: Tensor | None = None, boxes: Tensor | None = None,
        class_count: Tensor | None = None,
    ) -> dict[str, Tensor]:  # fmt: skip
        """Return classification and box terms of one layer.

        logits (B, Q, K), codes (B, Q, 10), assigned (B, Q) as of `match`, real (B, Q) bool or None; boxes
        (B, Q) as `assigned`, for the box term (default: the same); class_count divides the class term
        (default: the number of assigned queries).
        """
        positive = assigned >= 0
        labels = targets.labels.gather(1, assigned.clamp(min=0))
        one_hot = F.one_hot(labels, logits.shape[-1]).to(logits.dtype) * positive[..., None]
        classification = sigmoid_focal_loss(logits, one_hot)
        if real is not None:
            classification = classification * real[..., None]
        count = shared_count(positive.sum())
        difference = self._box_difference(codes, assigned if boxes is None else boxes, targets)
        box_count = count if boxes is None else shared_count((boxes >= 0).sum())
        class_count = count if class_count is None else class_count
        return {
            f"{name}/class": CLASS_WEIGHT * classification.sum() / class_count,
            f"{name}/box": BOX_WEIGHT * difference.sum() / box_count,
        }

    def _box_difference(self, codes: Tensor, assigned: Tensor, targets: Targets) -> Tensor:
        """Return weighted absolute differences (B, Q, 10) of codes to those of the assigned objects, 0 if
        none. An unknown velocity has none. Unless as published, symmetric objects may face either way and
        those without a heading any way [ours]."""
        index = assigned.clamp(min=0)
        target = encode_boxes(targets.boxes.float().gather(1, index[..., None].expand(-1, -1, 9)))
        if not self.published:
            labels, names = targets.labels.gather(1, index), self.config.class_names
            heading = target_heading(target[..., 6:8], codes.detach()[..., 6:8], labels, names)
            target = torch.cat([target[..., :6], heading, target[..., 8:]], dim=-1)
        known = torch.isfinite(target) & (assigned >= 0)[..., None]
        return (codes - torch.where(known, target, codes.detach())).abs() * self.code_weights
