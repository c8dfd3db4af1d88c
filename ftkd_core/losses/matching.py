# SPDX-License-Identifier: Apache-2.0
"""One-to-one matching of predictions and ground truth (DETR; costs of exiawsh/StreamPETR).

Symbols: B batch, Q queries, G ground-truth slots, K classes.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ftkd_core.boxes import encode_boxes
from ftkd_core.config import DetectorConfig, SparseBEVConfig
from ftkd_core.types import Targets

CLASS_WEIGHT: Final = 2.0
"""Weight of the focal loss of the classes, in matching and training [public code of both models]."""
BOX_WEIGHT: Final = 0.25
"""Weight of the L1 loss of the box code, in matching and training [the same]."""
CODE_WEIGHTS: Final = (2.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0)
"""Weight per element of the box code in the L1 loss [the same]."""
_MATCHED_CODE_DIM: Final = 8  # without velocity


def focal_cost(logits: Tensor, labels: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Return the cost (..., Q, G) of assigning class labels (..., G) to queries with logits (..., Q, K)."""
    index = labels[..., None, :].expand(*logits.shape[:-1], labels.shape[-1])
    probability = logits.sigmoid().gather(-1, index)
    negative = -(1 - probability + 1e-12).log() * (1 - alpha) * probability**gamma
    positive = -(probability + 1e-12).log() * alpha * (1 - probability) ** gamma
    return positive - negative


def matching_weights(config: DetectorConfig | SparseBEVConfig) -> tuple[float, ...]:
    """Return the weights of the first elements of the code in the box cost of a model.

    The public models use the code weights: StreamPETR without velocity (`match_with_velo=False`), SparseBEV
    with it. Without `as_published` and `weighted_matching`, the elements before velocity weigh 1 [ours].
    """
    if config.decoder.as_published and isinstance(config, DetectorConfig):
        return CODE_WEIGHTS[:_MATCHED_CODE_DIM]
    if config.decoder.as_published or config.loss.weighted_matching:
        return CODE_WEIGHTS
    return (1.0,) * _MATCHED_CODE_DIM


@torch.no_grad()
def match(
    logits: Tensor,
    codes: Tensor,
    targets: Targets,
    *,
    part: str = "matching",
    code_weights: Sequence[float] = (1.0,) * _MATCHED_CODE_DIM,
) -> Tensor:
    """Return the index (B, Q) int64 of the object matched to each query, -1 for background.

    logits (B, Q, K), codes (B, Q, 10). code_weights: weights of the first elements of the code in the box
    cost, as of `matching_weights`; the others do not enter it. The Hungarian algorithm runs on the CPU over
    the real objects only. Raises FloatingPointError if a cost is not finite; the message names `part` and
    class or box.
    """
    batch, queries, _ = logits.shape
    assigned = torch.full((batch, queries), -1, dtype=torch.long)
    weights = codes.new_tensor(code_weights, dtype=torch.float32)
    goal = encode_boxes(targets.boxes.float())[..., : len(weights)].nan_to_num()
    cost = CLASS_WEIGHT * focal_cost(logits.float(), targets.labels)
    cost = cost + BOX_WEIGHT * torch.cdist(codes[..., : len(weights)].float() * weights, goal * weights, p=1)
    costs, real = cost.cpu().numpy(), targets.mask.cpu().numpy()  # one copy to the CPU
    for sample in range(batch):
        objects = np.flatnonzero(real[sample])
        if len(objects) == 0:
            continue
        cost_of_sample = costs[sample][:, objects]
        if not np.isfinite(cost_of_sample).all():
            kind = "box" if torch.isfinite(logits[sample]).all() else "class"
            raise FloatingPointError(
                f"{part}/{kind}: the cost is not finite because predictions or targets contain nan or inf"
            )
        rows, columns = linear_sum_assignment(cost_of_sample)
        assigned[sample, torch.as_tensor(rows)] = torch.as_tensor(objects[columns])
    return assigned.to(logits.device)
