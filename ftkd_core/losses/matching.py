# SPDX-License-Identifier: Apache-2.0
"""One-to-one matching of predictions and ground truth (DETR; costs of exiawsh/StreamPETR).

Symbols: B batch, Q queries, G ground-truth slots, K classes.
"""

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ftkd_core.boxes import encode_boxes
from ftkd_core.types import Targets

_MATCHED_CODE_DIM = 8  # without velocity


def focal_cost(logits: Tensor, labels: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Return the cost (Q, G) of assigning the class of object g to query q, of logits (Q, K) and labels
    (G,)."""
    probability = logits.sigmoid()[:, labels]
    negative = -(1 - probability + 1e-12).log() * (1 - alpha) * probability**gamma
    positive = -(probability + 1e-12).log() * alpha * (1 - probability) ** gamma
    return positive - negative


@torch.no_grad()
def match(
    logits: Tensor,
    codes: Tensor,
    targets: Targets,
    classification: float = 2.0,
    box_l1: float = 0.25,
    *,
    part: str = "matching",
) -> Tensor:
    """Return the index (B, Q) int64 of the object matched to each query, -1 for background.

    logits (B, Q, K), codes (B, Q, 10). The Hungarian algorithm runs on the CPU over the real objects only.
    Raises FloatingPointError if a cost is not finite; the message names `part` and class or box.
    """
    batch, queries, _ = logits.shape
    assigned = torch.full((batch, queries), -1, dtype=torch.long)
    target_codes = encode_boxes(targets.boxes.float())[..., :_MATCHED_CODE_DIM]
    for sample in range(batch):
        objects = targets.mask[sample].nonzero()[:, 0]
        if len(objects) == 0:
            continue
        cost = classification * focal_cost(logits[sample].float(), targets.labels[sample, objects])
        cost = cost + box_l1 * torch.cdist(
            codes[sample, :, :_MATCHED_CODE_DIM].float(), target_codes[sample, objects], p=1
        )
        if not torch.isfinite(cost).all():
            kind = "box" if torch.isfinite(logits[sample]).all() else "class"
            raise FloatingPointError(
                f"{part}/{kind}: the cost is not finite because predictions or targets contain nan or inf"
            )
        rows, columns = linear_sum_assignment(cost.cpu().numpy())
        assigned[sample, torch.as_tensor(rows)] = objects.cpu()[torch.as_tensor(columns)]
    return assigned.to(logits.device)
