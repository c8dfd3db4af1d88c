# SPDX-License-Identifier: Apache-2.0
"""Loss of learned linking: velocities of proposals and the choice among candidate velocities (ours).

A proposal belongs to the nearest object of its class, if that is near enough for its distance from the
vehicle. Proposals of objects without a known velocity do not count.
"""

from typing import Final

import torch
from torch import Tensor

from ftkd_core.losses.normalizer import shared_count
from ftkd_core.models.predictions import IMPOSSIBLE, LinkedProposals
from ftkd_core.types import Targets

_NEAR_M: Final = 2.0
_SHARE_OF_DISTANCE: Final = 0.1  # depth errors grow with distance
_MOVING_M_S: Final = 0.5
_MOVING_WEIGHT: Final = 3.0  # most objects stand
_CHOICE: Final = 0.15
_VELOCITY: Final = 0.5
_CHOICE_WIDTH_M_S: Final = 1.0


def linking_losses(linked: LinkedProposals, targets: Targets) -> dict[str, Tensor]:
    """Return `linking/velocity`, the L1 error of the velocities in m/s, and `linking/choice`, the cross
    entropy of the candidates' scores to a distribution around the true velocity. Both are weighted means over
    the proposals of objects."""
    truth, known = _true_velocities(linked, targets)
    score = linked.anchors.logits.detach().float().sigmoid().amax(-1).sqrt()
    moving = truth.norm(dim=-1) > _MOVING_M_S
    weight = known * score * torch.where(moving, _MOVING_WEIGHT, 1.0)
    total = shared_count(weight.sum())
    distance = (linked.candidates - truth[:, :, None]).norm(dim=-1)
    possible = linked.scores > IMPOSSIBLE / 2
    wanted = torch.where(possible, -distance / _CHOICE_WIDTH_M_S, -torch.inf).softmax(-1)
    choice = -(wanted * linked.scores.float().log_softmax(-1)).sum(-1)
    error = (linked.velocity.float() - truth).abs().sum(-1)
    return {
        "linking/choice": _CHOICE * (weight * choice).sum() / total,
        "linking/velocity": _VELOCITY * (weight * error).sum() / total,
    }


def _true_velocities(linked: LinkedProposals, targets: Targets) -> tuple[Tensor, Tensor]:
    """Return the velocities (B, I, 2) in m/s of the objects that proposals belong to, and whether there is
    one (B, I)."""
    centers = linked.anchors.codes[..., :2].float()
    label = linked.anchors.logits.argmax(-1)
    distance = torch.cdist(
        centers, targets.boxes[..., :2].float(), compute_mode="donot_use_mm_for_euclid_dist"
    )
    same = (label[:, :, None] == targets.labels[:, None]) & targets.mask[:, None]
    nearest, index = torch.where(same, distance, torch.inf).min(-1)
    reach = (_SHARE_OF_DISTANCE * centers.norm(dim=-1)).clamp(min=_NEAR_M)
    velocity = targets.boxes[..., 7:9].float().gather(1, index[..., None].expand(-1, -1, 2))
    known = (nearest < reach) & torch.isfinite(velocity).all(-1)
    return torch.where(known[..., None], velocity, 0.0), known
